"""The distances that are compared: mean squared errors, and Jensen-Shannon distances.

N: images, C: channels, H, W: height and width.
"""

import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses import instance_norm, normalised_js_divergence, pyramid_distance
from ..losses.divergence import stable_root
from ..losses.fused import is_supported
from ..losses.pyramid import count_elements
from .compile import check_compiler
from .jobs import BenchmarkError

__all__ = ["Distance", "Row", "plan_rows"]

LIGER = "liger_kernel.transformers"


class Distance(NamedTuple):
    """A distance of two given maps."""

    leaf: Tensor
    """What gets the gradient."""
    compute: Callable[[], Tensor]
    """Returns a scalar."""


class Row(NamedTuple):
    """A way to compute a distance."""

    name: str
    build: Callable[[Tensor, Tensor, Tensor | None], Distance]
    """Called with the maps (N, C, H, W) of student and teacher and the mask (N, H, W) or None."""


def plan_rows(
    device: str, dtype: torch.dtype, compiles: bool = True
) -> tuple[list[Row], list[str]]:
    """Rows that can run here, the reference first, and sentences about those that cannot.

    Args:
        device: that they run on.
        dtype: of the maps.
        compiles: whether to compile one of them, if that is possible.
    """
    rows = [
        _row("MSE", lambda x, y, mask: F.mse_loss(x.float(), y.float())),
        _row("MSE, normalised", _eager("mse", normalises=True)),
        _row("JS", _eager("js", normalises=False)),
        _row("JS, normalised", _eager("js", normalises=True)),
    ]
    notes = []
    if is_supported(torch.zeros(1, 1, 1, 1, device=device, dtype=dtype)):
        rows.append(_row("JS, normalised, fused", _fused))  # on a GPU, Triton's kernels
    else:
        notes.append("Triton's kernels do not support these maps here.")
    if compiles:
        try:
            check_compiler(torch.device(device))
            compiled = torch.compile(_eager("js", normalises=True), dynamic=False)
            rows.append(_row("JS, normalised, compiled", compiled))
        except BenchmarkError as error:
            notes.append(str(error))
    if not device.startswith("cuda"):
        notes.append("Triton's kernel and liger-kernel's need a GPU.")
        return rows, notes
    if importlib.util.find_spec("liger_kernel") is None:
        notes.append("liger-kernel is not installed.")
    else:
        divergence = importlib.import_module(LIGER).LigerJSD(beta=0.5)
        rows.append(Row("JS, liger-kernel, softmax given", _liger_alone(divergence)))
        rows.append(_row("JS, normalised, liger-kernel", _liger(divergence)))
        notes.append(
            "liger-kernel's distance has neither normalisation, softmax nor root: in the first of "
            "its rows the log-probabilities (N H W, C) are given, in the second torch makes them. "
            "It knows no padding."
        )
    return rows, notes


def _row(name: str, function: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Row:
    def build(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Distance:
        leaf = student.clone().requires_grad_()
        return Distance(leaf, lambda: function(leaf, teacher, mask))

    return Row(name, build)


def _eager(distance: str, normalises: bool) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    def compute(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        if normalises:
            student, teacher = instance_norm(student, mask), instance_norm(teacher, mask)
        masks = None if mask is None else {"p": mask}
        return pyramid_distance({"p": student}, {"p": teacher}, distance=distance, masks=masks)

    return compute


def _fused(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over all elements and root, as :class:`sssd.losses.PyramidDistillation` takes them."""
    nats = normalised_js_divergence(student, teacher, mask)
    return stable_root(nats / math.log(2) / count_elements(student, mask))


def _log_probabilities(maps: Tensor) -> Tensor:
    """One distribution a row: (N H W, C)."""
    return maps.float().permute(0, 2, 3, 1).flatten(0, 2).log_softmax(-1)


def _liger(divergence: Any) -> Callable[..., Tensor]:
    def compute(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        student, teacher = instance_norm(student, mask), instance_norm(teacher, mask)
        value = divergence(_log_probabilities(student), _log_probabilities(teacher))
        return stable_root(value / math.log(2) / student.shape[1])

    return compute


def _liger_alone(divergence: Any) -> Callable[..., Distance]:
    def build(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Distance:
        leaf = _log_probabilities(student).requires_grad_()
        target = _log_probabilities(teacher)
        return Distance(leaf, lambda: divergence(leaf, target))

    return build
