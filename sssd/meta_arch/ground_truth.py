"""Detectron2's training inputs -> the teacher's padded objects."""

from typing import Any

from ..teacher import ObjectBatch, pad_objects

__all__ = ["ground_truth_objects"]

# Detectron2's own mapper drops crowd regions. Mappers that keep them mark them with one of these
# fields (there is no convention in Detectron2 itself).
CROWD_FIELDS = ("gt_iscrowd", "gt_is_crowd", "iscrowd", "is_crowd")


def ground_truth_objects(batched_inputs: list[dict[str, Any]], num_classes: int) -> ObjectBatch:
    """Collects boxes and classes of a batch; crowd regions are left out.

    Args:
        batched_inputs: as Detectron2's DatasetMapper makes them for training.
        num_classes: classes that the teacher knows.

    Returns:
        ObjectBatch on the device of the ground truth (the CPU, with Detectron2's mapper).

    Raises:
        KeyError: when an image comes without "instances".
        ValueError: when a class is out of range.
    """
    boxes, classes, image_sizes = [], [], []
    for inputs in batched_inputs:
        if "instances" not in inputs:
            raise KeyError(
                f"The training input for {inputs.get('file_name', 'an image')} has no 'instances': "
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
    return pad_objects(boxes, classes, image_sizes, num_classes=num_classes)
