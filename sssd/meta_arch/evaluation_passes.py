"""Both passes in evaluation mode, with the ground truth in hand: a diagnostic."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .ground_truth import ground_truth_objects
from .passes import captured_pyramid, replayed_pyramid

__all__ = ["EvaluationPasses", "evaluation_passes"]


class EvaluationPasses(NamedTuple):
    """What a batch gives.

    Attributes:
        image_sizes: (N, 2), height and width of each image without padding.
        pyramid: the student's, all of its levels.
        taught: the teacher's.
        detected: on the student's pyramid.
        detected_from_teacher: by the same heads, on the teacher's.
    """

    image_sizes: Tensor
    pyramid: Mapping[str, Tensor]
    taught: Mapping[str, Tensor]
    detected: Any
    detected_from_teacher: Any


@torch.no_grad()
def evaluation_passes(model: nn.Module, batched_inputs: list[dict[str, Any]]) -> EvaluationPasses:
    """Runs the student, the teacher, and the student's heads on the teacher's pyramid.

    Args:
        model: a SelfDistiller in evaluation mode.
        batched_inputs: as in training, with "instances".
    """
    teacher, student = model.teacher, model.student
    objects = ground_truth_objects(
        batched_inputs, teacher.num_classes, getattr(teacher, "mask_strides", None)
    )
    with captured_pyramid(student.backbone) as pyramid:
        detected = student(batched_inputs)
    taught = teacher(pyramid, objects)
    with replayed_pyramid(student, {**pyramid, **taught}):
        of_teacher = student(batched_inputs)
    return EvaluationPasses(objects.image_sizes, pyramid, taught, detected, of_teacher)
