"""Jensen-Shannon divergence of normalised maps over channels, in few passes over memory.

The function is that of :mod:`sssd.losses.normalisation` followed by
:func:`sssd.losses.js_divergence`. On a CPU, normalisation, softmax, divergence and its gradient are
computed piece by piece, while a piece is in the processor's cache; on a GPU, by kernels of Triton
(:mod:`sssd.losses.fused_triton`).

With m = (p + q) / 2 and d = (p - q) / (p + q), the divergence of two distributions is
``sum p log(p/m) + q log(q/m)`` / 2 with p/m = 1 + d and q/m = 1 - d: two exponentials and two
logarithms for each pair of values, and exactly 0 where p = q.

N: images, C: channels, L: cells of a level.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["is_supported", "normalised_js_divergence"]

# Elements of a piece. In float32, its few copies fit into a core's second-level cache; much smaller
# ones are over before torch has called the next function.
_PIECE = 2**18


def is_supported(student: Tensor) -> bool:
    """Whether :func:`normalised_js_divergence` can take maps such as ``student``, (N, C, H, W)."""
    if student.is_cuda:
        from . import fused_triton  # (imports Triton, which nobody else needs)

        return fused_triton.is_supported(student)
    return student.device.type == "cpu"


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
        student: (N, C, H, W), of which :func:`is_supported` holds; only it gets a gradient.
        teacher: of the same shape.
        mask: bool (N, H, W), False on padded cells, which do not count, whatever they hold.
        across_channels: normalise each image as a whole (layer norm), not each channel of it
            (instance norm).
        temperature: of the softmax over the channels.
        eps: is added to the variance.

    Returns:
        Scalar in nats, float32 or wider.
    """
    if student.is_cuda:
        from . import fused_triton

        return fused_triton.normalised_js_divergence(
            student,
            teacher,
            mask,
            across_channels=across_channels,
            temperature=temperature,
            eps=eps,
        )
    return _NormalisedJS.apply(student, teacher, mask, across_channels, temperature, eps)


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
        pieces = _pieces(student, mask)
        mean, scale = _statistics(student, pieces, across_channels, temperature, eps)
        of_teacher = _statistics(teacher, pieces, across_channels, temperature, eps)
        total = mean.new_zeros(())
        gradient = sums = None
        if ctx.needs_input_grad[0]:
            gradient = torch.zeros_like(student, dtype=mean.dtype)
            sums = mean.new_zeros(2, *mean.shape)
        for image, cells in pieces:
            x = _logits(student, image, cells, mean, scale)
            p, q = x.softmax(0), _logits(teacher, image, cells, *of_teacher).softmax(0)
            of_p, of_q = _logs_to_mean(p, q)
            of_p *= p
            sum_of_p = of_p.sum(0)
            total += (sum_of_p + of_q.mul_(q).sum(0)).sum()
            if gradient is not None:
                # By the logits: p (log(p / m) - sum_c p log(p / m)) / 2.
                piece = of_p.addcmul_(p, sum_of_p, value=-1)
                gradient[image][:, cells] = piece
                sums[0, image, :, 0] += piece.sum(1)
                sums[1, image, :, 0] += piece.mul_(x).sum(1)
        ctx.save_for_backward(student, gradient, sums, mean, scale)
        ctx.pieces, ctx.across_channels, ctx.temperature = pieces, across_channels, temperature
        # Rounding can leave a sum of near-equal terms a hair below 0.
        return (total / 2).clamp(min=0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        student, gradient, sums, mean, scale = ctx.saved_tensors
        # Through the normalisation: mean and variance depend on every cell.
        of_gradient, with_logits = _mean_over_cells(sums, ctx.pieces, ctx.across_channels)
        with_logits = with_logits * ctx.temperature**2
        result = torch.zeros_like(student)
        for image, cells in ctx.pieces:
            x = _logits(student, image, cells, mean, scale)
            x = x.mul_(with_logits[image]).add_(of_gradient[image])
            x = torch.sub(gradient[image][:, cells], x, out=x).mul_(scale[image])
            result[image][:, cells] = x.mul_(grad_output / 2).to(result.dtype)
        return result.reshape(ctx.shape), None, None, None, None, None


Pieces = list[tuple[int, slice | Tensor]]
"""Image and cells of each piece: a range, or indices where some cells are padded."""


def _pieces(maps: Tensor, mask: Tensor | None) -> Pieces:
    """Cuts the cells of (N, C, L) maps into pieces; padded ones are in none."""
    num_images, channels, num_cells = maps.shape
    step = max(_PIECE // max(channels, 1), 1)
    pieces: Pieces = []
    for image in range(num_images):
        if mask is None or mask[image].all():
            starts = range(0, num_cells, step)
            pieces += [(image, slice(start, min(start + step, num_cells))) for start in starts]
        else:
            cells = mask[image].flatten().nonzero()[:, 0]
            pieces += [(image, part) for part in cells.split(step) if len(part)]
    return pieces


def _count(cells: slice | Tensor) -> int:
    return cells.stop - cells.start if isinstance(cells, slice) else len(cells)


def _logits(maps: Tensor, image: int, cells: slice | Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """(C, cells), float32 or wider: the normalised values of a piece over the temperature."""
    return (maps[image][:, cells] - mean[image]).mul_(scale[image])


def _statistics(
    maps: Tensor, pieces: Pieces, across_channels: bool, temperature: float, eps: float
) -> tuple[Tensor, Tensor]:
    """(N, C, 1) each, float32 or wider: mean, and the factor that makes logits of the rest."""
    dtype = torch.float64 if maps.dtype == torch.float64 else torch.float32
    sums = torch.zeros(*maps.shape[:2], 1, dtype=dtype)
    for image, cells in pieces:
        sums[image, :, 0] += maps[image][:, cells].sum(1, dtype=dtype)
    mean = _mean_over_cells(sums, pieces, across_channels)
    sums = torch.zeros_like(sums)
    for image, cells in pieces:
        sums[image, :, 0] += (maps[image][:, cells] - mean[image]).square_().sum(1)
    variance = _mean_over_cells(sums, pieces, across_channels)
    return mean, (variance + eps).rsqrt_() / temperature


def _mean_over_cells(sums: Tensor, pieces: Pieces, across_channels: bool) -> Tensor:
    """Sums (..., N, C, 1) over an image's cells to means over them, or over channels as well."""
    counts = [0] * sums.shape[-3]
    for image, cells in pieces:
        counts[image] += _count(cells)
    if across_channels:
        sums = sums.mean(-2, keepdim=True).expand_as(sums)
    return sums / sums.new_tensor(counts).clamp(min=1)[:, None, None]


def _logs_to_mean(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """log(p / m) and log(q / m)."""
    # The least numbers keep 0 / 0 at 0, and what is only in one of the two at a finite logarithm.
    finfo = torch.finfo(p.dtype)
    relative = (p - q).div_((p + q).add_(finfo.tiny)).clamp_(finfo.eps - 1, 1 - finfo.eps)
    of_p = relative.log1p()
    return of_p, relative.neg_().log1p_()
