"""Self-distillation around a detector that is built already."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from ..losses import ShareController
from .build import build_training_parts
from .phases import Phases
from .self_distiller import SelfDistiller

__all__ = ["distill"]


def distill(
    student: nn.Module,
    *,
    coefficient: Callable[[int], float] | ShareController,
    phases: Phases,
    num_classes: int = 0,
    levels: Sequence[str] = (),
    teacher: nn.Module | Mapping[str, Any] | None = None,
    distance: Mapping[str, Any] | None = None,
    teacher_loss_weight: float = 1.0,
    teacher_trains_heads: bool = True,
    teacher_precision: str = "float32",
    activation_checkpoint: bool = False,
) -> SelfDistiller:
    """Wraps a detector that is already built: for LazyConfig and for training loops of one's own.

    With yacs, ``MODEL.META_ARCHITECTURE: "SelfDistiller"`` does the same.

    Args:
        student: any detector with a ``backbone`` that returns a dict of maps of equal width.
        coefficient: iteration -> weight of the distance (:func:`sssd.losses.coefficient_schedule`),
            or a controller of its share.
        phases: when the student learns from the teacher, and when its backbone is frozen.
        num_classes: classes of the ground truth; 0 for the student's own.
        levels: names of the pyramid levels to distill; empty for all.
        teacher: a teacher that is built already, or options: ``name`` of a registered one
            ("label_encoding"), ``frozen``, and those of that teacher
            (:class:`sssd.teacher.LabelEncodingTeacher`).
        distance: options of :class:`sssd.losses.PyramidDistillation`.
        teacher_loss_weight: factor on the detection losses of the teacher's pass.
        teacher_trains_heads: whether they train the student's heads as well (LGD).
        teacher_precision: "float32", or "bfloat16" for teacher, its pass and the adapter.
        activation_checkpoint: compute what teacher and adapter hold for their gradients twice,
            instead of keeping it.

    Raises:
        ValueError: when the detector cannot be wrapped, with the reason, or an option is unknown.
    """
    parts = build_training_parts(
        student,
        num_classes=num_classes,
        levels=levels,
        teacher=teacher or {},
        distance=distance or {},
    )
    return SelfDistiller(
        student=student,
        **parts,
        coefficient=coefficient,
        phases=phases,
        teacher_loss_weight=teacher_loss_weight,
        teacher_trains_heads=teacher_trains_heads,
        teacher_precision=teacher_precision,
        activation_checkpoint=activation_checkpoint,
    )
