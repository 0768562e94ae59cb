"""The phases of a training run, as functions of the iteration."""

from dataclasses import dataclass

__all__ = ["PUBLISHED_MAX_ITER", "Phases"]

# The schedule for which LGD publishes its phases, and on which SSSD's paper reports.
PUBLISHED_MAX_ITER = 180_000


@dataclass(frozen=True)
class Phases:
    """When the student learns from the teacher, and when its backbone is frozen.

    Iterations count from 0. Being functions of the iteration, phases need no care on resume.
    """

    max_iter: int
    no_distill_iters: int = 0
    """First iterations without a gradient of the distillation term to the student (the adapter
    learns from the first iteration on)."""
    freeze_backbone_iters: int = 0
    """First iterations in which the bottom-up backbone is frozen."""
    distill_off_iters: int = 0
    """Last iterations without a gradient of the distillation term to the student."""

    def __post_init__(self) -> None:
        for name in ("no_distill_iters", "freeze_backbone_iters", "distill_off_iters"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"MODEL.SSSD.PHASES.{name.upper()} must be >= 0, got {getattr(self, name)}."
                )

    @classmethod
    def scaled(
        cls,
        max_iter: int,
        *,
        no_distill_iters: int,
        freeze_backbone_iters: int,
        distill_off_iters: int,
    ) -> "Phases":
        """Phases given for a run of ``PUBLISHED_MAX_ITER``, scaled to one of ``max_iter``."""

        def scale(iterations: int) -> int:
            return round(iterations * max_iter / PUBLISHED_MAX_ITER)

        return cls(
            max_iter=max_iter,
            no_distill_iters=scale(no_distill_iters),
            freeze_backbone_iters=scale(freeze_backbone_iters),
            distill_off_iters=scale(distill_off_iters),
        )

    def distills(self, iteration: int) -> bool:
        """Whether the distillation term sends a gradient to the student."""
        return self.no_distill_iters <= iteration < self.max_iter - self.distill_off_iters

    def freezes_backbone(self, iteration: int) -> bool:
        """Whether the bottom-up backbone is frozen."""
        return iteration < self.freeze_backbone_iters
