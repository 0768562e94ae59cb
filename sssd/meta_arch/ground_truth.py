"""Detectron2's training inputs -> the teacher's padded objects."""

from collections.abc import Mapping
from typing import Any

from detectron2.structures import BitMasks, Instances, PolygonMasks
from torch import Tensor

from ..teacher import ObjectBatch, pad_objects
from ..teacher.masks import bitmask_cells, polygon_cells, with_masks

__all__ = ["ground_truth_objects"]

# Detectron2's own mapper drops crowd regions. Mappers that keep them mark them with one of these
# fields (there is no convention in Detectron2 itself).
CROWD_FIELDS = ("gt_iscrowd", "gt_is_crowd", "iscrowd", "is_crowd")


def ground_truth_objects(
    batched_inputs: list[dict[str, Any]],
    num_classes: int,
    mask_strides: Mapping[str, int] | None = None,
) -> ObjectBatch:
    """Collects boxes and classes of a batch, and masks if asked to; crowd regions are left out.

    Args:
        batched_inputs: as Detectron2's DatasetMapper makes them for training.
        num_classes: classes that the teacher knows.
        mask_strides: level -> pixels per cell, of the levels on which the teacher needs masks;
            none for a teacher that takes the boxes.

    Returns:
        ObjectBatch on the device of the ground truth (the CPU, with Detectron2's mapper); with
        ``mask_strides``, :class:`~sssd.teacher.masks.MaskedObjects`.

    Raises:
        KeyError: when an image comes without "instances", or objects without the masks.
        TypeError: when masks are neither polygons nor bitmaps.
        ValueError: when a class is out of range.
    """
    boxes, classes, image_sizes, masks = [], [], [], []
    for inputs in batched_inputs:
        name = inputs.get("file_name", "an image")
        if "instances" not in inputs:
            raise KeyError(
                f"The training input for {name} has no 'instances': "
                "self-distillation encodes the ground truth, so the dataset mapper must keep it "
                "(an image without objects has empty instances)."
            )
        instances = inputs["instances"]
        for field in CROWD_FIELDS:
            if instances.has(field):
                instances = instances[~instances.get(field).bool()]
        boxes.append(instances.gt_boxes.tensor)
        classes.append(instances.gt_classes)
        image_sizes.append(instances.image_size)
        if mask_strides:
            masks.append(_cells_of_masks(instances, name, mask_strides))
    objects = pad_objects(boxes, classes, image_sizes, num_classes=num_classes)
    return with_masks(objects, masks, mask_strides) if mask_strides else objects


def _cells_of_masks(
    instances: Instances, name: str, strides: Mapping[str, int]
) -> dict[str, Tensor]:
    """Level -> bool (objects, rows, columns), the cells in the masks of an image's objects."""
    if not len(instances):
        # Detectron2's mapper gives an image without objects no field for masks.
        return {}
    if not instances.has("gt_masks"):
        raise KeyError(
            f'MODEL.SSSD.TEACHER.REGIONS is "mask", but the objects of {name} have no gt_masks: '
            "Detectron2's mapper keeps masks with MODEL.MASK_ON True only; set that (an R-CNN then "
            "has a mask head; without one, give the data loader "
            'DatasetMapper(cfg, use_instance_mask=True)), or set REGIONS to "box".'
        )
    masks = instances.gt_masks
    if isinstance(masks, PolygonMasks):
        return polygon_cells(masks.polygons, instances.image_size, strides)
    if isinstance(masks, BitMasks):
        return bitmask_cells(masks.tensor, strides)
    raise TypeError(
        f'MODEL.SSSD.TEACHER.REGIONS "mask" cannot read the {type(masks).__name__} of {name}; let '
        "the dataset mapper give PolygonMasks or BitMasks (INPUT.MASK_FORMAT)."
    )
