"""Terms by name: what a config may say, and how their losses are named and weighted."""

import math

import pytest
import torch
from torch import nn

pytest.importorskip("timm", reason="timm is not installed")

from sssd.classification import TERMS, Term, register_term
from sssd.classification.term import term_class
from sssd.losses import attention_loss, kd_loss
from tests.classification.steps import (
    SHAPE,
    gradients,
    make_batch,
    make_network,
    make_surroundings,
    make_terms,
)

CE = {"name": "cross_entropy"}


@pytest.fixture
def surroundings():
    return make_surroundings()


@pytest.fixture
def own_terms(monkeypatch):
    """Terms that a test registers are gone after it."""
    term_class(CE)  # all of the package's are there
    monkeypatch.setattr("sssd.classification.term.TERMS", registered := dict(TERMS))
    return registered


def test_a_registered_term_is_built_with_its_options_and_weight(surroundings, own_terms):
    @register_term("constant")
    class Constant(Term):
        needs_pairs = True

        def __init__(self, surroundings, value, shift=0.0):
            super().__init__(student_layers=["layer1"])
            self.value, self.surroundings = value + shift, surroundings

        def forward(self, batch):
            return {"whole": torch.tensor(self.value), "half": torch.tensor(self.value / 2)}

        def predict(self, batch):
            return {"third": torch.tensor(self.value / 3)}

    assert own_terms["constant"] is Constant and "constant" not in TERMS
    terms = make_terms(surroundings, {"name": "constant", "weight": 10, "value": 6.0, "shift": 3.0})
    assert terms["constant"].surroundings is surroundings
    assert {name: x.item() for name, x in terms(None, 0).items()} == {
        "loss_constant_whole": 90.0,
        "loss_constant_half": 45.0,
    }
    assert terms.predict(None)["third"].item() == 3
    assert terms.needs("pairs") and terms.needs("student") and not terms.needs("peers")
    assert terms.layers("student") == ["layer1"] and terms.layers("teacher") == []
    with pytest.raises(ValueError, match="'constant' of a term is taken by .*Constant: choose ano"):
        register_term("constant")(Constant)
    message = "'constant' has no option 'values': it has weight, value, shift"
    with pytest.raises(ValueError, match=message):
        make_terms(surroundings, {"name": "constant", "values": 1})
    with pytest.raises(ValueError, match="'constant' lacks its option 'value'"):
        make_terms(surroundings, {"name": "constant", "shift": 1.0})


def test_terms_need_what_any_of_them_needs(surroundings):
    layers = {"name": "attention", "layers": ["layer1", ["layer2", "layer3"]]}
    terms = make_terms(surroundings, CE, layers, {"name": "class_pairs"})
    assert terms.needs("teacher") and terms.needs("pairs") and terms.needs("student")
    assert not terms.needs("peers") and not terms.needs("input_gradient")
    assert terms.layers("student") == ["layer1", "layer2"]
    assert terms.layers("teacher") == ["layer1", "layer3"]
    paraphraser = make_terms(surroundings, {"name": "paraphraser", "teacher_layer": "layer3"})
    assert not paraphraser.needs("student")


def test_several_terms_of_one_name_are_numbered(surroundings):
    kd = {"name": "kd"}
    terms = make_terms(surroundings, {**kd, "temperature": 1.0}, CE, kd, {**kd, "weight": 2})
    assert list(terms) == ["kd", "cross_entropy", "kd2", "kd3"]
    batch = make_batch(terms, surroundings)
    losses = terms(batch, 0)
    expected = kd_loss(batch.logits, batch.teacher_logits, temperature=1.0)
    torch.testing.assert_close(losses["loss_kd"], expected)
    torch.testing.assert_close(losses["loss_kd3"], 2 * losses["loss_kd2"])


def test_a_name_that_ends_in_a_digit_is_a_name(surroundings, own_terms):
    @register_term("at2")
    class Mine(Term):
        def __init__(self, surroundings, c=1.0):
            super().__init__()
            self.c = c

    terms = make_terms(surroundings, *({"name": "at2", "c": c} for c in (1.0, 2.0)))
    assert {name: term.c for name, term in terms.items()} == {"at2": 1.0, "at22": 2.0}


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "one", "layer": "layer3", "branches": "3"},
        {"name": "own_teacher", "layers": [["a", "a"]], "deepest": "layer3"},
    ],
)
def test_an_option_of_another_type_is_one_sentence(surroundings, spec):
    with pytest.raises(
        ValueError, match=f"The term '{spec['name']}' cannot be made with .*types of its options"
    ):
        make_terms(surroundings, spec)


@pytest.mark.parametrize(
    ("weight", "iteration", "factor"),
    [
        (2.5, 70, 2.5),
        ("3", 0, 3.0),
        (0, 0, 0.0),
        ({"name": "linear", "values": [4.0, 1.0]}, 0, 4.0),
        ({"name": "linear", "values": [4.0, 1.0]}, 50, 2.5),
        ({"name": "linear", "values": [4.0, 1.0], "max_iter": 10}, 5, 2.5),
        ({"name": "cosine", "values": [0.0, 1.0]}, 25, (1 - math.sqrt(0.5)) / 2),
        ({"name": "step", "values": [0.0, 7.0], "milestones": [30]}, 29, 0.0),
        ({"name": "step", "values": [0.0, 7.0], "milestones": [30]}, 30, 7.0),
    ],
)
def test_a_weight_is_a_number_or_a_schedule(surroundings, weight, iteration, factor):
    terms = make_terms(surroundings, CE, {**CE, "weight": weight})
    losses = terms(make_batch(terms, surroundings), iteration)
    expected = factor * losses["loss_cross_entropy"]
    torch.testing.assert_close(losses["loss_cross_entropy2"], expected)


def test_terms_that_train_together_are_the_sum_of_each_alone(surroundings):
    surroundings.student.double(), surroundings.teacher.double()
    specs = [
        {"name": "kd", "weight": 0.9},
        {"name": "attention", "weight": 1000.0, "layers": ["layer1", "layer2", "layer3"]},
        {"name": "class_pairs", "weight": 2.0},
    ]
    together, alone = make_terms(surroundings, *specs), {}
    losses = together(make_batch(together, surroundings), 0)
    of_all = gradients(sum(losses.values()), surroundings.student)
    of_each = []
    for spec in specs:
        terms = make_terms(surroundings, spec)
        loss = terms(make_batch(terms, surroundings), 0)
        alone.update(loss)
        # The attention of the maps does not reach the classifier.
        grads = gradients(sum(loss.values()), surroundings.student)
        of_each.append([torch.zeros(()) if grad is None else grad for grad in grads])
    assert all(loss > 1e-4 for loss in alone.values())
    torch.testing.assert_close(losses, alone, rtol=1e-12, atol=0)
    for together_grad, grads in zip(of_all, zip(*of_each, strict=True), strict=True):
        torch.testing.assert_close(together_grad, sum(grads), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], r"has no terms, so there is nothing to learn: .*TERMS: \[\{name: cross_entropy\}\]"),
        ([{"name": "kdd"}], "has the term {'name': 'kdd'}: give it a name .* kd, .*tolerant_teach"),
        ([{"weight": 2}], "has the term {'weight': 2}: give it a name that is registered"),
        ([{"name": ["kd"]}], r"has the term {'name': \['kd'\]}: give it a name"),
        (["kd"], "has the term 'kd': give it a name"),
        ([{"name": "kd", "T": 4}], "'kd' has no option 'T': it has weight, temperature, t_square"),
        ([{"name": "attention"}], "The term 'attention' lacks its option 'layers'"),
        ([{**CE, "weight": "much"}], "weight of the term 'cross_entropy' is 'much': give a number"),
        ([{**CE, "weight": None}], "weight of the term 'cross_entropy' is None: give a number"),
        ([{**CE, "weight": -1}], "is -1: .*must be finite and >= 0, got -1.0"),
        ([{**CE, "weight": math.nan}], "is nan: .* must be finite"),
        ([{**CE, "weight": {"values": [1.0]}}], r"is {'values': \[1.0\]}: .* 'name'"),
        ([{**CE, "weight": {"name": "linear", "values": [1.0]}}], r"needs 2 value\(s\)"),
        ([{**CE, "weight": {"name": "sine", "values": [1.0]}}], "Unknown .*schedule 'sine'"),
        ([{**CE, "weight": {"name": "share", "values": []}}], "'share' schedule follows"),
        ([{"name": "mutual"}], "'mutual' needs networks that learn beside .*CLASSIFIER.PEERS"),
    ],
)
def test_errors_name_the_term_and_the_fix(surroundings, specs, message):
    with pytest.raises(ValueError, match=message):
        make_terms(surroundings, *specs)


def test_without_a_teacher_only_terms_that_need_none_are_built():
    surroundings = make_surroundings(teacher=None)
    assert list(make_terms(surroundings, CE, {"name": "class_pairs"})) == [
        "cross_entropy",
        "class_pairs",
    ]
    layers = {"layers": ["layer1"]}
    for spec in ({"name": "kd"}, {"name": "cwtm"}, {"name": "attention", **layers}):
        message = f"The term {spec['name']!r} needs a teacher: .*TEACHER.NETWORK"
        with pytest.raises(ValueError, match=message):
            make_terms(surroundings, spec)


def test_shapes_are_those_of_one_image_and_asked_for_once(surroundings):
    calls = []
    surroundings.student.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):
        assert surroundings.student_shape("layer2") == (32, 4, 4)
    assert len(calls) == 1
    assert surroundings.student_shape("layer3:input") == (32, 4, 4)
    assert surroundings.teacher_shape("embedding") == (64,)


def test_asking_for_a_shape_leaves_the_network_as_it_was(surroundings):
    student = surroundings.student
    student.train()
    student.layer2.eval()
    modes = [module.training for module in student.modules()]
    state = {key: value.clone() for key, value in student.state_dict().items()}
    surroundings.student_shape("layer1")
    with pytest.raises(ValueError, match="no layer"):
        surroundings.student_shape("layer9")
    assert [module.training for module in student.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in student.state_dict().items())
    assert all(parameter.grad is None for parameter in student.parameters())


def test_a_shape_that_cannot_be_had_says_why(surroundings):
    with pytest.raises(ValueError, match="CifarResNet has no layer 'layer4': it has conv1, bn1, "):
        surroundings.teacher_shape("layer4")
    surroundings.student.spare = nn.Linear(2, 2)
    message = "The layer 'spare' of the network CifarResNet does not run when it classifies"
    with pytest.raises(ValueError, match=message):
        surroundings.student_shape("spare")
    surroundings.image_shape = (1, *SHAPE[1:])
    message = r"CifarResNet cannot take images of the shape \(1, 8, 8\) .*3 channels.*SIZE"
    with pytest.raises(ValueError, match=message):
        surroundings.student_shape("layer1")
    surroundings.teacher = make_network("vit_tiny_patch16_224")
    surroundings.image_shape = SHAPE
    with pytest.raises(ValueError, match=r"VisionTransformer cannot take .*\(3, 8, 8\).*224"):
        surroundings.teacher_shape("blocks.0")


def test_the_pairs_of_layers_are_checked(surroundings):
    for layers, message in (
        ([], "The term Attention has no layers: name one or more"),
        ("layer1", r"layers of the term Attention are 'layer1': give a list, such as \[layer1"),
        ([["layer1"]], r"hold \['layer1'\]: give a name that both networks have, or two"),
        ([["layer1", "layer2", "layer3"]], "hold .*'layer3'"),
        ([3], "hold 3: give a name"),
        ([["layer1", 2]], r"hold \['layer1', 2\]: give"),
        (["layer1", "layer5"], "has no layer 'layer5': it has conv1, .*layer3.*fc"),
        ([["layer1", "blocks"]], "has no layer 'blocks'"),
    ):
        with pytest.raises(ValueError, match=message):
            make_terms(surroundings, {"name": "attention", "layers": layers})


def test_a_pair_is_the_student_s_layer_and_the_teacher_s(surroundings):
    terms = make_terms(surroundings, {"name": "attention", "layers": [["layer1", "layer2"]]})
    batch = make_batch(terms, surroundings)
    assert list(batch.features) == ["layer1"] and list(batch.teacher_features) == ["layer2"]
    expected = attention_loss(batch.features["layer1"], batch.teacher_features["layer2"])
    torch.testing.assert_close(terms(batch, 0)["loss_attention"], expected)
