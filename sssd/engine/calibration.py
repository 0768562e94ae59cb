"""The coefficient that gives distillation a chosen share of the total loss.

SSSD (arXiv 2303.05015) measures the share that LGD's distance has at its coefficient 1 after 1000
iterations, 45 %, and looks in [1, 100] for the coefficient with which its own distance has the same
share: 50. Both steps are here, for any config and data.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from detectron2.config import CfgNode
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng

from .hooks import DistillationMetrics, logged_now
from .processes import from_main
from .trainer import Trainer

__all__ = [
    "ShortRun",
    "binary_search",
    "closed_form",
    "coefficient_of_share",
    "lgd_setting",
    "measure",
    "with_coefficient",
]

# What LGD's distance is, in the keys of MODEL.SSSD (configs/LGD).
_LGD = {
    "DISTANCE.NAME": "mse",
    "DISTANCE.LEVEL_REDUCTION": "elements",
    "DISTANCE.LEVEL_WEIGHTS": [],
    "DISTANCE.NORM": "instance",
    "DISTANCE.MASK_PADDING": False,
}
_RUNS = 8  # the most short runs of one search
_BOUNDS = (1e-4, 1e6)  # of a coefficient in closed form


@dataclass(frozen=True)
class ShortRun:
    """What the first iterations of a training have measured.

    Attributes:
        coefficient: of the distance, constant.
        detection: sum of all other losses, by iteration.
        distance: raw, by iteration.
    """

    coefficient: float
    detection: Sequence[float]
    distance: Sequence[float]

    def share_at(self, coefficient: float) -> float:
        """Mean share of the term, were its coefficient another and the losses the same."""
        parts = zip(self.detection, self.distance, strict=True)
        return statistics.mean(coefficient * d / (total + coefficient * d) for total, d in parts)

    @property
    def share(self) -> float:
        """Mean over the iterations of the term's share of the total loss, between 0 and 1."""
        return self.share_at(self.coefficient)


def measure(cfg: CfgNode, coefficient: float, iterations: int) -> ShortRun:
    """Trains for a few iterations from the start, as the whole training would, and keeps nothing.

    Args:
        cfg: of a self-distilled detector.
        coefficient: constant, instead of the config's schedule.
        iterations: of the run.

    Raises:
        ValueError: the config trains no self-distilled detector, or has fewer iterations; or all
            of them were skipped.
    """
    if cfg.MODEL.META_ARCHITECTURE != "SelfDistiller":
        raise ValueError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE!r}: only a SelfDistiller has "
            "a coefficient to calibrate."
        )
    if not 0 < iterations <= cfg.SOLVER.MAX_ITER:
        raise ValueError(
            f"{iterations} iterations cannot be measured: give at least 1 and at most the "
            f"{cfg.SOLVER.MAX_ITER} of SOLVER.MAX_ITER."
        )
    cfg = with_coefficient(cfg, [coefficient], schedule="constant")
    cfg.DATASETS.TEST = ()
    # The same batches and the same weights in every run.
    seed_all_rng((cfg.SEED if cfg.SEED >= 0 else 1) + comm.get_rank())
    trainer = _ShortTrainer(cfg, iterations)
    trainer.resume_or_load(resume=False)
    trainer.train()
    series = from_main(trainer.recorder.series)
    if not series:
        raise ValueError(
            f"No loss of the {iterations} iterations is finite, so all were skipped and none is "
            "measured: lower SOLVER.BASE_LR."
        )
    return ShortRun(coefficient, *map(tuple, zip(*series, strict=True)))


def lgd_setting(cfg: CfgNode) -> CfgNode:
    """The same training with the distance of LGD, whose coefficient is 1."""
    cfg = with_coefficient(cfg, [1.0], schedule="constant")
    for key, value in _LGD.items():
        cfg.merge_from_list([f"MODEL.SSSD.{key}", value])
    return cfg


def with_coefficient(cfg: CfgNode, values: Sequence[float], schedule: str) -> CfgNode:
    """A copy of the config with another coefficient."""
    cfg = cfg.clone()
    cfg.defrost()
    keys = cfg.MODEL.SSSD.COEFFICIENT
    keys.SCHEDULE, keys.VALUES = schedule, list(map(float, values))
    return cfg


def coefficient_of_share(run: ShortRun, share: float) -> float:
    """The coefficient at which the losses of a run would have had a mean share.

    With one detection loss L and one distance D it is ``share / (1 - share) * L / D``.

    Raises:
        ValueError: the share is none, or no coefficient gives it (a distance of 0).
    """
    from scipy.optimize import brentq  # which nothing but studies needs

    check_share(share)
    low, high = _BOUNDS
    if not run.share_at(low) < share < run.share_at(high):
        raise ValueError(
            f"No coefficient between {low:g} and {high:g} gives the distance a share of "
            f"{share:.0%}: in the short run it is {statistics.mean(run.distance):g} on average, "
            f"beside losses of {statistics.mean(run.detection):g}."
        )
    root = brentq(lambda x: run.share_at(math.exp(x)) - share, math.log(low), math.log(high))
    return math.exp(root)


def check_share(share: float) -> None:
    """Raises ValueError for a share that is none."""
    if not 0 < share < 1:
        raise ValueError(f"A share lies between 0 and 1, and {share:g} does not.")


def closed_form(
    cfg: CfgNode, share: float, iterations: int, *, start: float, tolerance: float
) -> Iterator[ShortRun]:
    """Short runs, each with the coefficient that the one before gives, until the share is met.

    One would do if the losses did not depend on the coefficient; the adapter learns by it.

    Args:
        share: to be met.
        start: coefficient of the first run.
        tolerance: difference to the share at which the last run is good enough.

    Raises:
        ValueError: no coefficient gives the share, or so many runs have not found it.
    """
    coefficient = start
    for _ in range(_RUNS):
        run = measure(cfg, coefficient, iterations)
        yield run
        if abs(run.share - share) <= tolerance:
            return
        coefficient = coefficient_of_share(run, share)
    raise _not_found(share, run)


def binary_search(
    cfg: CfgNode,
    share: float,
    iterations: int,
    *,
    bounds: tuple[float, float] = (1.0, 100.0),
    tolerance: float,
) -> Iterator[ShortRun]:
    """The paper's search: short runs with the middle of an interval that is halved each time.

    The middle is that of the logarithm (ours; the paper does not say): as near to a small
    coefficient as to a large one, in proportion.

    Args:
        bounds: the interval at first; the paper's is [1, 100].
        share, tolerance: see :func:`closed_form`.

    Raises:
        ValueError: the share is not to be had within the bounds, or so many runs have not found it.
    """
    check_share(share)
    low, high = bounds
    for _ in range(_RUNS):
        run = measure(cfg, math.sqrt(low * high), iterations)
        yield run
        if abs(run.share - share) <= tolerance:
            return
        if run.share < share:
            low = run.coefficient
        else:
            high = run.coefficient
    if low == bounds[0] or high == bounds[1]:
        raise ValueError(
            f"The share {share:.1%} is not to be had with coefficients from {bounds[0]:g} to "
            f"{bounds[1]:g}: at {run.coefficient:.3g} it is {run.share:.1%}. Search in closed form."
        )
    raise _not_found(share, run)


def _not_found(share: float, run: ShortRun) -> ValueError:
    return ValueError(
        f"{_RUNS} short runs have not met the share {share:.1%}: the last one, with the "
        f"coefficient {run.coefficient:.4g}, has {run.share:.1%}. Measure more iterations."
    )


class _ShortTrainer(Trainer):
    """A trainer that neither writes nor evaluates, and stops early in its schedule."""

    def __init__(self, cfg: CfgNode, iterations: int) -> None:
        super().__init__(cfg)
        self.max_iter = iterations
        self._trainer.save_last_good = None

    def build_hooks(self) -> list[HookBase]:
        self.recorder = _Recorder()
        metrics = DistillationMetrics(self.checkpointer.model)
        return [metrics, hooks.LRScheduler(), self.recorder]

    def resume_or_load(self, resume: bool = False) -> None:
        # No run of OUTPUT_DIR is set aside, as `Trainer` does before a new one.
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=False)


class _Recorder(HookBase):
    """Keeps detection losses and distance of each iteration, on the main process."""

    def __init__(self) -> None:
        self.series: list[tuple[float, float]] = []

    def after_step(self) -> None:
        logged = logged_now(self.trainer)
        if "total_loss" in logged:
            detection = logged["total_loss"] - logged["loss_distill"]
            self.series.append((detection, logged["loss_distill/distance"]))
