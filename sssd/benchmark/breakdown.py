"""What the time of a training step goes into, from torch's profiler.

The parts are marked from outside, around methods of the model, the backward pass and the optimizer,
for as long as it takes. The backward pass is split by the operators of the forward pass that it
belongs to: the profiler gives both the same number.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from ..meta_arch.passes import replaced_attribute
from .memory import synchronise

__all__ = ["BACKWARD", "PARTS", "marked_parts", "profile_steps", "read_profile"]

FORWARD = ("student forward", "teacher", "replayed pass", "distance")
BACKWARD = "backward"
PARTS = (*FORWARD, BACKWARD, "optimizer", "rest")
"""In the order of a step. "rest" is what is not marked: ground truth, logging, and so on."""

_PREFIX = "sssd.benchmark: "
_STEP = f"{_PREFIX}step"
_NODE = "autograd::engine::evaluate_function: "


def profile_steps(
    step: Callable[[], Any],
    trainer: Any,
    count: int,
    before: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Runs steps under the profiler.

    Args:
        step: runs one.
        trainer: a `sssd.engine.Trainer`.
        count: steps that are measured, after one that is not.
        before: is called before each, and is no part of it.

    Returns:
        What `read_profile` gives.
    """
    device = trainer._trainer.device
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with marked_parts(trainer), profile(activities=activities) as profiler:
        for _ in range(count + 1):
            before()
            with record_function(_STEP):
                step()
    return read_profile(profiler.events())


@contextmanager
def marked_parts(trainer: Any) -> Iterator[None]:
    """Inside, the parts of a step are named ranges of the profiler.

    A part that is called by another one belongs to that. On a GPU, each part waits for it.

    Args:
        trainer: a `sssd.engine.Trainer`.
    """
    mark = _Marker(trainer._trainer.device)
    with ExitStack() as stack:
        for owner, name, part in _marked_methods(trainer.checkpointer.model):
            stack.enter_context(replaced_attribute(owner, name, mark(getattr(owner, name), part)))
        backward = mark(torch.Tensor.backward, BACKWARD)
        optimizer = trainer._trainer.optimizer
        stack.enter_context(
            replaced_attribute(optimizer, "step", mark(optimizer.step, "optimizer"))
        )
        torch.Tensor.backward, unmarked = backward, torch.Tensor.backward
        stack.callback(setattr, torch.Tensor, "backward", unmarked)
        yield


def _marked_methods(model: Any) -> Iterator[tuple[Any, str, str]]:
    """Owner, name and part of each method of a model that makes a part of the step."""
    student, teacher = getattr(model, "student", None), getattr(model, "teacher", None)
    if student is None:
        yield model, "forward", "student forward"
        return
    if teacher is not None:
        yield teacher, "forward", "teacher"
    if hasattr(model, "networks"):  # a classifier's
        for network, terms in zip(model.networks, model.training_parts["terms"], strict=True):
            yield network, "forward", "student forward"
            yield terms, "forward", "distance"
        return
    yield student, "forward", "student forward"
    yield model, "_replay", "replayed pass"
    yield model.training_parts["distillation"], "forward", "distance"


class _Marker:
    """Wraps functions in ranges of the profiler, which never lie in each other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._inside = False

    def __call__(self, function: Callable, part: str) -> Callable:
        def marked(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside = True
            try:
                synchronise(self._device)
                with record_function(_PREFIX + part):
                    result = function(*args, **kwargs)
                    synchronise(self._device)
                return result
            finally:
                self._inside = False

        return marked


def read_profile(events: list[FunctionEvent]) -> dict[str, Any]:
    """Mean times of the marked parts.

    Args:
        events: of the profiler; the first step is left out.

    Returns:
        ``steps``, their number; ``step_seconds``; ``parts``: seconds of each of `PARTS` that
        occurs, which add up to the step; ``backward_of``: seconds of the backward pass by the part
        whose gradient they compute, which add up to "backward" (on a GPU they are split as its
        kernels are).
    """
    on_cpu = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU]
    steps = sorted((e for e in on_cpu if e.name == _STEP), key=lambda e: e.time_range.start)[1:]
    begin, end = steps[0].time_range.start, steps[-1].time_range.end
    measured = [e for e in on_cpu if begin <= e.time_range.start < end]

    total = sum(e.time_range.elapsed_us() for e in steps)
    microseconds: dict[str, float] = defaultdict(float)
    for event in measured:
        if event.name.startswith(_PREFIX) and event.name != _STEP:
            microseconds[event.name.removeprefix(_PREFIX)] += event.time_range.elapsed_us()
    microseconds["rest"] = total - sum(microseconds.values())
    shares = _backward_shares(measured)

    def seconds(value: float) -> float:
        return value / len(steps) / 1e6

    return {
        "steps": len(steps),
        "step_seconds": seconds(total),
        "parts": {part: seconds(microseconds[part]) for part in PARTS if part in microseconds},
        "backward_of": {
            part: seconds(microseconds[BACKWARD] * shares[part])
            for part in (*FORWARD, "rest")
            if part in shares
        },
    }


def _backward_shares(events: list[FunctionEvent]) -> dict[str, float]:
    """Part of the forward pass -> its share of the backward pass."""
    nodes = [e for e in events if e.name.startswith(_NODE)]
    maker: dict[int, FunctionEvent] = {}  # of each node: the last operator that saw its number
    for event in events:
        is_forward = event.sequence_nr >= 0 and not event.name.startswith(_NODE)
        if is_forward and event.scope == 0:
            last = maker.get(event.sequence_nr)
            if last is None or event.time_range.start >= last.time_range.start:
                maker[event.sequence_nr] = event
    on_gpu = any(e.device_time_total for e in nodes)
    time: dict[str, float] = defaultdict(float)
    for node in nodes:
        part = _part_of(maker.get(node.sequence_nr))
        time[part] += node.device_time_total if on_gpu else node.cpu_time_total
    total = sum(time.values())
    return {part: value / total for part, value in time.items()} if total else {}


def _part_of(event: FunctionEvent | None) -> str:
    while event is not None:
        if event.name.startswith(_PREFIX) and event.name != _STEP:
            return event.name.removeprefix(_PREFIX)
        event = event.cpu_parent
    return "rest"
