"""GPU version of :mod:`sssd.losses.fused`: the same function as Triton kernels.

The two maps are read once for the statistics, once for the divergence and once more in the backward
pass, which writes the gradient. Only they and a few numbers per channel are kept for it. Nothing
waits for the GPU, and sums are taken in a fixed order: the same input gives the same bits.

Where Triton interprets its kernels (TRITON_INTERPRET=1 when they are imported), they run on the
CPU, slowly.

N: images, C: channels, L: cells of a level, S: parts that the cells of an image are split into.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import triton_kernels as kernels
from .divergence import js_divergence
from .normalisation import instance_norm

__all__ = ["is_supported", "normalised_js_divergence", "works_on"]

# Elements of a program's block; 16 a thread leave it registers for the blocks it derives from it.
_BLOCK, _ELEMENTS_PER_WARP = 4096, 16 * 32
# Fewer neighbouring cells than this would waste most of each access to memory.
_LEAST_CELLS = 4
_MOST_CHANNELS = 2048
# Of the statistics: programs that keep a large GPU busy (more would only write more sums), and
# channels of a block where not the cells but they are neighbours in memory.
_PROGRAMS, _NEIGHBOURS = 2048, 64


def is_supported(student: Tensor) -> bool:
    """Whether :func:`normalised_js_divergence` can run on maps such as ``student``, (N, C, H, W).

    It needs Triton, a GPU on which the kernels work (or, on the CPU, Triton's interpreter), and no
    more than 2048 channels. The first call for a GPU and a precision tries that out.
    """
    if kernels.triton is None or student.dim() != 4 or student.shape[1] > _MOST_CHANNELS:
        return False
    if student.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return False
    if student.is_cuda:
        return works_on(student.device, student.dtype)
    return student.device.type == "cpu" and not isinstance(
        kernels.forward, kernels.triton.JITFunction
    )


@functools.cache
def works_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels compile for a device, and compute there what the eager functions do.

    Drivers, compilers and GPUs are many. Where it is not so, a warning says why.
    """
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 5, 3, 4, generator=generator).to(device, dtype) for _ in range(2)]
    student, teacher = maps[0].requires_grad_(), maps[1]
    try:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            value = normalised_js_divergence(student, teacher)
            normalised = [instance_norm(x) for x in (student, teacher)]
            expected = js_divergence(*normalised, log_base=math.e, reduction="sum")
            (gradient,), (of_expected,) = (
                torch.autograd.grad(x, student) for x in (value, expected)
            )
        torch.testing.assert_close(value, expected, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(gradient, of_expected, atol=1e-2, rtol=1e-2)
    except Exception as error:  # of the compiler, of the driver, or of the comparison
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        warnings.warn(
            f"The Triton kernels of the distance do not work on {device} in {dtype} ({reason}); "
            "the slower functions of torch take their place.",
            stacklevel=2,
        )
        return False
    return True


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
            Contiguous maps and maps in the channels-last format are read as they are.
        teacher: of the same shape, on the same device.
        mask: bool (N, H, W), False on padded cells, which do not count, whatever they hold.
        across_channels: normalise each image as a whole (layer norm), not each channel of it
            (instance norm).
        temperature: of the softmax over the channels.
        eps: is added to the variance.

    Returns:
        Scalar in nats, float32 or wider. For equal maps of one memory format, it and the gradient
        are exactly 0.
    """
    if student.numel() == 0:
        return student.sum(dtype=_wide(student, teacher))
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
        # Copies only where height and width are not one axis in memory.
        student, teacher = student.flatten(2), teacher.flatten(2)
        mask = None if mask is None else mask.flatten(1).view(torch.uint8)
        num_images, channels, num_cells = student.shape
        dims = (2, 3) if across_channels else (2,)  # of (2, N, S, C)

        def of_channels(x: Tensor) -> Tensor:
            return x.squeeze(2).expand(2, num_images, channels).contiguous()

        with torch.cuda.device_of(student):
            count, mean, squares = _moments(student, teacher, mask)
            # The moments of all parts together (Chan, Golub and LeVeque, 1983).
            total = count.sum(dims, keepdim=True).clamp_(min=1)
            overall = (count * mean).sum(dims, keepdim=True) / total
            difference = mean - overall
            squares = (squares + count * difference * difference).sum(dims, keepdim=True)
            mean = of_channels(overall)
            factor = of_channels((squares / total + eps).rsqrt() / temperature)

            options = _options(channels)
            parts = kernels.triton.cdiv(num_cells, options["BLOCK"])
            values = mean.new_empty(num_images, parts)
            sums = mean.new_empty(2, num_images, parts, channels)
            kernels.forward[(parts, num_images)](
                *(_argument(student), _argument(teacher), _argument(mask), mean, factor),
                *(values, sums, channels, num_cells),
                **options,
            )
            sums = of_channels(sums.sum(dims, keepdim=True) / total[0])
            if temperature != 1:  # a normalised value is temperature * logit
                sums[1] *= temperature**2
        ctx.save_for_backward(student, teacher, mask, mean, factor, sums)
        return values.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, mask, mean, factor, sums = ctx.saved_tensors
        num_images, channels, num_cells = student.shape
        gradient = torch.empty_like(student)
        with torch.cuda.device_of(student):
            options = _options(channels)
            kernels.backward[(kernels.triton.cdiv(num_cells, options["BLOCK"]), num_images)](
                *(_argument(student), _argument(teacher), _argument(mask), mean, factor),
                *(sums, grad_output, _argument(gradient), channels, num_cells),
                **options,
            )
        return gradient.reshape(ctx.shape), None, None, None, None, None


def _moments(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    """Of each part of the cells: their count, mean, and sum of squared deviations from it.

    Three times (2, N, S, C), of student and teacher, for maps of (N, C, L).
    """
    num_images, channels, num_cells = student.shape

    def block(maps: Tensor) -> tuple[int, int]:
        neighbours = maps.stride(1) < maps.stride(2)
        together = min(kernels.triton.next_power_of_2(channels), _NEIGHBOURS) if neighbours else 1
        return together, max(_BLOCK // 2 // together, 1)

    together, cells = block(student)
    blocks = kernels.triton.cdiv(num_cells, cells)
    most = kernels.triton.cdiv(_PROGRAMS, num_images * kernels.triton.cdiv(channels, together))
    step = kernels.triton.cdiv(blocks, min(blocks, most)) * cells
    parts = kernels.triton.cdiv(num_cells, step)
    size = (2, 3, num_images, parts, channels)
    moments = student.new_empty(size, dtype=_wide(student, teacher))
    for maps, of_maps in zip((student, teacher), moments, strict=True):
        together, cells = block(maps)
        kernels.moments[(kernels.triton.cdiv(channels, together), parts, num_images)](
            *(_argument(maps), _argument(mask), of_maps, channels, num_cells, step),
            **{"CHANNELS": together, "BLOCK": cells, "num_warps": 4},
        )
    return moments.unbind(1)


def _options(num_channels: int) -> dict[str, Any]:
    """Of the kernels that hold all channels of some cells at once."""
    channels = kernels.triton.next_power_of_2(num_channels)
    cells = max(_BLOCK // channels, _LEAST_CELLS)
    return {
        "CHANNELS": channels,
        "BLOCK": cells,
        "num_warps": max(channels * cells // _ELEMENTS_PER_WARP, 1),
        # A product must not be fused with a sum for one map and not for the other: equal maps
        # would differ in the last digit.
        "enable_fp_fusion": False,
    }


def _wide(student: Tensor, teacher: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32


def _argument(x: Tensor | None) -> tuple[Any, ...] | None:
    return None if x is None else (x, *x.stride())
