"""Running a stock detector with its pyramid captured, its backbone frozen or its pyramid replayed.

Each context manager changes the student for the length of one call and leaves its module tree,
parameter names and attributes as they were, also after an exception.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["captured_pyramid", "forked_random_state", "frozen", "replayed_pyramid"]


@contextmanager
def captured_pyramid(backbone: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yields a dict that holds the backbone's maps once the backbone has run."""
    captured: dict[str, Tensor] = {}

    def capture(module: nn.Module, inputs: tuple, output: Mapping[str, Tensor]) -> None:
        captured.update(output)

    handle = backbone.register_forward_hook(capture)
    try:
        yield captured
    finally:
        handle.remove()


@contextmanager
def replayed_pyramid(student: nn.Module, pyramid: Mapping[str, Tensor]) -> Iterator[None]:
    """The student's backbone answers with ``pyramid``; the rest of the student leaves no trace.

    Pictures are not drawn a second time, and running statistics of normalisation layers (heads
    may have BatchNorm) stay as they were.
    """
    with ExitStack() as stack:
        stack.enter_context(_replaced_forward(student.backbone, lambda *args, **kwargs: pyramid))
        for module in student.modules():
            if getattr(module, "vis_period", 0):
                stack.enter_context(_attribute(module, "vis_period", 0))
        stack.enter_context(_kept_running_statistics(student))
        yield


@contextmanager
def frozen(module: nn.Module, is_frozen: bool = True) -> Iterator[None]:
    """``module`` computes without a graph and in evaluation mode, so nothing in it moves.

    ``requires_grad`` is not touched: DistributedDataParallel reads it once, when it wraps.
    """
    if not is_frozen:
        yield
        return
    forward = module.forward

    def forward_frozen(*args, **kwargs):
        training = [m for m in module.modules() if m.training]
        for m in training:
            m.training = False
        try:
            with torch.no_grad():
                return forward(*args, **kwargs)
        finally:
            for m in training:
                m.training = True

    with _replaced_forward(module, forward_frozen):
        yield


def forked_random_state(device: torch.device | None = None):
    """Random numbers drawn inside are not missing from torch's stream outside.

    Args:
        device: besides the CPU, the CUDA device whose stream is kept.
    """
    if device is not None and device.type != "cuda":
        device = None
    return torch.random.fork_rng(devices=[] if device is None else [device])


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    with _attribute(module, "forward", forward):
        yield


@contextmanager
def _attribute(module: nn.Module, name: str, value: object) -> Iterator[None]:
    """Sets an attribute of the instance and afterwards puts back what the instance had, if any."""
    missing = object()
    before = module.__dict__.get(name, missing)
    module.__dict__[name] = value
    try:
        yield
    finally:
        if before is missing:
            del module.__dict__[name]
        else:
            module.__dict__[name] = before


@contextmanager
def _kept_running_statistics(module: nn.Module) -> Iterator[None]:
    layers = [
        m
        for m in module.modules()
        if isinstance(m, _NormBase) and m.training and m.track_running_stats
    ]
    kept = [(buffer, buffer.clone()) for m in layers for buffer in m.buffers(recurse=False)]
    try:
        yield
    finally:
        for buffer, value in kept:
            # Through .data: the layer's backward has saved these buffers (and does not read them),
            # and an ordinary copy would make autograd refuse it.
            buffer.data.copy_(value)
