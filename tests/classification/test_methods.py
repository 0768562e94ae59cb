"""What each method of distillation promises beside its formula, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("timm", reason="timm is not installed")

from sssd import losses
from tests.classification.by_hand import FACTOR, HINT, SECTIONS, layer, slope
from tests.classification.steps import build_term, gradients, make_batch, make_surroundings


@pytest.fixture
def surroundings():
    return make_surroundings()


def test_activation_boundaries_halve_with_every_layer_from_the_deepest_up():
    surroundings = make_surroundings(teacher="cifar_resnet8x4")
    names = [f"layer{i}.0.act2:input" for i in (1, 2, 3)]
    term = build_term("activation_boundaries", {"layers": names}, surroundings)
    batch = make_batch(term, surroundings)
    single = [
        losses.activation_boundary_loss(connect(own), teacher)
        for connect, (own, teacher) in zip(
            term.connectors, [layer(batch, name) for name in names], strict=True
        )
    ]
    torch.testing.assert_close(term(batch), single[0] / 4 + single[1] / 2 + single[2])
    # With unequal widths, connectors that train stand between.
    weights = [connect[0].weight for connect in term.connectors]
    assert all(grad.any() for grad in gradients(term(batch), weights))


def test_attention_and_nst_take_layers_of_unequal_width():
    surroundings = make_surroundings(teacher="cifar_resnet8x4")
    for name, function in (("attention", losses.attention_loss), ("nst", losses.mmd_loss)):
        term = build_term(name, {"layers": [["layer1", "layer2"], "layer3"]}, surroundings)
        batch = make_batch(term, surroundings)
        expected = function(*layer(batch, "layer1", "layer2")) + function(*layer(batch, "layer3"))
        torch.testing.assert_close(term(batch), expected)
    term = build_term(
        "attention", {"layers": [["layer1", "layer2"]], "resize": False}, surroundings
    )
    with pytest.raises(ValueError, match=r"\(8, 8\), .* \(4, 4\), must have equal sizes"):
        term(make_batch(term, surroundings))


@pytest.mark.parametrize("temperature", [2.0, 4.0])
def test_class_pairs_learn_from_a_pass_in_training_mode_that_moves_no_statistics(
    surroundings, temperature
):
    term = build_term("class_pairs", {"temperature": temperature}, surroundings)
    student = surroundings.student
    batch = make_batch(term, surroundings)
    before = {key: x.clone() for key, x in student.named_buffers()}
    value = term(batch)
    assert all(torch.equal(x, before[key]) for key, x in student.named_buffers())
    in_training = student(batch.pair)
    in_evaluation = student.eval()(batch.pair)
    expected, other = (
        losses.kd_loss(batch.logits, x, temperature=temperature)
        for x in (in_training, in_evaluation)
    )
    torch.testing.assert_close(value, expected)
    assert abs(value - other) > 1e-3 * value


def test_gradient_symmetry_vanishes_for_a_network_that_mirrors_what_it_sees(surroundings):
    term = build_term("gradient_symmetry", {}, surroundings)
    student = surroundings.student.eval()
    with torch.no_grad():  # each filter is its own mirror image, and none has a stride
        for module in student.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.copy_((module.weight + module.weight.flip(-1)) / 2)
                module.stride = (1, 1)
    batch = make_batch(term, surroundings)
    assert term(batch) < 1e-6 * slope(student, batch.images, batch.labels).norm()


@pytest.mark.parametrize("branches", [2, 3])
def test_the_gate_of_one_learns_by_the_ensemble_s_labels_alone(surroundings, branches):
    term = build_term("one", {"layer": "layer3", "branches": branches}, surroundings)
    parts = term(make_batch(term, surroundings, progress=1.0))
    assert set(parts) == {"cross_entropy", "ensemble_cross_entropy", "distillation"}
    for name in ("distillation", "cross_entropy"):
        assert set(gradients(parts[name], term.gate)) == {None}
    assert any(grad.any() for grad in gradients(parts["ensemble_cross_entropy"], term.gate))
    # All branches learn from each part.
    for branch in term.branches:
        assert all(
            grad.any()
            for part in parts.values()
            for grad in gradients(part, [branch.network.fc.bias])
        )
    assert len(term.branches) == branches - 1


def test_the_gates_are_a_mean_of_which_no_branch_can_drop_out(surroundings):
    gate = build_term("one", {"layer": "layer3"}, surroundings).gate
    trunk = torch.randn(50, 32, 4, 4, generator=torch.Generator().manual_seed(0))
    weights = gate(trunk)
    score = gate[3](F.linear(trunk.mean((2, 3)), gate[2].weight, gate[2].bias))
    torch.testing.assert_close(weights, score.clamp(min=0).softmax(1))
    assert (score < 0).any()


def test_the_branches_of_one_start_apart_and_begin_at_the_layer(surroundings):
    term = build_term("one", {"layer": "layer2"}, surroundings)
    first, second = (branch.network for branch in term.branches)
    assert [key.split(".")[0] for key in first.state_dict()] == [
        key.split(".")[0]
        for key in surroundings.student.state_dict()
        if key.startswith(("layer2", "layer3", "fc"))
    ]
    assert not torch.equal(first.fc.weight, second.fc.weight)
    assert not torch.equal(first.fc.weight, surroundings.student.fc.weight)


def test_one_evaluates_its_branches_and_the_gated_ensemble(surroundings):
    term = build_term("one", {"layer": "layer3"}, surroundings).eval()
    surroundings.student.eval()
    batch = make_batch(term, surroundings)
    predictions = term.predict(batch)
    assert list(predictions) == ["branch2", "branch3", "ensemble"]
    trunk = batch.features["layer3:input"]
    torch.testing.assert_close(predictions["branch3"], term.branches[1](trunk))
    gates = term.gate(trunk)[:, :, None]
    every = torch.stack([batch.logits, predictions["branch2"], predictions["branch3"]], 1)
    torch.testing.assert_close(predictions["ensemble"], (gates * every).sum(1))


def test_the_deepest_head_learns_nothing_from_distillation_and_features(surroundings):
    term = build_term("own_teacher", SECTIONS, surroundings)
    batch = make_batch(term, surroundings)
    parts = term(batch)
    for name in ("distillation", "feature"):
        assert gradients(parts[name], [batch.logits]) == (None,)
        # Neither the deepest section nor the classifier, which the earlier heads do not use.
        deepest = [*surroundings.student.layer3.parameters(), *surroundings.student.fc.parameters()]
        assert set(gradients(parts[name], deepest)) == {None}
        assert any(grad.any() for grad in gradients(parts[name], surroundings.student.layer1))
    for head in term.heads:
        of_feature = gradients(parts["feature"], head.classifier)
        assert set(of_feature) == {None}
        assert all(grad.any() for grad in gradients(parts["distillation"], head.classifier))


def test_own_teacher_evaluates_its_heads_and_the_mean_of_all(surroundings):
    term = build_term("own_teacher", SECTIONS, surroundings).eval()
    surroundings.student.eval()
    batch = make_batch(term, surroundings)
    predictions = term.predict(batch)
    assert list(predictions) == ["head1", "head2", "ensemble"]
    torch.testing.assert_close(predictions["head2"], term.heads[1](batch.features["layer2"])[0])
    every = [predictions["head1"], predictions["head2"], batch.logits]
    mean = torch.stack([x.softmax(1) for x in every]).mean(0)
    torch.testing.assert_close(predictions["ensemble"].softmax(1), mean)


def test_dkpp_draws_another_permutation_in_each_step(surroundings):
    term = build_term("dkpp", {}, surroundings)
    batch = make_batch(term, surroundings)
    assert term(batch) != term(batch)


@pytest.mark.parametrize("norm", [False, True])
def test_factor_takes_over_the_paraphraser_and_never_changes_it(surroundings, norm):
    options = {"rate": 0.25, "norm": norm}
    first = build_term("paraphraser", {"teacher_layer": "layer3", **options}, surroundings)
    first(make_batch(first, surroundings)).backward()
    for parameter in first.parameters():
        parameter.data -= 0.1 * parameter.grad
    term = build_term("factor", {**FACTOR, **options}, surroundings)
    term.take_over({"cross_entropy": {}, "paraphraser": first.state_dict()})
    taken, state = term.paraphraser.state_dict(), first.encoder.state_dict()
    assert set(taken) == set(state) and all(torch.equal(taken[key], state[key]) for key in state)
    assert not any(p.requires_grad for p in term.paraphraser.parameters())
    # In training too it is in evaluation mode: its BatchNorms neither move nor use the batch.
    term.train()
    assert term.translator.training and not any(m.training for m in term.paraphraser.modules())
    batch = make_batch(term, surroundings)
    kept = {key: x.clone() for key, x in taken.items()}
    term(batch).backward()
    assert all(torch.equal(x, kept[key]) for key, x in term.paraphraser.state_dict().items())
    assert all(p.grad is None for p in term.paraphraser.parameters())
    assert all(p.grad is not None for p in term.translator.parameters())
    target = first.eval().encoder(batch.teacher_features["layer3"])
    expected = losses.factor_loss(term.translator(batch.features["layer3"]), target)
    torch.testing.assert_close(term(batch), expected)


def test_factor_refuses_a_paraphraser_that_is_missing_or_does_not_fit(surroundings):
    term = build_term("factor", FACTOR, surroundings)
    for earlier in ({}, {"cross_entropy": {}}):
        with pytest.raises(ValueError, match="needs a trained paraphraser: put a stage .*STAGES"):
            term.take_over(earlier)
    for options in ({"rate": 0.25}, {"norm": True}, {"teacher_layer": "layer2"}):
        options = {"teacher_layer": "layer3", **options}
        other = build_term("paraphraser", options, surroundings)
        with pytest.raises(ValueError, match="does not fit .*same teacher_layer, rate and norm"):
            term.take_over({"paraphraser": other.state_dict()})


UNEQUAL = {"student": "cifar_resnet8", "teacher": "cifar_resnet8x4"}
HAS = "it has conv1, bn1, act1, layer1, layer2, layer3, global_pool, fc"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fsp", {"layers": ["layer1"]}, "'fsp' has 1 layer: give it two or more"),
        (
            "fsp",
            {"layers": [["layer1", "act1"], "layer2"]},
            "student's 'layer1' has 16 channels and the teacher's 'act1' has 32; choose",
        ),
        (
            "activation_boundaries",
            {"layers": [["layer1", "layer2"]]},
            r"student's 'layer1', .*\(16, 8, 8\), and the teacher's 'layer2', \(128, 4, 4\): their",
        ),
        (
            "hint",
            {"student_layer": "layer2", "teacher_layer": "layer1"},
            r"A 'valid' regressor cannot turn .*\(32, 4, 4\) into the teacher's, \(64, 8, 8\)",
        ),
        ("hint", {**HINT, "regressor": "linear"}, "regressor of the hint is 'linear': use 'valid'"),
        ("hint", {**HINT, "teacher_layer": "embedding"}, r"regressor needs .*shape \(256,\)"),
        (
            "factor",
            {"student_layer": "layer2", "teacher_layer": "layer3"},
            r"student's 'layer2', .*\(32, 4, 4\), with the teacher's 'layer3', \(256, 2, 2\)",
        ),
        ("factor", {**FACTOR, "rate": 0}, "rate of factor transfer is 0: .*256 channels"),
        ("paraphraser", {"teacher_layer": "layer3", "rate": 1e-3}, "is 0.001: .*no width"),
        ("paraphraser", {"teacher_layer": "layer3", "error": "l2"}, "is 'l2': use mse or l1"),
        ("paraphraser", {"teacher_layer": "embedding"}, r"'paraphraser' needs .*shape \(256,\)"),
        (
            "factor",
            {"student_layer": "embedding", "teacher_layer": "embedding"},
            r"The term 'factor' needs layers .* map .*shape \(64,\)",
        ),
        ("kd", {"soft": "js"}, "soft of the term 'kd' is 'js': use 'kl' or 'ce'"),
        ("cross_entropy", {"label_smoothing": 1}, "at least 0 and below 1, got 1"),
        ("tolerant_teacher", {"k": 1}, "'tolerant_teacher' is 1; .* from 2 to .*classes, 10"),
        ("tolerant_teacher", {"k": 11}, "'tolerant_teacher' is 11; .* from 2 to .*classes, 10"),
        ("tolerant_teacher", {"confidence": 0.1}, "confidence is 0.1; the best of K=5 .*0.2"),
        ("one", {"layer": "layer3", "branches": 1}, r"'one' has 1 branch\(es\): give it 2 or more"),
        ("one", {"layer": "fc"}, r"branches off before 'fc', .*shape \(64,\): it needs a map"),
        ("one", {"layer": "layer4"}, "has no layer 'layer4': " + HAS),
        ("own_teacher", {"layers": [], "deepest": "layer3"}, "'own_teacher' has no layers: name"),
        ("own_teacher", {**SECTIONS, "layers": "layer1"}, "'own_teacher' are 'layer1': give a li"),
        ("own_teacher", {**SECTIONS, "deepest": "layer4"}, "has no layer 'layer4': " + HAS),
        ("own_teacher", {**SECTIONS, "deepest": "embedding"}, r"head on 'layer1' .*shape \(64,\)"),
        (
            "own_teacher",
            {"layers": ["layer3"], "deepest": "layer2"},
            r"section 'layer3' has a map of the shape \(64, 2, 2\), smaller than .*\(32, 4, 4\)",
        ),
        ("hint", {**HINT, "teacher_layer": "layer4"}, "has no layer 'layer4': " + HAS),
        ("factor", {**FACTOR, "student_layer": "layer4"}, "has no layer 'layer4': " + HAS),
        ("paraphraser", {"teacher_layer": "layer4"}, "has no layer 'layer4': " + HAS),
        ("rkd_angle", {"layers": ["layer2.7"]}, "has no layer 'layer2.7': its 'layer2' has 0;"),
    ],
)
def test_what_does_not_fit_is_an_error_of_one_sentence(name, options, message):
    with pytest.raises(ValueError, match=message) as error:
        build_term(name, options, make_surroundings(**UNEQUAL))
    assert "\n" not in str(error.value)
