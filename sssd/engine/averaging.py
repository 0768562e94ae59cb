"""Exponential moving average of the student's weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.engine import HookBase
from torch import Tensor, nn

from .processes import broadcast_buffers

__all__ = [
    "AVERAGED",
    "AveragedWeights",
    "UpdateAverage",
    "evaluate_with_average",
    "with_averaged",
]

AVERAGED = "averaged"  # entry of checkpoints, and prefix of results


class AveragedWeights:
    """The average over iterations of a student's parameters; buffers are the student's own.

    After iteration t (from 0 on) it is ``d * average + (1 - d) * weights``, with
    ``d = min(decay, (1 + t) / (10 + t))``: the weights of the beginning are forgotten sooner (as
    TensorFlow's ExponentialMovingAverage does with a number of updates).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """
        Args:
            model: as it is trained, without DistributedDataParallel around it.
            decay: weight of the past, above 0 and below 1.

        Raises:
            ValueError: the decay is out of its range.
        """
        if not 0 < decay < 1:
            raise ValueError(
                f"MODEL.SSSD.AVERAGING.DECAY must be above 0 and below 1 (0.999, say), or 0 for no "
                f"averaging; it is {decay}."
            )
        self._student = getattr(model, "student", model)
        self._decay = decay
        self._average = {k: p.detach().clone() for k, p in self._student.named_parameters()}

    def restart(self) -> None:
        """From the present weights."""
        self.load_state_dict(dict(self._student.named_parameters()))

    @torch.no_grad()
    def update(self, iteration: int) -> None:
        decay = min(self._decay, (1 + iteration) / (10 + iteration))
        weights = [p.detach() for p in self._student.parameters()]
        torch._foreach_lerp_(list(self._average.values()), weights, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the student has the averaged weights."""
        parameters = dict(self._student.named_parameters())
        weights = {name: p.data for name, p in parameters.items()}
        try:
            for name, p in parameters.items():
                p.data = self._average[name]
            yield
        finally:
            for name, p in parameters.items():
                p.data = weights[name]

    def state_dict(self) -> dict[str, Tensor]:
        """The student's, with the averaged parameters."""
        return {**self._student.state_dict(), **self._average}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, average in self._average.items():
            average.copy_(state[name])


class UpdateAverage(HookBase):
    """Takes every iteration into the average."""

    def __init__(self, averaged: AveragedWeights) -> None:
        self._averaged = averaged

    def before_train(self) -> None:
        if self.trainer.start_iter == 0:
            self._averaged.restart()  # from weights that were loaded

    def after_step(self) -> None:
        self._averaged.update(self.trainer.iter)


def evaluate_with_average(
    model: nn.Module,
    evaluate: Callable[[], dict[str, Any] | None],
    averaged: AveragedWeights | None,
    several: bool = False,
    is_averaged: Callable[[str], bool] = lambda task: True,
) -> dict[str, Any] | None:
    """Evaluates what is saved: the weights, and where there are averaged ones, those as well.

    Args:
        model: as it is trained. Running statistics are each process's own; those of the main one,
            which checkpoints hold, are evaluated by all.
        evaluate: gives task -> figures, or with several datasets name -> task -> figures.
        averaged: of the model.
        several: datasets.
        is_averaged: False for tasks that evaluate more than the student's averaged weights.

    Returns:
        What ``evaluate`` gives, and what it gives of the average under "averaged/<task>".
    """
    broadcast_buffers(model)
    if averaged is None:
        return evaluate()
    # What evaluators write to the disk is of the weights, which come last.
    with averaged.in_place():
        of_average = evaluate()
    results = evaluate()
    return with_averaged(results, of_average, several, is_averaged) if results else results


def with_averaged(
    results: dict[str, Any],
    averaged: dict[str, Any],
    several: bool,
    is_averaged: Callable[[str], bool] = lambda task: True,
) -> dict:
    """Results of the averaged weights beside those of the weights.

    Args:
        results, averaged: task -> figures, or with several datasets name -> task -> figures.
        several: datasets.
        is_averaged: False for tasks of the second that are left out.

    Returns:
        The first with those of the second under "averaged/<task>".
    """
    if several:
        return {
            name: with_averaged(results[name], averaged[name], False, is_averaged)
            for name in results
        }
    kept = {f"{AVERAGED}/{task}": x for task, x in averaged.items() if is_averaged(task)}
    return {**results, **kept}
