"""What the distance compares: the student's maps, the teacher's, and where they differ.

H, W: height and width of a level, without the cells that are padding.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.structures import Instances
from torch import Tensor

from ..meta_arch import SelfDistiller
from ..meta_arch.evaluation_passes import evaluation_passes
from ..teacher import image_cells

__all__ = ["LevelView", "PyramidView", "view_pyramids"]


@dataclass(frozen=True)
class LevelView:
    """A level of both pyramids; float32 arrays (H, W).

    Attributes:
        student, teacher: root mean square over channels of the maps as the heads see them.
        distance: at each position, that of the training (the root of the Jensen-Shannon
            divergence over the channels for SSSD) between what it compares: the student's maps
            after adapter and normalisation, and the teacher's after normalisation.
    """

    student: np.ndarray
    teacher: np.ndarray
    distance: np.ndarray


@dataclass(frozen=True)
class PyramidView:
    """What one picture gives.

    Attributes:
        levels: from fine to coarse.
        student, teacher: what the heads detect on each pyramid, in pixels of the picture as it
            was before resizing.
        truth: the annotated objects, in pixels of the resized picture.
    """

    levels: Mapping[str, LevelView]
    student: Instances
    teacher: Instances
    truth: Instances


@torch.no_grad()
def view_pyramids(model: SelfDistiller, inputs: Mapping[str, Any]) -> PyramidView:
    """Both pyramids of a picture, and the detections on them.

    Args:
        model: in evaluation mode, with the training parts of its training.
        inputs: of one picture, with "instances": from
            :func:`sssd.evaluation.ground_truth_mapper`.

    Raises:
        RuntimeError: the model is in training mode.
    """
    if model.training:
        raise RuntimeError("view_pyramids needs evaluation mode; call .eval() first.")
    passes = evaluation_passes(model, [inputs])
    taught = passes.taught
    features = {level: passes.pyramid[level] for level in model.teacher.strides}
    masks = {
        level: image_cells(passes.image_sizes, x.shape[-2:], model.teacher.strides[level])
        for level, x in features.items()
    }
    distances = model.training_parts["distillation"].position_distances(features, taught, masks)
    levels = {}
    for level, mask in masks.items():
        height, width = int(mask[0].any(1).sum()), int(mask[0].any(0).sum())

        def crop(x: Tensor, height: int = height, width: int = width) -> np.ndarray:
            return x[0, :height, :width].float().cpu().numpy()

        levels[level] = LevelView(
            crop(_strength(features[level])), crop(_strength(taught[level])), crop(distances[level])
        )
    found, found_by_teacher = (
        detections[0]["instances"] for detections in (passes.detected, passes.detected_from_teacher)
    )
    return PyramidView(levels, found, found_by_teacher, inputs["instances"])


def _strength(maps: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H, W), root mean square over channels."""
    return maps.float().square().mean(1).sqrt()
