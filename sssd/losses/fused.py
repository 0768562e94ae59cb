"""Jensen-Shannon divergence of normalised maps over channels, in few passes over memory.

Normalisation, softmax and divergence of a piece are computed while it is in the processor's cache,
and once more in the backward pass, for which nothing is kept but the two maps. The function is that
of :mod:`sssd.losses.normalisation` followed by :func:`sssd.losses.js_divergence`.

N: images, C: channels, L: cells of a level.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["normalised_js_divergence"]

# Elements of a piece. In float32, its few copies fit into a core's second-level cache; much smaller
# ones are over before torch has called the next function.
_PIECE = 2**18


def normalised_js_divergence(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    across_channels: bool = False,
    temperature: float = 1.0,
    eps: float = 1e-5,
) -> Tensor:
    """Sum over all positions of the divergence between two maps that are normalised first.

    Args:
        student: (N, C, H, W); only it gets a gradient.
        teacher: of the same shape.
        mask: bool (N, H, W), False on padded cells, which do not count, whatever they hold.
        across_channels: normalise each image as a whole (layer norm), not each channel of it
            (instance norm).
        temperature: of the softmax over the channels.
        eps: is added to the variance.

    Returns:
        Scalar in nats, float32 or wider.
    """
    return _NormalisedJS.apply(student, teacher, mask, across_channels, temperature, eps)


class _Statistics(NamedTuple):
    """Of each channel of each image, (N, C, 1); float32 or wider."""

    mean: Tensor
    scale: Tensor  # 1 / standard deviation


class _NormalisedJS(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        mask: Tensor | None,
        across_channels: bool,
        temperature: float,
        eps: float,
    ) -> Tensor:
        ctx.shape = student.shape
        student, teacher = student.flatten(2), teacher.flatten(2)
        padded = None if mask is None else ~mask.flatten(1)
        statistics = [_statistics(x, padded, across_channels, eps) for x in (student, teacher)]
        total = statistics[0].mean.new_zeros(())
        for image, cells in _pieces(student):
            x = _piece(student, padded, image, cells, *statistics[0])
            y = _piece(teacher, padded, image, cells, *statistics[1])
            p, q, log_p_to_mean, ratio = _terms(x, y, temperature)
            # log(q / m) = log(p / m) - log(p / q)
            total += p.mul_(log_p_to_mean).sum() + q.mul_(log_p_to_mean.sub_(ratio)).sum()
        ctx.save_for_backward(student, teacher, padded, *statistics[0], *statistics[1])
        ctx.across_channels, ctx.temperature = across_channels, temperature
        # Rounding can leave a sum of near-equal terms a hair below 0.
        return (total / 2).clamp(min=0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, padded, *statistics = ctx.saved_tensors
        of_student, of_teacher = _Statistics(*statistics[:2]), _Statistics(*statistics[2:])
        # Gradient of the divergence of a position, by its normalised logits x:
        # p (log(p / m) - sum_c p log(p / m)) / (2 T).
        gradient = torch.empty_like(student, dtype=of_student.mean.dtype)
        mean, mean_with_x = (torch.zeros_like(of_student.mean) for _ in range(2))
        for image, cells in _pieces(student):
            x = _piece(student, padded, image, cells, *of_student)
            y = _piece(teacher, padded, image, cells, *of_teacher)
            p, _, log_p_to_mean, _ = _terms(x, y, ctx.temperature)
            log_p_to_mean -= (p * log_p_to_mean).sum(0)
            piece = torch.mul(p, log_p_to_mean, out=p)
            gradient[image, :, cells] = piece
            mean[image, :, 0] += piece.sum(1)
            mean_with_x[image, :, 0] += piece.mul_(x).sum(1)
        # And through the normalisation: mean and variance depend on every cell.
        count = _count(student, padded, ctx.across_channels)
        for total in (mean, mean_with_x):
            if ctx.across_channels:
                total[:] = total.sum(1, keepdim=True)
            total /= count
        scale = of_student.scale * (grad_output / (2 * ctx.temperature))
        for image, cells in _pieces(student):
            x = _piece(student, padded, image, cells, *of_student)
            piece = gradient[image, :, cells]
            piece -= x.mul_(mean_with_x[image]).add_(mean[image])
            piece *= scale[image]
            if padded is not None:
                piece.masked_fill_(padded[image, cells], 0)
        gradient = gradient.reshape(ctx.shape).to(student.dtype)
        return gradient, None, None, None, None, None


def _pieces(maps: Tensor) -> Iterator[tuple[int, slice]]:
    """Image and cells of each piece of (N, C, L) maps."""
    num_images, channels, num_cells = maps.shape
    step = max(_PIECE // max(channels, 1), 1)
    for image in range(num_images):
        for start in range(0, num_cells, step):
            yield image, slice(start, start + step)


def _terms(x: Tensor, y: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p, q, log(p / m) and log(p / q) for the logits of a piece, (C, cells) each."""
    p = F.log_softmax(x / temperature if temperature != 1 else x, dim=0)
    q = F.log_softmax(y / temperature if temperature != 1 else y, dim=0)
    ratio = p - q
    # p / m = 2 p / (p + q) = 2 sigmoid(log p - log q), which is exactly 1 where p = q.
    log_p_to_mean = F.logsigmoid(ratio).add_(math.log(2))
    return p.exp_(), q.exp_(), log_p_to_mean, ratio


def _piece(
    maps: Tensor,
    padded: Tensor | None,
    image: int,
    cells: slice,
    mean: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """A copy of (C, cells), float32 or wider, less the mean and scaled, and 0 in padded cells.

    With zeros on both sides, the distributions there are the same.
    """
    piece = maps[image, :, cells]
    piece = piece.clone() if piece.dtype == torch.float64 else piece.to(torch.float32, copy=True)
    if mean is not None:
        piece.sub_(mean[image])
    if scale is not None:
        piece.mul_(scale[image])
    return piece if padded is None else piece.masked_fill_(padded[image, cells], 0)


def _statistics(
    maps: Tensor, padded: Tensor | None, across_channels: bool, eps: float
) -> _Statistics:
    dtype = torch.float64 if maps.dtype == torch.float64 else torch.float32
    shape = (*maps.shape[:2], 1)
    count = _count(maps, padded, across_channels)

    def mean_over_pieces(function: Callable[[int, slice], Tensor]) -> Tensor:
        """Over all cells, and all channels if these are normalised together."""
        total = torch.zeros(shape, dtype=dtype, device=maps.device)
        for image, cells in _pieces(maps):
            total[image, :, 0] += function(image, cells)
        if across_channels:
            total[:] = total.sum(1, keepdim=True)
        return total.div_(count)

    mean = mean_over_pieces(lambda *at: _piece(maps, padded, *at).sum(1))
    variance = mean_over_pieces(lambda *at: _piece(maps, padded, *at, mean).square_().sum(1))
    return _Statistics(mean, variance.add_(eps).rsqrt_())


def _count(maps: Tensor, padded: Tensor | None, across_channels: bool) -> Tensor | int:
    """Values that a mean is taken over: (N, 1, 1), or one number."""
    channels = maps.shape[1] if across_channels else 1
    if padded is None:
        return max(maps.shape[2] * channels, 1)
    return (~padded).sum(1).clamp(min=1)[:, None, None] * channels
