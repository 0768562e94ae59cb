"""Levels that teacher and distance see at a lower resolution than the student has.

The finest level has three quarters of a pyramid's cells, and with them of the teacher's work.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

__all__ = ["coarsened", "enlarged"]


def coarsened(pyramid: Mapping[str, Tensor], factors: Mapping[str, int]) -> dict[str, Tensor]:
    """Means over squares of cells.

    Args:
        pyramid: level -> (N, C, H, W).
        factors: level -> side of a square in cells, of the levels to return; 1 leaves a map as it
            is. Squares at the far borders may be cut.
    """
    return {
        level: pyramid[level]
        if factor == 1
        else F.avg_pool2d(pyramid[level], factor, ceil_mode=True, count_include_pad=False)
        for level, factor in factors.items()
    }


def enlarged(maps: Mapping[str, Tensor], pyramid: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The maps, interpolated to the size that the pyramid has on their levels."""
    return {
        level: x
        if x.shape == pyramid[level].shape
        else F.interpolate(x, pyramid[level].shape[-2:], mode="bilinear", align_corners=False)
        for level, x in maps.items()
    }
