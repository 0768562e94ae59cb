import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from sssd.losses.online import (
    gated_ensemble,
    gaussian_rampup,
    mean_ensemble,
    mutual_learning_loss,
    one_loss,
    own_teacher_loss,
)
from tests.losses.properties import (
    assert_empty_batch_gives_zero_and_keeps_the_graph,
    random_logits,
)

LABELS = torch.tensor([2, 0, 3])


def random_heads(count, *shape):
    return [random_logits(*shape, seed=seed).requires_grad_() for seed in range(count)]


def random_gates(*shape):
    return random_logits(*shape, seed=9).softmax(1).requires_grad_()


def gradients(value, inputs):
    return torch.autograd.grad(value, inputs, allow_unused=True, retain_graph=True)


def assert_equal_with_gradients(ours, theirs, inputs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)
    torch.testing.assert_close(
        gradients(ours, inputs), gradients(theirs, inputs), rtol=1e-9, atol=1e-15
    )


def test_mutual_learning_equals_torch_and_stops_at_the_peers():
    own, *peers = random_heads(3, 3, 5)
    divergences = [
        F.kl_div(own.log_softmax(1), x.softmax(1).detach(), reduction="batchmean") for x in peers
    ]
    for reduction, factor in (("mean", 1 / 2), ("sum", 1)):
        value = mutual_learning_loss(own, peers, reduction=reduction)
        assert_equal_with_gradients(value, factor * sum(divergences), own)
        assert gradients(value, peers) == (None, None)
    assert gradcheck(lambda x: mutual_learning_loss(x, peers), own)


def test_mutual_learning_has_the_peer_as_target_and_the_value_of_the_official_form():
    own, peer = (torch.tensor([p], dtype=torch.float64).log() for p in ([0.5, 0.5], [0.25, 0.75]))
    expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert mutual_learning_loss(own, [peer]).item() == pytest.approx(expected)
    own, peer = random_logits(8, 10), random_logits(8, 10, seed=1)
    p, q = peer.softmax(1), own.softmax(1)
    official = (p * (1e-8 + p / (q + 1e-8)).log()).sum(1).mean()
    torch.testing.assert_close(mutual_learning_loss(own, [peer]), official, rtol=1e-5, atol=0)


def test_mutual_learning_the_other_way_round_stops_at_the_peers_as_well():
    own, peer = (torch.tensor([p], dtype=torch.float64).log() for p in ([0.5, 0.5], [0.25, 0.75]))
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert mutual_learning_loss(own, [peer], target="own").item() == pytest.approx(expected)
    own, *peers = random_heads(3, 3, 5)
    value = mutual_learning_loss(own, peers, target="own", reduction="sum")
    divergences = [
        F.kl_div(x.detach().log_softmax(1), own.softmax(1), reduction="batchmean") for x in peers
    ]
    assert_equal_with_gradients(value, sum(divergences), own)
    assert gradients(value, peers) == (None, None)


def test_gated_ensemble_by_hand():
    branches = torch.tensor([[[1.0, 2.0], [3.0, -4.0]], [[1.0, 2.0], [3.0, -4.0]]])
    gates = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    assert gated_ensemble(branches, gates).tolist() == [[2.5, -2.5], [1.0, 2.0]]


def test_mean_ensemble_by_hand():
    p, q = [0.5, 0.25, 0.25], [0.125, 0.75, 0.125]
    first, second = (torch.tensor([x], dtype=torch.float64).log() for x in (p, q))
    # Probabilities do not feel a shift of the logits; the mean of logits passes it on.
    members = [first + 7, second]
    of_probabilities = mean_ensemble(members).exp()
    torch.testing.assert_close(
        of_probabilities, of_probabilities.new_tensor([[5 / 16, 0.5, 3 / 16]])
    )
    of_logits = mean_ensemble(members, average="logits")
    expected = [7 / 2 + (math.log(a) + math.log(b)) / 2 for a, b in zip(p, q, strict=True)]
    assert of_logits[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_mean_ensemble_counts_every_member_alike(average):
    members = random_heads(3, 4, 5)
    ensemble = mean_ensemble(members, average=average)
    values = [x.softmax(1) for x in members] if average == "probabilities" else members
    mean = torch.stack(values).mean(0)
    torch.testing.assert_close(ensemble, mean.log() if average == "probabilities" else mean)
    torch.testing.assert_close(mean_ensemble(members[::-1], average=average), ensemble)
    # One member, or the same one twice, predicts what it predicts alone.
    for alone in (members[:1], members[:1] * 2):
        torch.testing.assert_close(
            mean_ensemble(alone, average=average).softmax(1), members[0].softmax(1)
        )
    # It is computed in float32, where half precision would lose a member that is sure.
    sure = torch.tensor([[300.0, -300.0]], dtype=torch.float16)
    both = mean_ensemble([sure, -sure], average=average)
    assert both.dtype == torch.float32
    torch.testing.assert_close(both.softmax(1), torch.full((1, 2), 0.5))


def test_one_by_hand():
    # Both branches give logits (ln 3, 0) and (0, ln 3): probabilities 3/4 and 1/4, and reversed.
    # Equal gates make the ensemble uniform; at T = 1 each branch is KL(1/2 || p) away.
    x = math.log(3)
    branches = torch.tensor([[[x, 0.0], [0.0, x]]], dtype=torch.float64)
    gates = torch.full((1, 2), 0.5, dtype=torch.float64)
    parts = one_loss(branches, gates, torch.tensor([0]), temperature=1.0, distill_weight=0.5)
    divergence = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    expected = {
        "cross_entropy": math.log(4 / 3) + math.log(4),
        "ensemble_cross_entropy": math.log(2),
        "distillation": 0.5 * 2 * divergence,
    }
    assert {name: part.item() for name, part in parts.items()} == pytest.approx(expected)


def test_one_teaches_the_gate_by_the_ensemble_alone():
    branches = random_logits(3, 4, 5).requires_grad_()
    gates = random_gates(3, 4)
    parts = one_loss(branches, gates, LABELS)
    of_branches, of_gates = gradients(parts["distillation"], (branches, gates))
    assert of_gates is None
    assert gradients(parts["cross_entropy"], gates) == (None,)
    assert gradients(parts["ensemble_cross_entropy"], gates)[0].abs().max() > 0
    # The ensemble is no way from the distillation to the branches either: p_i - p_e, times T / B.
    ensemble = torch.einsum("bmc,bm->bc", branches, gates)
    closed = (branches / 3).softmax(2) - (ensemble / 3).softmax(1)[:, None]
    torch.testing.assert_close(of_branches, closed * 3 / 3)
    # But it is one for its own cross-entropy: g_i (p_e - y) / B.
    error = ensemble.softmax(1) - F.one_hot(LABELS, 5)
    (of_branches,) = gradients(parts["ensemble_cross_entropy"], branches)
    torch.testing.assert_close(of_branches, gates[:, :, None] * error[:, None] / 3)

    def with_labels(branches, gates):
        parts = one_loss(branches, gates, LABELS, distill_weight=0.0)
        return parts["cross_entropy"] + parts["ensemble_cross_entropy"]

    assert gradcheck(with_labels, (branches, gates))


def test_gaussian_rampup():
    # As in epochs 0, 40 and 80 of 80, and after them.
    values = [gaussian_rampup(epoch / 80) for epoch in (0, 40, 80, 300)]
    assert values == pytest.approx([math.exp(-5), math.exp(-1.25), 1, 1])


@pytest.mark.parametrize("soft", ["kl", "ce"])
@pytest.mark.parametrize("t_square", [False, True])
def test_own_teacher_parts(soft, t_square):
    heads = random_heads(3, 3, 5)
    options = {"alpha": 0.1, "t_square": t_square, "soft": soft, "deepest_weight": 0.9}
    parts = own_teacher_loss(heads, LABELS, **options)
    hard = [F.cross_entropy(head, LABELS) for head in heads]
    assert_equal_with_gradients(parts["deepest_cross_entropy"], 0.9 * hard[2], heads[2])
    assert_equal_with_gradients(parts["cross_entropy"], 0.9 * (hard[0] + hard[1]), heads[:2])
    # The deepest head is the target of the distillation and learns nothing from it.
    target = (heads[2] / 3).softmax(1).detach()
    softened = [(head / 3).log_softmax(1) for head in heads[:2]]
    if soft == "kl":
        distances = [F.kl_div(log_p, target, reduction="batchmean") for log_p in softened]
    else:
        distances = [-(target * log_p).sum(1).mean() for log_p in softened]
    expected = 0.1 * (9 if t_square else 1) * sum(distances)
    assert_equal_with_gradients(parts["distillation"], expected, heads[:2])
    assert gradients(parts["distillation"], heads[2]) == (None,)
    assert gradients(parts["cross_entropy"], heads[2]) == (None,)

    def of_earlier(*earlier):
        return sum(own_teacher_loss([*earlier, heads[2]], LABELS, **options).values())

    assert gradcheck(of_earlier, heads[:2])


def test_own_teacher_defaults_are_recombined_from_torchdistill():
    mid_level = pytest.importorskip("torchdistill.losses.mid_level")
    heads = random_heads(3, 3, 5)
    # The peer's alpha is the weight of the cross-entropy, where BYOT's is that of the divergence.
    peer = mid_level.KDLoss("head", "output", "deepest", "output", temperature=3.0, alpha=0.7)
    expected = F.cross_entropy(heads[2], LABELS) + sum(
        peer({"head": {"output": head}}, {"deepest": {"output": heads[2].detach()}}, LABELS)
        for head in heads[:2]
    )
    assert_equal_with_gradients(sum(own_teacher_loss(heads, LABELS).values()), expected, heads)


# Each loss as a function of two heads of (B, C).
LOSSES = {
    "dml": lambda a, b: mutual_learning_loss(a, [b]),
    "one": lambda a, b: sum(
        one_loss(torch.stack([a, b], 1), torch.full_like(a[:, :2], 0.5), LABELS[: len(a)]).values()
    ),
    "byot": lambda a, b: sum(own_teacher_loss([a, b], LABELS[: len(a)]).values()),
    "byot ce": lambda a, b: sum(own_teacher_loss([a, b], LABELS[: len(a)], soft="ce").values()),
}
EVERY = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@EVERY
def test_an_empty_batch_gives_zero_and_keeps_the_graph(loss):
    assert_empty_batch_gives_zero_and_keeps_the_graph(loss, 5)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(loss, dtype):
    a, b = ((2e4 * random_logits(3, 5, seed=i)).clamp(-6e4, 6e4).to(dtype) for i in range(2))
    a.requires_grad_()
    value = loss(a, b)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(a.float(), b.float()), rtol=0, atol=0)
    (grad,) = gradients(value, a)
    assert value.isfinite() and grad.isfinite().all()


X = torch.zeros(3, 5)
BRANCHES = torch.zeros(3, 2, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(mutual_learning_loss, X, []), "at least one peer, got none"),
        (partial(mutual_learning_loss, X, X), r"got \(3, 5\) and \(5,\)"),
        (partial(mutual_learning_loss, X, [X], reduction="max"), "Unknown reduction 'max'"),
        (partial(mutual_learning_loss, X, [X], target="both"), "Unknown target 'both'"),
        (partial(gated_ensemble, BRANCHES, X), r"got \(3, 2, 5\) and \(3, 5\)"),
        (partial(mean_ensemble, []), "at least one member, got none"),
        (partial(mean_ensemble, [X, X[:, :4]]), r"An ensemble .* got \(3, 5\) and \(3, 4\)"),
        (partial(mean_ensemble, [X[0]]), r"got \(5,\)"),
        (partial(mean_ensemble, [X], average="votes"), "Unknown average 'votes'; use 'prob.*'logi"),
        (partial(one_loss, BRANCHES, X[:, :2], LABELS + 3), "A label is 5, but .* 5 classes"),
        (partial(own_teacher_loss, [X], LABELS), "at least two heads, got 1"),
        (partial(own_teacher_loss, [X, X[:2]], LABELS), r"got \(3, 5\) and \(2, 5\)"),
        (partial(own_teacher_loss, [X, X], LABELS, alpha=3), "from 0 to 1, got 3"),
        (partial(own_teacher_loss, [X, X], LABELS, soft="js"), "Unknown soft loss 'js'"),
    ],
)
def test_errors_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()
