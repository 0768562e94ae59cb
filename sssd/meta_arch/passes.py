"""Running a stock detector with its pyramid captured, its backbone frozen or its pyramid replayed.

Each context manager changes the student for the length of one call and leaves its module tree,
parameter names and attributes as they were, also after an exception.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from detectron2.structures import Boxes, Instances, RotatedBoxes
from torch import Tensor, nn

__all__ = [
    "AnchorMatching",
    "captured_pyramid",
    "constant_parameters",
    "forked_random_state",
    "frozen",
    "in_evaluation_mode",
    "replaced_attribute",
    "replaced_forward",
    "replayed_pyramid",
]


@contextmanager
def captured_pyramid(backbone: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yields a dict that holds the backbone's maps once the backbone has run.

    Raises:
        TypeError: when the backbone returns something else than a dict of maps.
    """
    captured: dict[str, Tensor] = {}

    def capture(module: nn.Module, inputs: tuple, output: Mapping[str, Tensor]) -> None:
        if not isinstance(output, Mapping):
            raise TypeError(
                f"The backbone {type(module).__name__} returns a {type(output).__name__}; "
                "self-distillation needs one that returns a dict, level name -> map."
            )
        captured.update(output)

    handle = backbone.register_forward_hook(capture)
    try:
        yield captured
    finally:
        handle.remove()


@contextmanager
def replayed_pyramid(student: nn.Module, pyramid: Mapping[str, Tensor]) -> Iterator[None]:
    """The student's backbone answers with ``pyramid``; the rest of the student leaves no trace.

    Pictures are not drawn a second time. What modules count or average while they run (running
    statistics of normalisation layers, the loss normaliser of RetinaNet and FCOS) is as before.
    """
    backbone = student.backbone
    inside = set(backbone.modules())
    heads = [module for module in student.modules() if module not in inside]
    with ExitStack() as stack:
        stack.enter_context(_kept_state(heads))
        stack.enter_context(replaced_forward(backbone, lambda *args, **kwargs: pyramid))
        for module in heads:
            if getattr(module, "vis_period", 0):
                module.vis_period = 0
        yield


class AnchorMatching:
    """Matches anchors with the ground truth once for both passes.

    The two pyramids have the same shapes, so both passes have the same anchors, and matching
    them is a good part of the work of a dense detector. The first pass records what the student's
    matching methods return, the second gets it again (of the RPN with the sample it has drawn).
    A method that is asked with anything but anchors and ground truth, as those that match by
    what the detector predicts, always computes.
    """

    # As Detectron2's detectors and those derived from them call it.
    METHODS = ("label_anchors", "label_and_sample_anchors")

    def __init__(self, student: nn.Module) -> None:
        self._methods = [
            (module, name, getattr(module, name))
            for module in student.modules()
            for name in self.METHODS
            if hasattr(type(module), name)
        ]
        self._recorded: dict[int, list[tuple[list[int], Any]]] = {}

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """For the student's pass."""
        with self._replaced(self._record):
            yield

    @contextmanager
    def answered(self) -> Iterator[None]:
        """For the replayed pass."""
        with self._replaced(self._answer):
            yield

    @contextmanager
    def _replaced(self, call: Callable) -> Iterator[None]:
        with ExitStack() as stack:
            for index, (module, name, method) in enumerate(self._methods):

                def replacement(*args: Any, index: int = index, method=method, **kwargs: Any):
                    return call(index, method, args, kwargs)

                stack.enter_context(replaced_attribute(module, name, replacement))
            yield

    def _record(self, index: int, method: Callable, args: tuple, kwargs: dict) -> Any:
        result = method(*args, **kwargs)
        sizes = _sizes(args, kwargs)
        if sizes is not None:
            self._recorded.setdefault(index, []).append((sizes, result))
        return result

    def _answer(self, index: int, method: Callable, args: tuple, kwargs: dict) -> Any:
        sizes, recorded = _sizes(args, kwargs), self._recorded.get(index)
        if recorded and recorded[0][0] == sizes:
            return recorded.pop(0)[1]
        return method(*args, **kwargs)


def _sizes(args: tuple, kwargs: dict) -> list[int] | None:
    """How many anchors and objects there are; None when it is not just these."""
    sizes = []
    for argument in (*args, *kwargs.values()):
        if not isinstance(argument, Sequence):
            return None
        for item in argument:
            if not isinstance(item, (Boxes, RotatedBoxes, Instances)):
                return None
            sizes.append(len(item))
    return sizes


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
        with in_evaluation_mode(module), torch.no_grad():
            return forward(*args, **kwargs)

    with replaced_forward(module, forward_frozen):
        yield


@contextmanager
def constant_parameters(module: nn.Module, are_constant: bool = True) -> Iterator[None]:
    """Gradients of what ``module`` computes inside reach its inputs, and none of its parameters.

    Outside they are as they were: DistributedDataParallel, which has counted on those that need a
    gradient, gets it from the other pass.
    """
    trained = [p for p in module.parameters() if p.requires_grad] if are_constant else []
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def in_evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every part is in the mode that it was in before."""
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


def forked_random_state(device: torch.device | None = None):
    """Random numbers drawn inside are not missing from torch's stream outside.

    Args:
        device: besides the CPU, the CUDA device whose stream is kept.
    """
    if device is not None and device.type != "cuda":
        device = None
    return torch.random.fork_rng(devices=[] if device is None else [device])


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """``module`` computes ``forward`` instead of its own."""
    with replaced_attribute(module, "forward", forward):
        yield


@contextmanager
def replaced_attribute(owner: object, name: str, value: object) -> Iterator[None]:
    """Sets an attribute of the instance and afterwards puts back what the instance had, if any."""
    missing = object()
    before = vars(owner).get(name, missing)
    vars(owner)[name] = value
    try:
        yield
    finally:
        if before is missing:
            del vars(owner)[name]
        else:
            vars(owner)[name] = before


@contextmanager
def _kept_state(modules: list[nn.Module]) -> Iterator[None]:
    """Attributes and buffers of the modules are afterwards what they were before."""
    attributes = [(m, dict(m.__dict__)) for m in modules]
    buffers = [(m, dict(m._buffers)) for m in modules]
    values = [(b, b.clone()) for _, kept in buffers for b in kept.values() if b is not None]
    try:
        yield
    finally:
        for module, kept in attributes:
            module.__dict__.clear()
            module.__dict__.update(kept)
        for module, kept in buffers:
            module._buffers.clear()
            module._buffers.update(kept)
        for buffer, value in values:
            # Through .data: a normalisation layer's backward has saved its statistics (and does
            # not read them), and an ordinary copy would make autograd refuse it.
            buffer.data.copy_(value)
