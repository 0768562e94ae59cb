"""The ground truth of a batch as padded tensors, and where it lies on a feature map.

N: images, M: most objects in an image, H, W: height and width of a level.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

__all__ = ["ObjectBatch", "image_cells", "object_cells", "pad_objects"]


class ObjectBatch(NamedTuple):
    """The labelled objects of N images, padded to M >= 1 objects an image."""

    boxes: Tensor
    """(N, M, 4) float, x1 y1 x2 y2 in pixels of the network's input, within the image."""
    classes: Tensor
    """(N, M) int64. The number of classes itself stands for "no class" (padding, context)."""
    valid: Tensor
    """(N, M) bool, False on padding."""
    image_sizes: Tensor
    """(N, 2) float, height and width of each image in pixels, without batch padding."""

    def to(self, device: torch.device) -> "ObjectBatch":
        return ObjectBatch(*(x.to(device, non_blocking=True) for x in self))

    def with_context_box(self, no_class: int) -> "ObjectBatch":
        """Appends to each image, last, an object that covers all of it and has no class."""
        height, width = self.image_sizes.unbind(1)
        zero = torch.zeros_like(height)
        context = torch.stack([zero, zero, width, height], dim=1)[:, None]
        column = self.classes.new_full((len(height), 1), no_class)
        return ObjectBatch(
            torch.cat([self.boxes, context], dim=1),
            torch.cat([self.classes, column], dim=1),
            torch.cat([self.valid, torch.ones_like(column, dtype=torch.bool)], dim=1),
            self.image_sizes,
        )


def pad_objects(
    boxes: Sequence[Tensor],
    classes: Sequence[Tensor],
    image_sizes: Sequence[tuple[int, int]],
    *,
    num_classes: int,
) -> ObjectBatch:
    """Pads the objects of each image to the most of any image (at least 1).

    Works on whatever device the tensors are on; on the CPU, before one transfer, it costs no
    synchronisation.

    Args:
        boxes: N tensors (objects, 4), x1 y1 x2 y2 in pixels. Clipped to the image.
        classes: N tensors (objects,), in [0, num_classes).
        image_sizes: N pairs (height, width).
        num_classes: the number of classes.

    Raises:
        ValueError: for a class index outside the range, or boxes and classes of unequal number.
    """
    images = zip(boxes, classes, image_sizes, strict=True)
    for index, (image_boxes, image_classes, _) in enumerate(images):
        if len(image_boxes) != len(image_classes):
            raise ValueError(
                f"Image {index} of the batch has {len(image_boxes)} boxes and "
                f"{len(image_classes)} classes; give each box one class."
            )
        unknown = image_classes[(image_classes < 0) | (image_classes >= num_classes)]
        if len(unknown):
            raise ValueError(
                f"Image {index} of the batch has objects of class {unknown.unique().tolist()}, but "
                f"the teacher knows the {num_classes} classes 0 to {num_classes - 1}; set the "
                "class count of the config to that of the dataset."
            )
    counts = torch.tensor([len(b) for b in boxes])
    # At least one slot, so that every parameter of the teacher is used in every batch.
    size = max(int(counts.max()), 1)
    # One more image, full, so that all are padded to the size; dropped after.
    padded_boxes = pad_sequence([*boxes, boxes[0].new_zeros(size, 4)], batch_first=True)[:-1]
    full = classes[0].new_full((size,), num_classes)
    padded_classes = pad_sequence([*classes, full], batch_first=True, padding_value=num_classes)
    sizes = torch.tensor(image_sizes, dtype=padded_boxes.dtype, device=padded_boxes.device)
    limits = sizes.flip(1).repeat(1, 2)[:, None]  # (N, 1, 4): width height width height
    return ObjectBatch(
        boxes=torch.minimum(padded_boxes.clamp(min=0), limits),
        classes=padded_classes[:-1],
        valid=torch.arange(size)[None].lt(counts[:, None]).to(padded_boxes.device),
        image_sizes=sizes,
    )


def object_cells(objects: ObjectBatch, size: tuple[int, int], stride: int) -> Tensor:
    """Which cells of a level belong to which object.

    A cell belongs to a box when its centre lies inside. A box always owns the cell under its own
    centre, so that objects smaller than a cell, down to size zero, are on every level. All cells
    are among the :func:`image_cells`, so that none lies on the padding of the batch.

    Args:
        objects: the batch.
        size: (H, W) of the level.
        stride: pixels per cell.

    Returns:
        bool (N, M, H, W); all False for padding.
    """
    x1, y1, x2, y2 = objects.boxes.unbind(-1)
    height, width = objects.image_sizes[:, None].unbind(-1)
    rows = _cells_along(y1, y2, height, size[0], stride)  # (N, M, H)
    columns = _cells_along(x1, x2, width, size[1], stride)  # (N, M, W)
    cells = rows[..., :, None] & columns[..., None, :]
    return cells & objects.valid[..., None, None]


def image_cells(image_sizes: Tensor, size: tuple[int, int], stride: int) -> Tensor:
    """Which cells of a level lie on the image and not on the padding of the batch.

    Args:
        image_sizes: (N, 2), height and width in pixels.
        size: (H, W) of the level.
        stride: pixels per cell.

    Returns:
        bool (N, H, W); every image owns at least its first cell.
    """
    height, width = image_sizes.unbind(1)
    zero = torch.zeros_like(height)
    rows = _cells_along(zero, height, height, size[0], stride)
    columns = _cells_along(zero, width, width, size[1], stride)
    return rows[:, :, None] & columns[:, None, :]


def _cells_along(low: Tensor, high: Tensor, extent: Tensor, length: int, stride: int) -> Tensor:
    """bool (..., length): cells of an axis with their centre in [low, high], or under its middle.

    When any cell centre lies in the interval, the cell under the middle is among those cells; so
    adding it changes only intervals that would be left without a cell. For one at the far border
    it is the last cell with its centre within ``extent``, the image's size along the axis.
    """
    index = torch.arange(length, device=low.device)
    centre = (index.to(low.dtype) + 0.5) * stride
    inside = (low[..., None] <= centre) & (centre <= high[..., None])
    last = (extent / stride + 0.5).floor().clamp(1, length) - 1
    middle = ((low + high) / (2 * stride)).floor().clamp(min=0).minimum(last)
    return inside | (index == middle[..., None])
