import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from sssd.losses.statistics import fsp_loss, fsp_matrix, mmd_loss
from tests.losses.properties import (
    assert_empty_batch_gives_zero_and_keeps_the_graph,
    assert_gradient_reaches_the_student_alone,
    random_tensor,
)

KERNELS = ["poly", "linear", "gaussian"]
NORMS = ["frobenius", "column_l2", "mean_square"]


def fsp_of_maps(student, teacher, *, norm):
    """The loss on a stage of one map, against itself with the channels in reverse."""
    return fsp_loss(
        fsp_matrix(student, student.flip(1)), fsp_matrix(teacher, teacher.flip(1)), norm=norm
    )


LOSSES = [
    *(pytest.param(partial(mmd_loss, kernel=kernel), id=kernel) for kernel in KERNELS),
    *(pytest.param(partial(fsp_of_maps, norm=norm), id=norm) for norm in NORMS),
]
EVERY = pytest.mark.parametrize("loss", LOSSES)


def maps(*vectors):
    """One image of one row; a channel per vector."""
    return torch.tensor([[[vector] for vector in vectors]], dtype=torch.float64)


@EVERY
def test_gradient_reaches_the_student_alone(loss):
    student, teacher = random_tensor(2, 3, 2, 3), random_tensor(2, 3, 2, 3, seed=1)
    # The variance of the Gaussian is a constant to autograd only.
    numerically = loss.keywords.get("kernel") != "gaussian"
    assert_gradient_reaches_the_student_alone(loss, student, teacher, numerically)


@EVERY
def test_equal_features(loss):
    student = random_tensor(2, 3, 2, 3).requires_grad_()
    value = loss(student, student.detach().clone())
    assert value.item() == pytest.approx(0, abs=1e-15)
    (grad,) = torch.autograd.grad(value, student)
    assert grad.abs().max() < 1e-15


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
    assert value.isfinite()
    torch.testing.assert_close(value, loss(student.double(), teacher.double()).float())
    # Autocast turns the factors of a matrix product into half precision.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(loss(student.float(), teacher.float()), value)


@EVERY
def test_dead_channels_have_finite_gradients(loss):
    teacher = random_tensor(2, 3, 2, 2, seed=1)
    for student in (torch.zeros_like(teacher), teacher * torch.tensor([0.0, 1, 1])[:, None, None]):
        (grad,) = torch.autograd.grad(loss(student.requires_grad_(), teacher), student)
        assert grad.abs().max() < 100  # F.normalize has slopes of 1e12 here


def test_mmd_by_hand():
    # Unit channels s = (1, 0) and t1 = (0, 1), t2 = (1, 0): the products are s.s = 1,
    # t.t = 1, 0, 0, 1 and s.t = 0, 1.
    student, teacher = maps((2, 0)), maps((0, 3), (5, 0))
    for options, expected in [
        ({"kernel": "linear"}, 1 + 1 / 2 - 2 * 1 / 2),
        ({"kernel": "poly"}, 1 + 1 / 2 - 2 * 1 / 2),
        ({"kernel": "poly", "degree": 3, "offset": 1.0}, 8 + (8 + 1) / 2 - 2 * (1 + 8) / 2),
        # Squared distances 2 for a product of 0; the mean over the pairs s, t is 1.
        ({"kernel": "gaussian"}, 1 + (1 + math.exp(-1)) / 2 - 2 * (1 + math.exp(-1)) / 2),
    ]:
        assert mmd_loss(student, teacher, **options).item() == pytest.approx(expected)
    # A second image, at no distance, halves the value.
    both = torch.cat([student, student]), torch.cat([teacher[:, :1], student])
    value = mmd_loss(student, teacher[:, :1]).item()
    assert mmd_loss(*both).item() == pytest.approx(value / 2)


@pytest.mark.parametrize("kernel", KERNELS)
def test_mmd_equals_the_kernels_on_broadcast_pairs(kernel):
    # With memory for B C C HW numbers, as RepDistiller and mdistiller compute the polynomial.
    student = random_tensor(4, 3, 6, 6).requires_grad_()
    teacher = random_tensor(4, 5, 3, 3, seed=1)
    s = F.normalize(F.adaptive_avg_pool2d(student, 3).flatten(2), dim=2)
    t = F.normalize(teacher.flatten(2), dim=2)

    def pairs(a, b):
        return a[:, :, None], b[:, None]

    def squared_distances(a, b):
        a, b = pairs(a, b)
        return (a - b).square().sum(-1)

    variance = squared_distances(s, t).mean((1, 2))[:, None, None].detach()

    def mean_kernel(a, b):
        if kernel == "gaussian":
            return torch.exp(-squared_distances(a, b) / (2 * variance)).mean()
        a, b = pairs(a, b)
        return (a * b).sum(-1).pow(2 if kernel == "poly" else 1).mean()

    expected = mean_kernel(t, t) + mean_kernel(s, s) - 2 * mean_kernel(s, t)
    value = mmd_loss(student, teacher, kernel=kernel)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
    grads = [torch.autograd.grad(x, student)[0] for x in (value, expected)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(mmd_loss(teacher, student, kernel=kernel), value)


@pytest.mark.parametrize("kernel", KERNELS)
def test_mmd_ignores_the_order_and_the_scale_of_channels(kernel):
    teacher = random_tensor(2, 4, 3, 3)
    scale = torch.tensor([0.1, 1.0, 7.0, 1e3])[:, None, None]
    value = mmd_loss((scale * teacher)[:, [2, 0, 3, 1]], teacher, kernel=kernel)
    assert value.item() == pytest.approx(0, abs=1e-14)


def test_gaussian_of_nearly_equal_channels_does_not_measure_the_rounding():
    channel = random_tensor(1, 1, 8, 8).float()
    student = channel.expand(1, 16, 8, 8) * torch.linspace(1, 9, 16)[:, None, None]
    teacher = channel.expand(1, 16, 8, 8) * (1 + 1e-7 * random_tensor(1, 16, 8, 8).float())
    assert abs(mmd_loss(student, teacher, kernel="gaussian").item()) < 1e-2


def test_fsp_matrix_by_hand():
    # The mean over two cells of the products: (1 * 5 + 2 * 6) / 2, and so on.
    matrix = fsp_matrix(maps((1, 2), (3, 4)), maps((5, 6)))
    assert matrix.tolist() == [[[17 / 2], [39 / 2]]]
    # The larger map is pooled: to (2, 4), or to (1.5, 3.5).
    larger, smaller = maps((1, 2, 3, 4)), maps((1, 10))
    assert fsp_matrix(larger, smaller).item() == 42 / 2
    assert fsp_matrix(larger, smaller, pool="avg").item() == 36.5 / 2
    assert fsp_matrix(smaller, larger).item() == 42 / 2


def test_fsp_norms_by_hand():
    # Differences, columns (3, 4) and (0, 12), in the first image; none in the second.
    student = torch.tensor([[[3.0, 0.0], [4.0, 12.0]], [[1.0, 1.0], [1.0, 1.0]]])
    teacher = torch.stack([torch.zeros(2, 2), torch.ones(2, 2)])
    assert fsp_loss(student, teacher).item() == 169 / 2
    assert fsp_loss(student, teacher, norm="column_l2").item() == (5 + 12) / 2
    assert fsp_loss(student, teacher, norm="mean_square").item() == 169 / 8


def test_fsp_equals_torchdistill():
    peer = pytest.importorskip("torchdistill.losses.mid_level")
    first, last = random_tensor(8, 16, 8, 8), random_tensor(8, 32, 4, 4, seed=1)
    features = [first.requires_grad_(), last.requires_grad_()]
    teacher = [random_tensor(8, 16, 8, 8, seed=2), random_tensor(8, 32, 4, 4, seed=3)]
    names = ("student_first", "student_second", "teacher_first", "teacher_second")
    pair = {name: {"path": name[-5:], "io": "output"} for name in names}
    paths = ("first", "econd")
    expected = peer.FSPLoss({"pair": pair})(
        *(
            {path: {"output": x} for path, x in zip(paths, of, strict=True)}
            for of in (features, teacher)
        )
    )
    value = fsp_loss(fsp_matrix(*features), fsp_matrix(*teacher), norm="column_l2")
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
    grads = [torch.autograd.grad(x, features) for x in (value, expected)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-15)


def test_errors_name_the_value_and_the_fix():
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="Unknown kernel 'rbf'; use 'poly' or 'linear' or"):
        mmd_loss(x, x, kernel="rbf")
    for degree in (0, 1.5):
        with pytest.raises(ValueError, match=rf"whole number >= 1, got {degree}"):
            mmd_loss(x, x, degree=degree)
    with pytest.raises(ValueError, match="batches of 2 and 1"):
        mmd_loss(x, x[:1])
    with pytest.raises(ValueError, match="Unknown pool 'min'; use 'max' or 'avg'"):
        fsp_matrix(x, x, pool="min")
    with pytest.raises(ValueError, match="Unknown norm 'l2'"):
        fsp_loss(x[0], x[0], norm="l2")
    matrices = torch.zeros(2, 16, 32), torch.zeros(2, 16, 64)
    with pytest.raises(ValueError, match=r"\(2, 16, 32\) and \(2, 16, 64\): the channel widths of"):
        fsp_loss(*matrices)
