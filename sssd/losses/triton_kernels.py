"""The Triton kernels of :mod:`sssd.losses.fused_triton`.

Maps and masks are tuples of a pointer and the strides of images, channels (not of masks) and cells.
Offsets have 64 bits, for large maps have more than 2^31 elements.

N: images, C: channels, L: cells of a level, S: parts that the cells of an image are split into.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        raise ImportError("Kernels take no tuples before Triton 3.3.")
except ImportError:  # or builds of torch for the CPU, and systems other than Linux
    triton = None

__all__ = ["backward", "forward", "moments", "triton"]


def _kernel(function: Callable[..., Any]) -> Any:
    if triton is None:
        return function
    # These sizes differ from batch to batch. Triton would compile anew for multiples of 16.
    return triton.jit(function, do_not_specialize=["num_cells", "step"])


@_kernel
def _inside(mask, image, cells, end):
    """Which of the cells before ``end`` count."""
    inside = cells < end
    if mask is not None:
        pointers = mask[0] + image * mask[1] + cells.to(tl.int64) * mask[2]
        inside = inside & (tl.load(pointers, mask=inside, other=0) != 0)
    return inside


@_kernel
def _pointers(maps, image, channels, cells):
    of_channels = maps[0] + image * maps[1] + channels.to(tl.int64) * maps[2]
    return of_channels[:, None] + cells.to(tl.int64)[None, :] * maps[3]


@_kernel
def moments(
    maps, mask, result, num_channels, num_cells, step, CHANNELS: tl.constexpr, BLOCK: tl.constexpr
):
    """A program: some channels of one part of an image. Writes ``result``, (3, N, S, C):
    their count of cells, mean, and sum of squared deviations from it."""
    part, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    real = channels < num_channels
    dtype: tl.constexpr = result.dtype.element_ty
    count = tl.full((CHANNELS,), 0.0, dtype)
    mean = tl.full((CHANNELS,), 0.0, dtype)
    squares = tl.full((CHANNELS,), 0.0, dtype)
    start = part * step
    end = tl.minimum(start + step, num_cells)
    # Under NumPy 2.4, the interpreter of Triton 3.6 cannot take these as bounds of a range.
    while start < end:
        cells = start + tl.arange(0, BLOCK)
        inside = _inside(mask, image, cells, end)
        valid = real[:, None] & inside[None, :]
        x = tl.load(_pointers(maps, image, channels, cells), mask=valid, other=0.0).to(dtype)
        more = tl.sum(inside.to(dtype), axis=0)
        its_mean = tl.sum(x, axis=1) / tl.maximum(more, 1.0)
        deviation = tl.where(valid, x - its_mean[:, None], 0.0)
        difference = its_mean - mean
        share = more / tl.maximum(count + more, 1.0)
        # In this order, a difference whose square overflows does no harm to the first block.
        between = difference * (difference * (count * share))
        squares += tl.sum(deviation * deviation, axis=1) + between
        mean += difference * share
        count += more
        start += BLOCK
    plane = tl.num_programs(2).to(tl.int64) * tl.num_programs(1) * num_channels
    result += (image * tl.num_programs(1) + part) * num_channels + channels
    tl.store(result, count, mask=real)
    tl.store(result + plane, mean, mask=real)
    tl.store(result + 2 * plane, squares, mask=real)


@_kernel
def _logits(maps, mean, factor, image, channels, cells, real, valid):
    """(channels, cells) of a map, normalised; 0 in padded cells, where distributions then agree."""
    mean = tl.load(mean, mask=real, other=0.0)[:, None]
    factor = tl.load(factor, mask=real, other=0.0)[:, None]
    x = tl.load(_pointers(maps, image, channels, cells), mask=valid, other=0.0).to(mean.dtype)
    return tl.where(valid, (x - mean) * factor, 0.0)


@_kernel
def _softmax(logits, real):
    logits = tl.where(real[:, None], logits, float("-inf"))
    x = tl.exp(logits - tl.max(logits, axis=0)[None, :])
    return x * (1.0 / tl.sum(x, axis=0))[None, :]


@_kernel
def _log1p(x):
    """log(1 + x) to two units in the last place, for -1 < x < 1.

    The logarithm of what 1 + x is rounded to, plus what the rounding took away: exactly x where
    that is all of it. It takes a compiler that leaves the order of sums alone, as Triton's does.
    """
    rounded = 1.0 + x
    return tl.log(rounded) + (x - (rounded - 1.0))


@_kernel
def _terms(student, teacher, mask, mean, factor, image, channels, cells, num_cells, num_channels):
    """Which elements of a block count, student's logits, p, q, log(p / m), log(q / m)."""
    real = channels < num_channels
    valid = real[:, None] & _inside(mask, image, cells, num_cells)[None, :]
    at = image * num_channels + channels
    x = _logits(student, mean + at, factor + at, image, channels, cells, real, valid)
    at += tl.num_programs(1).to(tl.int64) * num_channels
    y = _logits(teacher, mean + at, factor + at, image, channels, cells, real, valid)
    p = _softmax(x, real)
    q = _softmax(y, real)
    # p / m = 1 + d and q / m = 1 - d. Where p = q, d and all that follows from it is exactly 0.
    # Below 1e-37, both count for nothing, and the quotient may have lost its digits or be 0 / 0.
    total = p + q
    d = (p - q) / tl.where(total < 1e-37, 1.0, total)
    # Next to 1 the logarithm is finite, and unlike tl.clamp, comparisons let NaN through.
    most: tl.constexpr = 1 - 2**-53 if x.dtype == tl.float64 else 1 - 2**-24
    d = tl.where(d > most, most, d)
    d = tl.where(d < -most, -most, d)
    return valid, x, p, q, _log1p(d), _log1p(-d)


@_kernel
def forward(
    student,
    teacher,
    mask,
    mean,  # (2, N, C), as factor
    factor,
    values,  # (N, S): sums of the divergence
    sums,  # (2, N, S, C): sums of g and of g * logit
    num_channels,
    num_cells,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program: all channels of one part of an image.

    g = p (log(p / m) - sum_c p log(p / m)) is twice the gradient of a divergence by its logits.
    """
    part, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channels = tl.arange(0, CHANNELS)
    cells = part * BLOCK + tl.arange(0, BLOCK)
    real = channels < num_channels
    _, x, p, q, log_p_to_mean, log_q_to_mean = _terms(
        student, teacher, mask, mean, factor, image, channels, cells, num_cells, num_channels
    )
    kl = tl.sum(p * log_p_to_mean, axis=0)
    value = tl.sum(kl + tl.sum(q * log_q_to_mean, axis=0), axis=0) * 0.5
    at = image * tl.num_programs(0) + part
    # Rounding can leave a sum of near-equal terms a hair below 0.
    tl.store(values + at, tl.where(value < 0.0, 0.0, value))
    g = p * (log_p_to_mean - kl[None, :])
    sums += at * num_channels + channels
    tl.store(sums, tl.sum(g, axis=1), mask=real)
    sums += tl.num_programs(1).to(tl.int64) * tl.num_programs(0) * num_channels
    tl.store(sums, tl.sum(g * x, axis=1), mask=real)


@_kernel
def backward(
    student,
    teacher,
    mask,
    mean,
    factor,
    sums,  # (2, N, C): what is subtracted from g, as it is and times logit
    grad_output,
    gradient,
    num_channels,
    num_cells,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program: all channels of a block of cells of an image."""
    image = tl.program_id(1).to(tl.int64)
    channels = tl.arange(0, CHANNELS)
    cells = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = channels < num_channels
    valid, x, p, _, log_p_to_mean, _ = _terms(
        student, teacher, mask, mean, factor, image, channels, cells, num_cells, num_channels
    )
    g = p * (log_p_to_mean - tl.sum(p * log_p_to_mean, axis=0)[None, :])
    # Through the normalisation: mean and deviation depend on every cell.
    at = image * num_channels + channels
    scale = tl.load(factor + at, mask=real, other=0.0) * (tl.load(grad_output) * 0.5)
    of_g = tl.load(sums + at, mask=real, other=0.0)
    at += tl.num_programs(1).to(tl.int64) * num_channels
    with_logit = tl.load(sums + at, mask=real, other=0.0)
    g = (g - of_g[:, None] - x * with_logit[:, None]) * scale[:, None]
    tl.store(
        _pointers(gradient, image, channels, cells),
        tl.where(valid, g, 0.0).to(gradient[0].dtype.element_ty),
        mask=real[:, None] & (cells < num_cells)[None, :],
    )
