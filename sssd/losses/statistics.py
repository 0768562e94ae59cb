"""Distances between statistics of feature maps: channel distributions (NST), layer products (FSP).

Shapes, precision and stopped gradients as in features.py.
"""

import torch
from torch import Tensor

from .divergence import _widen, mean_of, mse
from .features import _check_choice, pool_to_smaller, unit_vectors

__all__ = ["fsp_loss", "fsp_matrix", "mmd_loss"]

# Rounding moves squared distances of unit vectors by about 1e-7 in float32: a Gaussian narrower
# than this would measure the rounding.
_MIN_VARIANCE = 1e-4


def mmd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    kernel: str = "poly",
    degree: int = 2,
    offset: float = 0.0,
) -> Tensor:
    """Neuron selectivity transfer (Huang and Wang, arXiv 1707.01219): MMD^2 between channels.

    The samples of the two distributions are the channels of an image, each a vector over the
    cells, of unit L2 norm: mean k(t, t') + mean k(s, s') - 2 mean k(s, t), then the mean over
    images. The first term is constant; it makes 0 the least value (up to rounding). The official
    code leaves it out; RepDistiller, mdistiller and Knowledge-Distillation-Zoo have it. The
    paper's factor lambda / 2 is the caller's.

    Args:
        student, teacher: (B, C, H, W); the channels may differ, and features of unequal size are
            average-pooled to the smaller height and width.
        kernel: "poly" (x . y + offset)^degree, all that the codes have (RepDistiller weighs it
            by 50); "linear" x . y, which matches the means over the channels; "gaussian"
            ``exp(-|x - y|^2 / (2 v))``. The paper sets v to the mean squared distance of the pairs;
            taking all pairs of a student's and a teacher's channel, per image, as a constant
            without gradient, is our interpretation.
        degree: at least 1, for "poly".
        offset: for "poly".

    Raises:
        ValueError: for an unknown kernel, a degree that is no whole number of at least 1, or maps
            of different images.
    """
    _check_choice("kernel", kernel, ("poly", "linear", "gaussian"))
    if degree != int(degree) or degree < 1:
        raise ValueError(f"The kernel's degree must be a whole number >= 1, got {degree}.")
    student, teacher = pool_to_smaller(student, teacher.detach(), "avg")
    s, t = unit_vectors(student.flatten(2)), unit_vectors(teacher.flatten(2))
    if kernel == "linear":
        # The three terms are a binomial; as a square it needs no C x C products.
        return mse(s.mean(1), t.mean(1), dim=1)

    if kernel == "poly":

        def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
            return (_products(a, b) + offset).pow(int(degree)).mean((1, 2))

    else:
        with torch.no_grad():
            variance = _squared_distances(s, t).mean((1, 2), keepdim=True).clamp(min=_MIN_VARIANCE)

        def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
            return torch.exp(-_squared_distances(a, b) / (2 * variance)).mean((1, 2))

    squared = mean_kernel(t, t) + mean_kernel(s, s) - 2 * mean_kernel(s, t)
    return mean_of(squared)


def fsp_matrix(first: Tensor, last: Tensor, *, pool: str = "max") -> Tensor:
    """Flow of solution procedure between two layers of a network (Yim et al., CVPR 2017).

    The mean over the cells of the products of each channel of one layer with each of the other.

    Args:
        first: (B, m, H, W), the map at the start of a stage.
        last: (B, n, H', W'), the map at its end.
        pool: how maps of unequal size are brought to the smaller height and width: "max" (paper,
            torchdistill) or "avg" (RepDistiller).

    Returns:
        (B, m, n), float32 or wider.

    Raises:
        ValueError: for an unknown pooling, or maps of different images.
    """
    first, last = pool_to_smaller(first, last, pool)
    return _products(first.flatten(2), last.flatten(2)) / (first.shape[2] * first.shape[3])


def fsp_loss(student: Tensor, teacher: Tensor, *, norm: str = "frobenius") -> Tensor:
    """Distance of the FSP matrices of a student and its teacher.

    Args:
        student, teacher: (B, m, n) from :func:`fsp_matrix`. The sizes of the maps behind them may
            differ, the widths may not.
        norm: three losses whose weights are not interchangeable. "frobenius" is the mean over
            images of the squared Frobenius norm (paper); "column_l2" that of the sum of the n
            columns' L2 norms, not squared (torchdistill); "mean_square" the mean squared
            difference over all entries (RepDistiller), 1 / (m n) of the first.

    Raises:
        ValueError: for matrices of unequal shape or an unknown norm.
    """
    _check_choice("norm", norm, ("frobenius", "column_l2", "mean_square"))
    if student.shape != teacher.shape:
        raise ValueError(
            "FSP matrices (images, channels of the first layer, channels of the last) of student "
            f"and teacher must have equal shapes, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}: the channel widths of both layers must match those of the "
            "teacher; choose layers of equal width."
        )
    teacher = teacher.detach()
    if norm == "frobenius":
        return mse(student, teacher, dim=(1, 2))
    if norm == "mean_square":
        return mse(student, teacher)
    norms = torch.linalg.vector_norm(_widen(student) - _widen(teacher), dim=1).sum(1)
    return mean_of(norms)


def _products(a: Tensor, b: Tensor) -> Tensor:
    # Autocast would compute the product of float32 factors in half precision.
    with torch.autocast(a.device.type, enabled=False):
        return torch.bmm(a, b.transpose(1, 2))


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    lengths = a.square().sum(2)[:, :, None] + b.square().sum(2)[:, None, :]
    return lengths - 2 * _products(a, b)
