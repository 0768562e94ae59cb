"""Random weights with which a detector computes as with trained ones: no value runs away.

Recipes start from pretrained weights and freeze their batch normalisation. With random weights the
frozen statistics (mean 0, variance 1) are those of nothing: activations grow from block to block
until the losses are in the hundreds or not finite.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..meta_arch.passes import in_evaluation_mode

__all__ = ["calibrate_normalisation", "without_download"]


def without_download(cfg: CfgNode) -> str:
    """Sets MODEL.WEIGHTS to "" if it is a download.

    Returns:
        The address that was left out, or "".
    """
    address = cfg.MODEL.WEIGHTS
    if not address.startswith(("detectron2://", "http://", "https://")):
        return ""
    cfg.MODEL.WEIGHTS = ""
    return address


@torch.no_grad()
def calibrate_normalisation(detector: nn.Module, batch: list[dict[str, Any]]) -> int:
    """Gives every batch normalisation, frozen or not, the statistics of its own input.

    They are set from layer to layer while a batch passes through the detector in evaluation mode,
    so that each layer sees what the calibrated ones before it make. It draws no random numbers.

    Args:
        detector: in any mode, which stays.
        batch: what the detector takes.

    Returns:
        Number of layers.
    """
    layers = [
        m
        for m in detector.modules()
        if isinstance(m, (FrozenBatchNorm2d, _BatchNorm)) and m.running_mean is not None
    ]
    with _before_each(layers, _take_statistics), in_evaluation_mode(detector):
        if layers:
            detector(batch)
    return len(layers)


def _take_statistics(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    x = inputs[0].float()
    others = [i for i in range(x.dim()) if i != 1]
    variance, mean = torch.var_mean(x, dim=others, correction=0)
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(variance)


@contextmanager
def _before_each(layers: list[nn.Module], hook: Any) -> Iterator[None]:
    handles = [layer.register_forward_pre_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
