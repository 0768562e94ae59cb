"""Jensen-Shannon divergence of normalised maps over channels, in few passes over memory.

The function is that of :mod:`sssd.losses.normalisation` followed by
:func:`sssd.losses.js_divergence`. On a CPU, normalisation, softmax, divergence and its gradient are
computed piece by piece, while a piece is in the processor's cache; on a GPU, by kernels of Triton
(:mod:`sssd.losses.fused_triton`).

With m = (p + q) / 2 and d = (p - q) / (p + q), the divergence of two distributions is
``sum p log(p/m) + q log(q/m)`` / 2 with p/m = 1 + d and q/m = 1 - d: two exponentials and two
logarithms for each pair of values, and exactly 0 where p = q.

N: images, C: channels, H, W: height and width of a level.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

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
        pieces = _pieces(student, mask)
        mean, scale = _statistics(student, pieces, across_channels, temperature, eps)
        of_teacher = _statistics(teacher, pieces, across_channels, temperature, eps)
        total = mean.new_zeros(())
        gradient = sums = None
        if ctx.needs_input_grad[0]:
            gradient = _make_map(mask)(student.shape, dtype=mean.dtype)
            sums = mean.new_zeros(2, *mean.shape)
        for piece in pieces:
            x = _logits(student, piece, mean, scale)
            p, q = x.softmax(0), _logits(teacher, piece, *of_teacher).softmax(0)
            of_p, of_q = _logs_to_mean(p, q)
            of_p *= p
            sum_of_p = of_p.sum(0)
            total += (sum_of_p + of_q.mul_(q).sum(0)).sum()
            if gradient is not None:
                # By the logits: p (log(p / m) - sum_c p log(p / m)) / 2.
                by_logits = of_p.addcmul_(p, sum_of_p, value=-1)
                _write(gradient, piece, by_logits)
                sums[0, piece.image, :, 0] += by_logits.sum(1)
                sums[1, piece.image, :, 0] += by_logits.mul_(x).sum(1)
        ctx.save_for_backward(student, gradient, sums, mean, scale)
        ctx.pieces, ctx.across_channels, ctx.temperature = pieces, across_channels, temperature
        ctx.make = _make_map(mask)
        # Rounding can leave a sum of near-equal terms a hair below 0.
        return (total / 2).clamp(min=0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        student, gradient, sums, mean, scale = ctx.saved_tensors
        # Through the normalisation: mean and variance depend on every cell.
        of_gradient, with_logits = _mean_over_cells(sums, ctx.pieces, ctx.across_channels)
        with_logits = with_logits * ctx.temperature**2
        result = ctx.make(student.shape, dtype=student.dtype)
        for piece in ctx.pieces:
            x = _logits(student, piece, mean, scale)
            x = x.mul_(with_logits[piece.image]).add_(of_gradient[piece.image])
            x = torch.sub(_read(gradient, piece), x, out=x).mul_(scale[piece.image])
            _write(result, piece, x.mul_(grad_output / 2))
        return result, None, None, None, None, None


class _Piece(NamedTuple):
    """Cells of an image: a rectangle, or, where that is not their shape, row and column of each."""

    image: int
    rows: slice | Tensor
    columns: slice | Tensor
    num_cells: int


def _pieces(maps: Tensor, mask: Tensor | None) -> list[_Piece]:
    """Cuts (N, C, H, W) maps into pieces; padded cells are in none."""
    num_images, channels, height, width = maps.shape
    size = max(_PIECE // max(channels, 1), 1)
    pieces = []
    for image in range(num_images):
        rows, columns = height, width
        if mask is not None:
            rows, columns = mask[image].any(1).sum().item(), mask[image].any(0).sum().item()
            if not mask[image, :rows, :columns].all():
                cells = zip(*(x.split(size) for x in mask[image].nonzero().unbind(1)), strict=True)
                pieces += [_Piece(image, *indices, len(indices[0])) for indices in cells]
                continue
        step = max(size // max(columns, 1), 1)
        for start in range(0, rows, step):
            end = min(start + step, rows)
            count = (end - start) * columns
            pieces.append(_Piece(image, slice(start, end), slice(columns), count))
    return pieces


def _make_map(mask: Tensor | None) -> Callable[..., Tensor]:
    """Makes a map of which all but the padded cells will be written."""
    return torch.empty if mask is None else torch.zeros


def _read(maps: Tensor, piece: _Piece) -> Tensor:
    """(C, cells); a copy or a view."""
    return maps[piece.image][:, piece.rows, piece.columns].flatten(1)


def _write(maps: Tensor, piece: _Piece, values: Tensor) -> None:
    part = maps[piece.image]
    if isinstance(piece.rows, slice):
        part = part[:, piece.rows, piece.columns]
        part.copy_(values.view_as(part))
    else:
        part[:, piece.rows, piece.columns] = values.to(maps.dtype)


def _logits(maps: Tensor, piece: _Piece, mean: Tensor, scale: Tensor) -> Tensor:
    """(C, cells), float32 or wider: the normalised values of a piece over the temperature."""
    return (_read(maps, piece) - mean[piece.image]).mul_(scale[piece.image])


def _statistics(
    maps: Tensor, pieces: list[_Piece], across_channels: bool, temperature: float, eps: float
) -> tuple[Tensor, Tensor]:
    """(N, C, 1) each, float32 or wider: mean, and the factor that makes logits of the rest."""
    dtype = torch.float64 if maps.dtype == torch.float64 else torch.float32
    sums = torch.zeros(*maps.shape[:2], 1, dtype=dtype)
    for piece in pieces:
        sums[piece.image, :, 0] += _read(maps, piece).sum(1, dtype=dtype)
    mean = _mean_over_cells(sums, pieces, across_channels)
    sums = torch.zeros_like(sums)
    for piece in pieces:
        deviation = _read(maps, piece) - mean[piece.image]
        sums[piece.image, :, 0] += deviation.square_().sum(1)
    variance = _mean_over_cells(sums, pieces, across_channels)
    return mean, (variance + eps).rsqrt_() / temperature


def _mean_over_cells(sums: Tensor, pieces: list[_Piece], across_channels: bool) -> Tensor:
    """Sums (..., N, C, 1) over an image's cells to means over them, or over channels as well."""
    counts = [0] * sums.shape[-3]
    for piece in pieces:
        counts[piece.image] += piece.num_cells
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
