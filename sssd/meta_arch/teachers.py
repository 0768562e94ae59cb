"""Teachers by name, for MODEL.SSSD.TEACHER.NAME.

A teacher is a module with the attributes ``num_classes`` and ``strides`` (level -> pixels per
cell, of the levels that it teaches, from fine to coarse) and a ``forward(features, objects)`` that
gives a map for each of them, of the shape that the student's has. One that needs the objects' masks
also has ``mask_strides``, the levels on which it wants them (:mod:`sssd.teacher.masks`).
"""

from typing import Any

from fvcore.common.registry import Registry
from torch import nn

from ..teacher import LabelEncodingTeacher
from ..teacher.label_map_encoder import LabelMapTeacher

__all__ = ["TEACHER_REGISTRY", "build_teacher"]

TEACHER_REGISTRY = Registry("SSSD_TEACHER")
TEACHER_REGISTRY.__doc__ = """
Functions that build a teacher for a student that is built already. They are called with the
student and the keywords ``num_classes``, ``channels`` (width of the pyramid), ``strides`` (level ->
pixels per cell), and the options of their own from the config: those under MODEL.SSSD.<NAME>, in
lower case.
"""


@TEACHER_REGISTRY.register()
def label_encoding(
    student: nn.Module, *, num_classes: int, channels: int, strides: dict[str, int], **options: Any
) -> nn.Module:
    """LGD's teacher, which SSSD inherits."""
    return LabelEncodingTeacher(
        num_classes=num_classes, channels=channels, strides=strides, **options
    )


@TEACHER_REGISTRY.register()
def label_map(
    student: nn.Module, *, num_classes: int, channels: int, strides: dict[str, int], **options: Any
) -> nn.Module:
    """LabelEnc's: label maps through a network and an FPN like the student's."""
    return LabelMapTeacher(
        num_classes=num_classes, fpn=student.backbone, levels=list(strides), **options
    )


def build_teacher(name: str, student: nn.Module, **options: Any) -> nn.Module:
    """Builds a registered teacher.

    Raises:
        ValueError: when there is none of that name.
    """
    known = sorted(key for key, _ in TEACHER_REGISTRY)
    if name not in known:
        raise ValueError(
            f"MODEL.SSSD.TEACHER.NAME is {name!r}, which is not a registered teacher; use one of "
            f"{', '.join(known)}, or import the module that registers it."
        )
    return TEACHER_REGISTRY.get(name)(student, **options)
