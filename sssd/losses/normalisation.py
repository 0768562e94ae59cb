"""Normalisation of maps before they are compared.

N: images, C: channels, H, W: height and width of a level.
"""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["NORMS", "instance_norm", "layer_norm"]


def instance_norm(x: Tensor, mask: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Normalises each channel of each image to zero mean and unit variance over its cells.

    As ``torch.nn.functional.instance_norm``, with two differences that distillation needs: padded
    cells do not count, and a level of a single cell gives 0 where PyTorch raises.

    Args:
        x: (N, C, H, W). Computed in float32 or wider.
        mask: bool (N, H, W), False on padded cells (their output is finite but meaningless).

    Returns:
        (N, C, H, W), float32 or wider.
    """
    return _normalised(x, mask, (2, 3), eps)


def layer_norm(x: Tensor, mask: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Normalises each image to zero mean and unit variance over all channels and cells.

    As GroupNorm with one group and without parameters (LabelEnc's normalisation), except that
    padded cells do not count. Arguments and result as of :func:`instance_norm`.
    """
    return _normalised(x, mask, (1, 2, 3), eps)


def _normalised(x: Tensor, mask: Tensor | None, dim: tuple[int, ...], eps: float) -> Tensor:
    x = x if x.dtype == torch.float64 else x.float()
    if mask is None:
        variance, mean = torch.var_mean(x, dim=dim, correction=0, keepdim=True)
    else:
        mask = mask[:, None].expand_as(x)
        x = x.masked_fill(~mask, 0)
        count = mask.sum(dim=dim, keepdim=True).clamp(min=1)
        mean = x.sum(dim=dim, keepdim=True) / count
        variance = ((x - mean).square() * mask).sum(dim=dim, keepdim=True) / count
    return (x - mean) * torch.rsqrt(variance + eps)


NORMS: dict[str, Callable[..., Tensor]] = {"instance": instance_norm, "layer": layer_norm}
