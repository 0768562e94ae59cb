"""From the config to the parts of the SelfDistiller."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from ..losses import PyramidDistillation, ShareController, coefficient_schedule
from ..losses.coefficient import SCHEDULES
from .passes import forked_random_state, in_evaluation_mode
from .phases import PUBLISHED_MAX_ITER, Phases
from .teachers import build_teacher

__all__ = [
    "build_coefficient",
    "build_distiller_parts",
    "build_phases",
    "build_student",
    "build_training_parts",
    "check_calls_backbone",
    "never_calls_backbone",
    "pyramid_of",
    "student_num_classes",
]

logger = logging.getLogger(__name__)


def build_distiller_parts(cfg: CfgNode) -> dict[str, Any]:
    """What a SelfDistiller is made of.

    Raises:
        ValueError: for a value that is wrong, or a detector that cannot be wrapped.
    """
    keys = cfg.MODEL.SSSD
    student = build_student(cfg)
    teacher, distance = _options(keys.TEACHER), _options(keys.DISTANCE)
    how = {
        "teacher_loss_weight": teacher.pop("loss_weight"),
        "teacher_trains_heads": teacher.pop("trains_heads"),
        "teacher_precision": teacher.pop("precision"),
        "activation_checkpoint": teacher.pop("activation_checkpoint"),
    }
    weights = teacher.pop("weights")
    if weights and teacher["name"] != "label_map":
        raise ValueError(
            f"MODEL.SSSD.TEACHER.WEIGHTS is {weights!r}, which is for LabelEnc's second step, and "
            f"MODEL.SSSD.TEACHER.NAME is {teacher['name']!r}: leave it empty."
        )
    if how["activation_checkpoint"] and teacher["name"] == "label_map":
        raise ValueError(
            "MODEL.SSSD.TEACHER.ACTIVATION_CHECKPOINT computes the teacher twice, and that of "
            "MODEL.SSSD.TEACHER.NAME 'label_map' draws at random: set it to False."
        )
    if teacher["name"] != "label_encoding":
        own = _options(keys.get(teacher["name"].upper(), {}))
        teacher = {"name": teacher["name"], "frozen": teacher["frozen"], **own}
    return {
        "student": student,
        **how,
        **build_training_parts(
            student,
            num_classes=keys.NUM_CLASSES,
            levels=keys.LEVELS,
            teacher=teacher,
            distance={"distance": distance.pop("name"), **distance},
        ),
        "coefficient": build_coefficient(cfg),
        "phases": build_phases(cfg),
    }


def _options(keys: CfgNode) -> dict[str, Any]:
    """Config keys as keyword arguments."""
    return {name.lower(): value for name, value in keys.items()}


def build_student(cfg: CfgNode) -> nn.Module:
    """Builds the stock meta-architecture that MODEL.SSSD.STUDENT names.

    Raises:
        ValueError: when no such meta-architecture is registered.
    """
    name = cfg.MODEL.SSSD.STUDENT
    known = sorted(key for key, _ in META_ARCH_REGISTRY if key != "SelfDistiller")
    if name not in known:
        raise ValueError(
            f"MODEL.SSSD.STUDENT is {name!r}, which is not a registered meta-architecture that can "
            f"be a student; use one of {', '.join(known)}, or import the package that registers it."
        )
    return META_ARCH_REGISTRY.get(name)(cfg)


def build_training_parts(
    student: nn.Module,
    *,
    num_classes: int,
    levels: Sequence[str],
    teacher: nn.Module | Mapping[str, Any],
    distance: Mapping[str, Any],
) -> dict[str, nn.Module]:
    """The teacher and the distillation term that fit a detector; see :func:`sssd.distill`.

    Raises:
        ValueError: when the detector cannot be wrapped, or for an option that is wrong.
    """
    channels, strides = pyramid_of(student, levels=list(levels))
    check_calls_backbone(student)
    # The student starts as it would without us: the other parts draw their initial weights from a
    # copy of the random stream.
    with forked_random_state():
        if not isinstance(teacher, nn.Module):
            options = {"name": "label_encoding", "frozen": False, **teacher}
            is_frozen = options.pop("frozen")
            teacher = build_teacher(
                options.pop("name"),
                student,
                num_classes=num_classes or student_num_classes(student),
                channels=channels,
                strides=strides,
                **options,
            ).requires_grad_(not is_frozen)
        return {
            "teacher": teacher,
            "distillation": PyramidDistillation(channels=channels, **distance),
        }


def pyramid_of(student: nn.Module, levels: list[str]) -> tuple[int, dict[str, int]]:
    """Width and strides of the pyramid that the student's backbone gives.

    Args:
        student: the built detector.
        levels: names of the levels to distill; empty for all.

    Returns:
        The number of channels, and level -> pixels per cell from fine to coarse.

    Raises:
        ValueError: when there is no pyramid of equal width with these levels.
    """
    name = type(student).__name__
    backbone = getattr(student, "backbone", None)
    if not hasattr(backbone, "output_shape"):
        raise ValueError(
            f"{name} has no backbone with an output_shape(), so its pyramid is unknown; "
            "MODEL.SSSD.STUDENT must be a detector with a Detectron2 backbone."
        )
    shapes = backbone.output_shape()
    if len(shapes) < 2:
        raise ValueError(
            f"The backbone {type(backbone).__name__} of {name} gives no pyramid, only "
            f"{', '.join(shapes)}; use one that does, such as MODEL.BACKBONE.NAME "
            '"build_resnet_fpn_backbone".'
        )
    unknown = [level for level in levels if level not in shapes]
    if unknown:
        raise ValueError(
            f"MODEL.SSSD.LEVELS names {', '.join(unknown)}, but the backbone gives "
            f"{', '.join(shapes)}."
        )
    chosen = {level: shapes[level] for level in levels or shapes}
    widths = {shape.channels for shape in chosen.values()}
    if len(widths) > 1:
        found = ", ".join(f"{level}: {shape.channels}" for level, shape in chosen.items())
        raise ValueError(
            f"The levels of {type(backbone).__name__} differ in width ({found}), and one teacher "
            "paints all of them; put an FPN on top, or name levels of equal width in "
            "MODEL.SSSD.LEVELS."
        )
    ordered = sorted(chosen.items(), key=lambda item: item[1].stride)
    return widths.pop(), {level: shape.stride for level, shape in ordered}


class _Reached(Exception):
    """The backbone is about to run."""


def check_calls_backbone(student: nn.Module) -> None:
    """Lets the detector look at a small picture, as far as its backbone.

    Raises:
        ValueError: when it detects without calling its backbone.
    """

    def stop(*args) -> None:
        raise _Reached

    channels = getattr(student, "pixel_mean", torch.zeros(3)).numel()
    image = torch.zeros(channels, 64, 64, dtype=torch.uint8)
    handle = student.backbone.register_forward_pre_hook(stop)
    try:
        with in_evaluation_mode(student), torch.no_grad():
            student([{"image": image, "height": 64, "width": 64}])
    except Exception:
        # Reached, or the detector wants other inputs than Detectron2's; then the first iteration
        # will show.
        return
    finally:
        handle.remove()
    raise ValueError(never_calls_backbone(student))


def never_calls_backbone(student: nn.Module) -> str:
    """The sentence for a student that has a backbone and does not use it."""
    return (
        f"{type(student).__name__} does not call its backbone as a module, so there is no pyramid "
        "to distill; MODEL.SSSD.STUDENT must be a detector whose forward calls self.backbone(...)."
    )


def student_num_classes(student: nn.Module) -> int:
    """The class count that the student itself was built with.

    Raises:
        ValueError: when the student keeps it somewhere else.
    """
    for owner in (student, getattr(student, "roi_heads", None), getattr(student, "head", None)):
        count = getattr(owner, "num_classes", None)
        if isinstance(count, int):
            return count
    raise ValueError(
        f"{type(student).__name__} does not say how many classes it has; set "
        "MODEL.SSSD.NUM_CLASSES to the class count of the dataset."
    )


def build_coefficient(cfg: CfgNode) -> Callable[[int], float] | ShareController:
    """The coefficient schedule, or the share controller, that MODEL.SSSD.COEFFICIENT describes."""
    keys = cfg.MODEL.SSSD.COEFFICIENT
    name, values = keys.SCHEDULE, [float(v) for v in keys.VALUES]
    if name not in SCHEDULES:
        raise ValueError(
            f"MODEL.SSSD.COEFFICIENT.SCHEDULE is {name!r}; use one of {', '.join(SCHEDULES)}."
        )
    if name == "share":
        if len(values) != 2 or not 0 <= values[0] < values[1] < math.inf:
            raise ValueError(
                "With the schedule 'share', MODEL.SSSD.COEFFICIENT.VALUES holds the lowest and the "
                f"highest coefficient, got {values}."
            )
        return ShareController(
            share=keys.SHARE, min_coefficient=values[0], max_coefficient=values[1]
        )
    milestones = list(keys.MILESTONES)
    if name == "step" and not milestones:
        milestones = list(cfg.SOLVER.STEPS[:1])
        if not milestones:
            # Without a step in the learning rate there is nothing to switch at.
            values = values[:1]
    return coefficient_schedule(
        name, values=values, milestones=milestones, max_iter=cfg.SOLVER.MAX_ITER
    )


def build_phases(cfg: CfgNode) -> Phases:
    """The phases of MODEL.SSSD.PHASES for a run of SOLVER.MAX_ITER iterations."""
    keys = cfg.MODEL.SSSD.PHASES
    make = Phases.scaled if keys.SCALE_TO_MAX_ITER else Phases
    phases = make(
        max_iter=cfg.SOLVER.MAX_ITER,
        no_distill_iters=keys.NO_DISTILL_ITERS,
        freeze_backbone_iters=keys.FREEZE_BACKBONE_ITERS,
        distill_off_iters=keys.DISTILL_OFF_ITERS,
    )
    missing = []
    if not phases.distills(phases.no_distill_iters):
        missing.append("the distance never trains the student")
    if phases.freezes_backbone(phases.max_iter - 1):
        missing.append("the backbone stays frozen")
    if missing:
        logger.warning(
            "In the %d iterations of this training %s: MODEL.SSSD.PHASES.SCALE_TO_MAX_ITER True "
            "shortens its phases, which are those of a run of %d, in proportion.",
            phases.max_iter,
            " and ".join(missing),
            PUBLISHED_MAX_ITER,
        )
    return phases
