"""The precision of what only training needs: teacher, its pass through the heads, adapter."""

import logging
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

__all__ = ["check_precision", "computing_in"]

# Without float16, whose gradients would need a loss scale that plain training has not.
_DTYPES = {"float32": None, "bfloat16": torch.bfloat16}


def check_precision(name: str) -> None:
    """
    Raises:
        ValueError: for an unknown precision.
    """
    if name not in _DTYPES:
        raise ValueError(
            f"MODEL.SSSD.TEACHER.PRECISION is {name!r}: it has to be one of {', '.join(_DTYPES)}."
        )


def computing_in(name: str, device: torch.device) -> AbstractContextManager:
    """Autocast to a precision; where mixed precision is on already (SOLVER.AMP), that stays.

    Args:
        name: "float32" or "bfloat16".
        device: of the model. Once in a process a warning says if bfloat16 saves it no time.
    """
    if _DTYPES[name] is None or torch.is_autocast_enabled(device.type):
        return nullcontext()
    _warn_if_slow(name, device)
    return torch.autocast(device.type, _DTYPES[name])


@cache
def _warn_if_slow(name: str, device: torch.device) -> None:
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        mkldnn = torch.backends.mkldnn.is_available()
        fast = mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if not fast:
        logging.getLogger(__name__).warning(
            "MODEL.SSSD.TEACHER.PRECISION is %s, for which this %s has no instructions: it is no "
            "faster than float32 there.", name, device.type,
        )  # fmt: skip
