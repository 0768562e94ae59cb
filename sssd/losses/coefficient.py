"""The distillation coefficient as a function of the iteration.

Schedules are pure functions: resuming at iteration t needs no state and gives the same value. The
share controller is the exception: it follows the losses, so it has a small state of its own.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

__all__ = [
    "SCHEDULES",
    "ShareController",
    "coefficient_schedule",
    "constant_coefficient",
    "cosine_coefficient",
    "linear_coefficient",
    "step_coefficient",
]

SCHEDULES = ("constant", "step", "linear", "cosine", "share")


def constant_coefficient(iteration: int, *, value: float) -> float:
    """The same value at every iteration."""
    return value


def step_coefficient(
    iteration: int, *, values: Sequence[float], milestones: Sequence[int]
) -> float:
    """``values[i]`` where i is the number of milestones that are <= iteration (SSSD, step-wise).

    SSSD switches once, at the iteration at which the learning rate first decays. The first
    iteration with the new value is the milestone itself.
    """
    return values[bisect_right(milestones, iteration)]


def linear_coefficient(iteration: int, *, start: float, end: float, max_iter: int) -> float:
    """A straight line from ``start`` at iteration 0 to ``end`` at ``max_iter``, then constant."""
    progress = min(iteration / max_iter, 1.0)
    return start + (end - start) * progress


def cosine_coefficient(iteration: int, *, start: float, end: float, max_iter: int) -> float:
    """Half a cosine from ``start`` at iteration 0 to ``end`` at ``max_iter``, then constant."""
    progress = min(iteration / max_iter, 1.0)
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def coefficient_schedule(
    name: str, *, values: Sequence[float], milestones: Sequence[int] = (), max_iter: int = 0
) -> Callable[[int], float]:
    """Builds a schedule by name.

    Args:
        name: "constant" (one value), "step" (one value more than milestones), "linear" or
            "cosine" (two values: at iteration 0 and at ``max_iter``).
        values: coefficients, each >= 0.
        milestones: ascending iterations, for "step".
        max_iter: for "linear" and "cosine".

    Raises:
        ValueError: for an unknown name, or values that do not fit it.
    """
    values, milestones = list(values), list(milestones)
    for value in values:
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"A distillation coefficient must be finite and >= 0, got {value}.")

    def expect(count: int, why: str) -> None:
        if len(values) != count:
            raise ValueError(
                f"The {name!r} coefficient schedule needs {count} value(s) ({why}), "
                f"got {len(values)}: {values}."
            )

    if name == "constant":
        expect(1, "the coefficient")
        return partial(constant_coefficient, value=values[0])
    if name == "step":
        if milestones != sorted(set(milestones)):
            raise ValueError(f"The milestones must ascend, got {milestones}.")
        expect(len(milestones) + 1, f"one more than the milestones {milestones}")
        return partial(step_coefficient, values=values, milestones=milestones)
    if name in ("linear", "cosine"):
        expect(2, "at the first iteration and at the last")
        if max_iter < 1:
            raise ValueError(f"The {name!r} schedule needs max_iter >= 1, got {max_iter}.")
        function = linear_coefficient if name == "linear" else cosine_coefficient
        return partial(function, start=values[0], end=values[1], max_iter=max_iter)
    if name == "share":
        raise ValueError("The 'share' schedule follows the losses; make a ShareController for it.")
    raise ValueError(f"Unknown coefficient schedule {name!r}; use one of {', '.join(SCHEDULES)}.")


class ShareController(nn.Module):
    """Holds the share of the distillation term in the total loss at a target.

    With detection losses summing to L and a raw distance D, the term has the share
    ``s = c D / (L + c D)`` at the coefficient ``c = s / (1 - s) * L / D``. L and D are running
    averages, so that one odd batch moves the coefficient little. Only their ratio counts: the
    start from 0 scales both alike, and needs no correction.

    The averages are a buffer: they are saved and restored with the training state. Each update is
    averaged over all processes, so that every process uses the same coefficient.
    """

    def __init__(
        self,
        *,
        share: float,
        momentum: float = 0.98,
        min_coefficient: float = 0.0,
        max_coefficient: float = 1000.0,
    ) -> None:
        """
        Args:
            share: target share, between 0 and 1 (SSSD's calibration finds 0.45 for LGD).
            momentum: weight of the past in the running averages.
            min_coefficient, max_coefficient: bounds on the coefficient.

        Raises:
            ValueError: for a value outside its range.
        """
        super().__init__()
        if not 0 < share < 1:
            raise ValueError(f"The target share must lie between 0 and 1, got {share}.")
        if not 0 <= momentum < 1:
            raise ValueError(f"The momentum must be at least 0 and below 1, got {momentum}.")
        if not 0 <= min_coefficient <= max_coefficient < math.inf:
            raise ValueError(
                "The bounds of the coefficient must be finite, >= 0 and ascend, got "
                f"{min_coefficient} to {max_coefficient}."
            )
        self.share = share
        self.momentum = momentum
        self.bounds = (min_coefficient, max_coefficient)
        self.register_buffer("averages", torch.zeros(2))  # of L and D

    @torch.no_grad()
    def forward(self, detection_loss: Tensor, distance: Tensor) -> Tensor:
        """Takes this iteration's losses into account and returns the coefficient, a scalar.

        Args:
            detection_loss: sum of the detection losses, scalar.
            distance: raw distillation distance, scalar.
        """
        observed = torch.stack([detection_loss.float(), distance.float()])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(observed)
            observed = observed / torch.distributed.get_world_size()
        # A non-finite batch must not spoil the state for good.
        usable = observed.isfinite().all()
        decay = torch.where(usable, self.momentum, 1.0)
        observed = torch.where(usable, observed, torch.zeros_like(observed))
        self.averages.mul_(decay).add_((1 - decay) * observed)
        mean_detection, mean_distance = self.averages
        ratio = mean_detection / mean_distance.clamp(min=1e-12)
        return (self.share / (1 - self.share) * ratio).clamp(*self.bounds)
