"""The classification distiller: what it runs, what it leaves alone, and what it is to others."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

pytest.importorskip("timm", reason="timm is not installed")

import timm

from sssd.classification import TERMS, Term, Terms, register_term
from sssd.engine import Checkpointer
from sssd.meta_arch import ClassificationDistiller
from tests.classifiers import KEYS, assert_same, state_of, tiny_config, tiny_inputs

MUTUAL = [{"name": "cross_entropy"}, {"name": "mutual"}]


def build(tmp_path, recipe, *opts, seed=7):
    torch.manual_seed(seed)
    model = build_model(tiny_config(recipe, tmp_path, *opts))
    model.teacher_is_trained = True
    return model.train()


def losses_of(model, iteration=0, **inputs):
    with EventStorage(iteration):
        return model(tiny_inputs(**inputs))


@pytest.mark.parametrize("recipe", ["kd", "fitnets", "ft", "ab", "dml", "byot", "one", "cs_kd"])
def test_the_student_starts_as_it_would_alone(tmp_path, recipe):
    alone = build(tmp_path, "ce")
    next_number = torch.rand(1)
    model = build(tmp_path, recipe)
    assert_same(state_of(alone.student), state_of(model.student))
    assert torch.rand(1) == next_number  # the stream goes on as well as if nothing else were built


def test_peers_start_from_weights_of_their_own(tmp_path):
    model = build(tmp_path, "dml", KEYS + "PEERS", ["cifar_resnet8", "cifar_resnet8"])
    weights = [network.conv1.weight for network in model.networks]
    assert len(weights) == 3
    for i in range(3):
        assert not torch.equal(weights[i], weights[i - 1])


def test_the_state_dict_is_the_networks_own(tmp_path):
    model = build(tmp_path, "byot", KEYS + "TERMS", [
        {"name": "own_teacher", "layers": ["layer1"], "deepest": "layer3"}, {"name": "class_pairs"},
    ])  # fmt: skip
    stock = timm.create_model("cifar_resnet8", num_classes=10, in_chans=1)
    stock.load_state_dict(model.state_dict(), strict=True)
    images = torch.randn(3, 1, 8, 8)
    assert torch.equal(stock.eval()(images), model.student.eval()(images))
    other = build(tmp_path, "byot", seed=8)
    other.load_state_dict(stock.state_dict(), strict=True)
    assert_same(state_of(other.student), state_of(stock))


def test_losses_are_those_of_the_normalised_images(tmp_path):
    model = build(tmp_path, "ce", "MODEL.PIXEL_MEAN", [10.0], "MODEL.PIXEL_STD", [50.0])
    twin = timm.create_model("cifar_resnet8", num_classes=10, in_chans=1)
    twin.load_state_dict(model.state_dict())
    inputs = tiny_inputs()
    images = torch.stack([x["image"] for x in inputs])
    labels = torch.tensor([x["label"] for x in inputs])
    losses = losses_of(model)
    assert losses.keys() == {"loss_cross_entropy"}
    expected = F.cross_entropy(twin((images - 10.0) / 50.0), labels)
    assert torch.equal(losses["loss_cross_entropy"], expected)
    assert_same(state_of(twin), state_of(model.student))  # one batch for the running statistics


def test_the_weight_of_a_term_follows_its_schedule(tmp_path):
    kd = {"name": "kd", "weight": {"name": "linear", "values": [4.0, 1.0]}}
    opts = (KEYS + "TERMS", [kd], "SOLVER.MAX_ITER", 10)
    model = build(tmp_path, "kd", *opts)
    model.student.eval()  # so that the passes are equal
    first, half = (losses_of(model, iteration)["loss_kd"].item() for iteration in (0, 5))
    assert first / half == pytest.approx(4.0 / 2.5)


def test_the_teacher_stays_in_evaluation_mode_and_gets_no_gradient(tmp_path):
    model = build(tmp_path, "kd_at_cs_kd")
    before = state_of(model.teacher)
    model.eval()
    model.train()
    assert not any(m.training for m in model.teacher.modules())
    sum(losses_of(model).values()).backward()
    assert all(p.grad is None for p in model.teacher.parameters())
    assert all(p.grad is not None for p in model.student.parameters())
    assert_same(before, state_of(model.teacher))


def test_a_teacher_of_random_weights_is_refused(tmp_path):
    model = build(tmp_path, "kd")
    model.teacher_is_trained = False
    with pytest.raises(ValueError, match=r"random weights.*TEACHER\.WEIGHTS"):
        losses_of(model)


@pytest.mark.parametrize("learner", [0, 1, 2])
def test_only_the_network_that_learns_gets_a_gradient_and_counts_the_batch(tmp_path, learner):
    model = build(tmp_path, "dml", KEYS + "PEERS", ["cifar_resnet8", "cifar_resnet14"])
    before = [state_of(network) for network in model.networks]
    model.learner = learner
    losses = losses_of(model)
    prefix = f"peer{learner}_" if learner else ""
    assert losses.keys() == {prefix + "loss_cross_entropy", prefix + "loss_mutual"}
    sum(losses.values()).backward()
    for i, network in enumerate(model.networks):
        if i == learner:
            assert all(p.grad is not None for p in network.parameters())
            assert network.bn1.num_batches_tracked == 1
        else:
            assert all(p.grad is None for p in network.parameters())
            assert_same(before[i], state_of(network))
    frozen = {id(p) for p in model.frozen_parameters(0)}
    others = [network for i, network in enumerate(model.networks) if i != learner]
    assert frozen == {id(p) for network in others for p in network.parameters()}


def test_peers_are_seen_with_the_statistics_of_the_batch(tmp_path):
    model = build(tmp_path, "dml")
    student, peer = model.networks
    images = torch.stack([x["image"] for x in tiny_inputs()])
    with torch.no_grad():
        ours, theirs = (F.log_softmax(n((images - 78.1) / 96.0), 1) for n in (student, peer))
    expected = (theirs.exp() * (theirs - ours)).sum(1).mean()
    assert losses_of(model)["loss_mutual"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        ("ce", {"student"}),
        ("kd", {"student"}),
        ("byot", {"student", "head1", "head2", "ensemble"}),
        ("one", {"student", "branch2", "branch3", "ensemble"}),
        ("dml", {"student", "peer1", "ensemble_of_peers"}),
    ],
)
def test_evaluation_gives_the_logits_of_all_classifiers(tmp_path, recipe, names):
    model = build(tmp_path, recipe).eval()
    inputs = [{"image": x["image"], "image_id": x["image_id"]} for x in tiny_inputs()]
    before = state_of(model)
    with torch.no_grad():
        outputs = model(inputs)
        images = (torch.stack([x["image"] for x in inputs]) - 78.1) / 96.0
        expected = model.student(images)
    assert len(outputs) == len(inputs)
    assert all(set(x["logits"]) == names for x in outputs)
    assert torch.equal(torch.stack([x["logits"]["student"] for x in outputs]), expected)
    assert_same(before, state_of(model))


def test_the_ensemble_of_peers_is_the_mean_of_their_probabilities(tmp_path):
    model = build(tmp_path, "dml").eval()
    with torch.no_grad():
        (first, *_) = model(tiny_inputs())
    student, peer, ensemble = (
        F.softmax(first["logits"][name], 0) for name in ("student", "peer1", "ensemble_of_peers")
    )
    assert torch.allclose(ensemble, (student + peer) / 2, atol=1e-6)


def test_without_gradients_training_mode_moves_the_running_statistics_alone(tmp_path):
    model = build(tmp_path, "dml")
    parameters = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        assert model(tiny_inputs()) == {}
    assert all(network.bn1.num_batches_tracked == 1 for network in model.networks)
    assert_same(parameters, dict(model.named_parameters()))


def test_images_of_other_channels_are_refused(tmp_path):
    model = build(tmp_path, "ce")
    with pytest.raises(ValueError, match=r"\(3, 8, 8\).*takes 1 channels.*PIXEL_MEAN"):
        losses_of(model, channels=3)
    mixed = [*tiny_inputs(), *tiny_inputs(size=9)]
    with pytest.raises(ValueError, match=r"\(1, 9, 9\).*images of one size"), EventStorage(0):
        model(mixed)


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, images):
        return self.fc(images.flatten(1)), None


def directly(student, terms, **options):
    return ClassificationDistiller(
        student=student, terms=terms, pixel_mean=[0.0], pixel_std=[1.0], max_iter=3, **options
    )


def test_a_network_that_gives_more_than_logits_is_named():
    term = TERMS["cross_entropy"](None)
    model = directly(TwoOutputs(), [Terms({"ce": term}, {"ce": lambda i: 1.0})])
    with pytest.raises(ValueError, match=r"TwoOutputs returns a tuple .*aux_logits: False"):
        losses_of(model)


def test_each_network_that_learns_has_terms():
    with pytest.raises(ValueError, match="2 networks learn, by 1 lists of terms"):
        directly(TwoOutputs(), [Terms({}, {})], peers=[TwoOutputs()])


@pytest.fixture
def needs_nothing():
    """A term that needs no network."""

    @register_term("needs_nothing")
    class NeedsNothing(Term):
        needs_student = False

        def __init__(self, surroundings):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, batch):
            assert batch.logits is None and batch.teacher_logits is None and not batch.peers
            return self.weight * 2

    yield
    del TERMS["needs_nothing"]


def test_networks_that_no_term_needs_do_not_run(tmp_path, needs_nothing):
    opts = (KEYS + "TERMS", [{"name": "needs_nothing"}], KEYS + "PEERS", ["cifar_resnet8"])
    model = build(tmp_path, "kd", *opts)
    ran = []
    for network in (*model.networks, model.teacher):
        network.register_forward_hook(lambda *_: ran.append(1))
    assert losses_of(model)["loss_needs_nothing"] == 2
    assert not ran


def test_peers_and_what_terms_train_lie_beside_the_student_in_a_checkpoint(tmp_path):
    opts = (KEYS + "TERMS", [*MUTUAL, {"name": "own_teacher", "layers": ["layer1"],
            "deepest": "layer3"}])  # fmt: skip
    model = build(tmp_path, "dml", *opts)
    Checkpointer(model, str(tmp_path)).save("model")
    saved = torch.load(tmp_path / "model.pth", weights_only=True)
    assert saved["model"].keys() == model.student.state_dict().keys()
    kinds = {".".join(name.split(".")[:3]) for name in saved["sssd"]}
    assert {"terms.0.own_teacher", "terms.1.own_teacher"} <= kinds
    again = build(tmp_path, "dml", *opts, seed=9)
    Checkpointer(again).load(str(tmp_path / "model.pth"), checkpointables=["sssd"])
    assert_same(state_of(model), state_of(again))


@pytest.mark.parametrize("recipe", ["kd", "at", "at_gradient"])
def test_the_teacher_runs_once_in_a_step(tmp_path, recipe):
    model = build(tmp_path, recipe)
    passes = []
    model.teacher.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    losses_of(model)
    assert passes == [recipe == "at_gradient"]
