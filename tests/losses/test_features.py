import math
from functools import partial

import pytest
import torch

from sssd.losses.features import (
    activation_boundary_loss,
    attention_loss,
    attention_map,
    factor_loss,
    hint_loss,
    pool_to_smaller,
    self_feature_loss,
    unit_vectors,
)
from tests.losses.properties import (
    assert_empty_batch_gives_zero_and_keeps_the_graph,
    assert_gradient_reaches_the_student_alone,
    random_tensor,
)

LOSSES = [
    *(partial(hint_loss, reduction=r) for r in ("half_channel_sum", "mean", "sum")),
    *(partial(attention_loss, mode=mode, p=p) for mode in ("code", "paper") for p in (1, 2, 3)),
    *(partial(factor_loss, p=p) for p in (1, 2)),
    *(partial(activation_boundary_loss, reduction=r) for r in ("batch_mean", "element_mean")),
    *(partial(self_feature_loss, reduction=r) for r in ("mean", "norm", "sum")),
]
EVERY = pytest.mark.parametrize(
    "loss",
    LOSSES,
    ids=lambda loss: "-".join(map(str, [loss.func.__name__, *loss.args, *loss.keywords.values()])),
)


def row(*values):
    """One image, one channel, one row."""
    return torch.tensor([[[values]]], dtype=torch.float64)


@EVERY
def test_gradient_reaches_the_student_alone(loss):
    student, teacher = random_tensor(2, 3, 2, 3), random_tensor(2, 3, 2, 3, seed=1)
    assert_gradient_reaches_the_student_alone(loss, student, teacher)


@EVERY
def test_equal_features(loss):
    student = random_tensor(2, 3, 2, 3).requires_grad_()
    if loss.func is activation_boundary_loss:
        student = (3 * student).sign().requires_grad_()  # beyond the margin, on the right side
    value = loss(student, student.detach().clone())
    assert value.item() == 0
    (grad,) = torch.autograd.grad(value, student)
    assert grad.abs().max() == 0


@EVERY
def test_an_empty_batch_gives_zero_and_keeps_the_graph(loss):
    assert_empty_batch_gives_zero_and_keeps_the_graph(loss, 3, 2, 2)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(loss, dtype):
    student, teacher = (3e4 * random_tensor(2, 3, 2, 3, seed=i).clamp(-2, 2) for i in range(2))
    student, teacher = student.to(dtype).requires_grad_(), teacher.to(dtype)
    value = loss(student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(student.float(), teacher.float()))
    assert value.isfinite()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(loss(student, teacher), value)


@EVERY
def test_dead_features_have_finite_gradients(loss):
    teacher = random_tensor(2, 3, 2, 2, seed=1)
    for student in (torch.zeros_like(teacher), teacher * torch.tensor([0.0, 1, 1])[:, None, None]):
        (grad,) = torch.autograd.grad(loss(student.requires_grad_(), teacher), student)
        assert grad.abs().max() < 100  # F.normalize has slopes of 1e12 here


def test_hint_by_hand():
    # Squared errors of the two channels: 1, 4 in one cell and 0, 9 in the other.
    student = torch.tensor([[[[1.0, 2.0]], [[2.0, 3.0]]]])
    teacher = torch.tensor([[[[0.0, 2.0]], [[0.0, 0.0]]]])
    assert hint_loss(student, teacher).item() == (5 / 2 + 9 / 2) / 2
    assert hint_loss(student, teacher, reduction="mean").item() == 14 / 4
    assert hint_loss(student, teacher, reduction="sum").item() == 14


def test_ratios_of_the_hint_reductions():
    student, teacher = random_tensor(2, 6, 4, 5), random_tensor(2, 6, 4, 5, seed=1)
    mean = torch.nn.MSELoss()(student, teacher)
    torch.testing.assert_close(hint_loss(student, teacher), 6 / 2 * mean)
    torch.testing.assert_close(hint_loss(student, teacher, reduction="sum"), 2 * 6 * 4 * 5 * mean)


def test_attention_by_hand():
    # The mean squares of the two channels are (4 + 2) / 2 = 3 and (0 + 8) / 2 = 4; norm 5.
    x = torch.tensor([[[[2.0, 0.0]], [[-(2**0.5), 8**0.5]]]], dtype=torch.float64)
    torch.testing.assert_close(attention_map(x), torch.tensor([[0.6, 0.8]], dtype=torch.float64))
    # The mean absolute values of this one are 3 and 4.
    y = torch.tensor([[[[-1.0, 4.0]], [[5.0, -4.0]]]], dtype=torch.float64)
    torch.testing.assert_close(
        attention_map(y, p=1), torch.tensor([[0.6, 0.8]], dtype=torch.float64)
    )
    # Against (1, 0): differences -0.4 and 0.8.
    teacher = row(7.0, 0.0)
    assert attention_loss(x, teacher).item() == pytest.approx((0.16 + 0.64) / 2)
    assert attention_loss(x, teacher, mode="paper").item() == pytest.approx(math.sqrt(0.8))
    # A second image with equal maps halves both.
    x, teacher = torch.cat([x, x]), torch.cat([teacher.expand(1, 2, 1, 2), x])
    assert attention_loss(x, teacher).item() == pytest.approx(0.8 / 4)
    assert attention_loss(x, teacher, mode="paper").item() == pytest.approx(math.sqrt(0.8) / 2)


def test_attention_pools_the_larger_map():
    # Pooled, the student is (1, 2): its squares are (1, 4), those of the teacher (4, 1).
    student, teacher = row(0.0, 2.0, 3.0, 1.0), row(2.0, 1.0)
    expected = (2 * 3**2 / 17) / 2
    assert attention_loss(student, teacher).item() == pytest.approx(expected)
    assert attention_loss(teacher, student).item() == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"student, \(1, 4\), .* teacher, \(1, 2\), .*resize=True"):
        attention_loss(student, teacher, resize=False)
    # Each side to its smaller extent.
    pooled = pool_to_smaller(random_tensor(1, 2, 8, 3), random_tensor(1, 5, 4, 6), "avg")
    assert [x.shape[2:] for x in pooled] == [(4, 3), (4, 3)]


def test_factor_by_hand_and_that_of_repdistiller_is_another():
    # (3, 4) / 5 against (1, 0): differences -0.4 and 0.8.
    assert factor_loss(row(3.0, 4.0), row(2.0, 0.0)).item() == pytest.approx(0.6)
    assert factor_loss(row(3.0, 4.0), row(2.0, 0.0), p=2).item() == pytest.approx(0.4)
    # RepDistiller compares maps of the channels' mean squares, so it does not see that two
    # channels are swapped.
    student = torch.tensor([[[[1.0]], [[0.0]]]], dtype=torch.float64)
    teacher = student.flip(1)
    assert (attention_map(student) - attention_map(teacher)).abs().mean() == 0
    assert factor_loss(student, teacher).item() == 1


def test_activation_boundaries_by_hand():
    # Active: relu(1 - s)^2 is 0 at 2, 0.25 at 0.5, 4 at -1. Not active, with t = 0 among them:
    # relu(1 + s)^2 is 0 at -2, 0.25 at -0.5, 4 at 1.
    student = row(2.0, 0.5, -1.0, -2.0, -0.5, 1.0).expand(2, -1, -1, -1)
    teacher = row(0.1, 5.0, 1.0, -0.1, 0.0, -9.0).expand(2, -1, -1, -1)
    assert activation_boundary_loss(student, teacher).item() == 8.5
    mean = activation_boundary_loss(student, teacher, reduction="element_mean")
    assert mean.item() == pytest.approx(8.5 / 6)
    # With a margin of 2: 0, 2.25, 9 on either side.
    assert activation_boundary_loss(student, teacher, margin=2.0).item() == 22.5


def test_self_feature_by_hand():
    # Squared norms 25 and 144.
    feature = torch.tensor([[3.0, 4.0], [0.0, 12.0]])
    deepest = torch.zeros(2, 2)
    assert self_feature_loss(feature, deepest).item() == 169 / 2
    assert self_feature_loss(feature, deepest, reduction="norm").item() == 13
    assert self_feature_loss(feature, deepest, reduction="sum").item() == 169


def test_unit_vectors_of_any_scale():
    x = torch.tensor([3.0, 4.0])
    for scale in (1e-30, 1.0, 8e37):
        torch.testing.assert_close(unit_vectors(scale * x), torch.tensor([0.6, 0.8]))
        # The squares of the greatest and the least of these do not fit into float32.
        values = scale * torch.tensor([[[[3.0, 4.0]]]]).sqrt()
        torch.testing.assert_close(attention_map(values), torch.tensor([[0.6, 0.8]]))
    assert unit_vectors(0 * x).tolist() == [0, 0]
    assert unit_vectors(math.nan * x).isnan().all()


@pytest.fixture
def peer():
    return pytest.importorskip("torchdistill.losses.mid_level")


def pairs_of(path):
    module = {"path": path, "io": "output"}
    return {"pair": {"student": module, "teacher": module}}


def assert_equal_to_peer(ours, theirs, paths=("m", "m")):
    student = random_tensor(8, 16, 8, 8).requires_grad_()
    teacher = random_tensor(8, 16, 8, 8, seed=1)
    expected = theirs({paths[0]: {"output": student}}, {paths[1]: {"output": teacher}})
    value = ours(student, teacher)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
    grads = [torch.autograd.grad(x, student)[0] for x in (value, expected)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("mode", ["code", "paper"])
def test_attention_equals_torchdistill(peer, mode):
    assert_equal_to_peer(partial(attention_loss, mode=mode), peer.ATLoss(pairs_of("m"), mode=mode))


@pytest.mark.parametrize("margin", [0.5, 1.0])
def test_activation_boundaries_equal_torchdistill(peer, margin):
    assert_equal_to_peer(
        partial(activation_boundary_loss, margin=margin),
        peer.AltActTransferLoss(pairs_of("m"), margin=margin, reduction="mean"),
    )


def test_factor_equals_torchdistill(peer):
    paths = ("translator", "paraphraser")
    assert_equal_to_peer(factor_loss, peer.FTLoss(p=1), paths)
    # The peer's p=2 takes a root for each image: of one image with 36 elements, the square root
    # of 36 times the mean square.
    student, teacher = random_tensor(1, 4, 3, 3).requires_grad_(), random_tensor(1, 4, 3, 3, seed=1)
    io = ({path: {"output": x}} for path, x in zip(paths, (student, teacher), strict=True))
    values = factor_loss(student, teacher, p=2), peer.FTLoss(p=2)(*io).square() / 36
    torch.testing.assert_close(*values, rtol=1e-9, atol=0)
    grads = [torch.autograd.grad(x, student)[0] for x in values]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-15)


def test_errors_name_the_value_and_the_fix():
    x, wide = torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4)
    for loss, fix in (
        (hint_loss, "regressor"),
        (factor_loss, "translator"),
        (activation_boundary_loss, "connector"),
        (self_feature_loss, "bottleneck"),
    ):
        with pytest.raises(ValueError, match=rf"\(2, 3, 4, 4\) and \(2, 5, 4, 4\); .*{fix}"):
            loss(x, wide)
    for loss in (hint_loss, activation_boundary_loss, self_feature_loss):
        with pytest.raises(ValueError, match="Unknown reduction 'all'; use '.*' or '"):
            loss(x, x, reduction="all")
    with pytest.raises(ValueError, match="Unknown mode 'papers'; use 'code' or 'paper'"):
        attention_loss(x, x, mode="papers")
    with pytest.raises(ValueError, match="Unknown p 3; use 1 or 2"):
        factor_loss(x, x, p=3)
    with pytest.raises(ValueError, match=r"must be positive, got 0\.0"):
        activation_boundary_loss(x, x, margin=0.0)
    with pytest.raises(ValueError, match=r"at least 1, got 0\.5"):
        attention_map(x, p=0.5)
    with pytest.raises(ValueError, match=r"four axes .* got the shape \(2, 3\)"):
        attention_map(x[:, :, 0, 0])
    with pytest.raises(ValueError, match="batches of 2 and 1"):
        attention_loss(x, x[:1])
