"""Masks instead of boxes as the places of the objects: their cells on the levels of a pyramid.

Masks are sampled at the centres of a level's cells and nowhere else, so that memory grows with
objects times cells, and never with objects times pixels.

N: images, M: most objects in an image, K: objects of one image, V: edges of all their polygons,
H, W: height and width of a level, H', W': cells that the largest image of the batch needs on it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .objects import ObjectBatch, image_cells, object_cells

__all__ = ["MaskedObjects", "bitmask_cells", "mask_cells", "polygon_cells", "with_masks"]


class MaskedObjects(ObjectBatch):
    """An ObjectBatch whose objects have masks as well.

    A subclass and not one more field: to all who want boxes and classes it is the tuple of four
    tensors that it was.
    """

    masks: dict[str, Tensor]
    """Level -> bool (N, M, H', W'): cells with their centre in the mask. False on padding."""

    def __new__(cls, objects: ObjectBatch, masks: Mapping[str, Tensor]) -> "MaskedObjects":
        self = super().__new__(cls, *objects)
        self.masks = dict(masks)
        return self

    def __getnewargs__(self) -> tuple[ObjectBatch, dict[str, Tensor]]:
        return ObjectBatch(*self), self.masks

    def _replace(self, **fields: Any) -> "MaskedObjects":
        masks = fields.pop("masks", self.masks)
        return MaskedObjects(ObjectBatch(*self)._replace(**fields), masks)

    def to(self, device: torch.device) -> "MaskedObjects":
        masks = {level: x.to(device, non_blocking=True) for level, x in self.masks.items()}
        return MaskedObjects(super().to(device), masks)

    def with_context_box(self, no_class: int) -> "MaskedObjects":
        """Appends to each image, last, an object that covers all of it and has no class."""
        # True beyond the image as well: mask_cells() leaves that out.
        masks = {level: F.pad(x, (0, 0, 0, 0, 0, 1), value=True) for level, x in self.masks.items()}
        return MaskedObjects(super().with_context_box(no_class), masks)


def with_masks(
    objects: ObjectBatch, masks: Sequence[Mapping[str, Tensor]], strides: Mapping[str, int]
) -> MaskedObjects:
    """Adds the masks of each image's objects, padded to those of the batch.

    Args:
        objects: the batch.
        masks: for each image, level -> bool (K, rows, columns), from :func:`polygon_cells` or
            :func:`bitmask_cells`; may be empty for an image without objects.
        strides: level -> pixels per cell.
    """
    extent = objects.image_sizes.amax(dim=0).tolist()
    padded = {}
    for level, stride in strides.items():
        size = tuple(_cell_count(pixels, stride) for pixels in extent)
        padded[level] = objects.valid.new_zeros(*objects.valid.shape, *size)
        for index, of_image in enumerate(masks):
            if level in of_image:
                count, height, width = of_image[level].shape
                padded[level][index, :count, :height, :width] = of_image[level]
    return MaskedObjects(objects, padded)


def mask_cells(objects: ObjectBatch, level: str, size: tuple[int, int], stride: int) -> Tensor:
    """Which cells of a level belong to which object, by its mask.

    The rules are those of :func:`sssd.teacher.objects.object_cells`: a cell belongs to an object
    when its centre lies inside; an object whose mask holds no centre owns the cell under the centre
    of its box; no cell lies on the padding of the batch.

    Args:
        objects: the batch, with masks for this level.
        level: name of the level.
        size: (H, W) of the level.
        stride: pixels per cell.

    Returns:
        bool (N, M, H, W); all False for padding.

    Raises:
        ValueError: when the objects have no masks for the level.
    """
    masks = objects.masks.get(level) if isinstance(objects, MaskedObjects) else None
    if masks is None:
        raise ValueError(
            f"The teacher's regions are masks, but its objects have none for the level {level}; "
            "add them with sssd.teacher.masks.with_masks, or take the regions 'box'."
        )
    # A negative number cuts off.
    cells = F.pad(masks, (0, size[1] - masks.shape[3], 0, size[0] - masks.shape[2]), value=False)
    on_image = image_cells(objects.image_sizes, size, stride)[:, None]
    cells = cells & on_image & objects.valid[..., None, None]
    middle = (objects.boxes[..., :2] + objects.boxes[..., 2:]) / 2
    # Of a box without extent, exactly one cell.
    under = ObjectBatch(*objects)._replace(boxes=torch.cat([middle, middle], dim=-1))
    is_empty = ~cells.flatten(2).any(dim=2)
    return cells | (object_cells(under, size, stride) & is_empty[..., None, None])


# ---- The masks of one image ----


def bitmask_cells(bitmasks: Tensor, strides: Mapping[str, int]) -> dict[str, Tensor]:
    """Samples masks that are given pixel by pixel at the centres of the cells.

    A centre on the border between pixels (every one, at an even stride) takes the pixel that
    begins there.

    Args:
        bitmasks: (K, height, width), in pixels of the network's input.
        strides: level -> pixels per cell.

    Returns:
        Level -> bool (K, rows, columns): as many as have their centre on the image.
    """
    cells = {}
    for level, stride in strides.items():
        rows, columns = (
            _pixels_under_centres(length, stride, bitmasks.device) for length in bitmasks.shape[1:]
        )
        cells[level] = bitmasks[:, rows[:, None], columns].bool()
    return cells


def polygon_cells(
    polygons: Sequence[Sequence[np.ndarray]],
    image_size: tuple[int, int],
    strides: Mapping[str, int],
) -> dict[str, Tensor]:
    """Which cells have their centre inside the polygons of each object.

    Inside a polygon is what a ray enters and leaves an odd number of times before; inside an
    object, what is in any of its polygons. A centre exactly on an outline is inside on the upper
    and left side of the polygon, and not on the lower and right.

    For all objects of an image at once, and exact: COCO's rasteriser would round corners to a fifth
    of a cell, which is 13 pixels at stride 64.

    Args:
        polygons: for each of K objects its polygons, each an array x0 y0 x1 y1 ... in pixels.
        image_size: height and width of the image in pixels.
        strides: level -> pixels per cell.

    Returns:
        Level -> bool (K, rows, columns) on the CPU: the cells that the image needs.
    """
    edges = _edges(polygons)
    return {
        level: _inside(
            edges, len(polygons), tuple(_cell_count(x, stride) for x in image_size), stride
        )
        for level, stride in strides.items()
    }


class _Edges(NamedTuple):
    start: Tensor
    """(V, 2) float64, x y."""
    end: Tensor
    polygon: Tensor
    """(V,) int64, running number of the edge's polygon among those of the image."""
    owner: Tensor
    """(V,) int64, the object."""


def _edges(polygons: Sequence[Sequence[np.ndarray]]) -> _Edges:
    """The edges of all polygons of an image, in one piece."""
    flat = [
        (owner, np.asarray(polygon, dtype=np.float64).reshape(-1, 2))
        for owner, of_object in enumerate(polygons)
        for polygon in of_object
    ]
    none = np.zeros((0, 2))
    counts = torch.tensor([len(corners) for _, corners in flat], dtype=torch.int64)
    owners = torch.tensor([owner for owner, _ in flat], dtype=torch.int64)
    return _Edges(
        start=torch.from_numpy(np.concatenate([none, *(x for _, x in flat)])),
        end=torch.from_numpy(np.concatenate([none, *(np.roll(x, -1, axis=0) for _, x in flat)])),
        polygon=torch.repeat_interleave(torch.arange(len(flat)), counts),
        owner=torch.repeat_interleave(owners, counts),
    )


def _inside(edges: _Edges, num_objects: int, size: tuple[int, int], stride: int) -> Tensor:
    """bool (K, H, W): scanlines through the centres of each row, for all objects at once."""
    height, width = size
    # Corner -> how many rows have their centre above it. An edge crosses the rows between.
    above = _first_centre(edges.start[:, 1], height, stride)
    below = _first_centre(edges.end[:, 1], height, stride)
    counts = (below - above).abs()
    edge = torch.repeat_interleave(torch.arange(len(counts)), counts)
    of_edge = torch.arange(len(edge)) - (counts.cumsum(0) - counts)[edge]
    row = torch.minimum(above, below)[edge] + of_edge

    start, end = edges.start[edge], edges.end[edge]
    share = ((row + 0.5) * stride - start[:, 1]) / (end[:, 1] - start[:, 1])
    column = _first_centre(start[:, 0] + share * (end[:, 0] - start[:, 0]), width, stride)

    # Each row crosses an outline an even number of times: from left to right, into the polygon and
    # out of it by turns. Entrances count 1, exits -1; the sum over the polygons of an object is
    # above 0 within any of them.
    order = ((edges.polygon[edge] * height + row) * (width + 1) + column).argsort()
    sign = 1 - 2 * (torch.arange(len(order)) % 2)
    place = ((edges.owner[edge] * height + row) * (width + 1) + column)[order]
    changes = torch.zeros(num_objects * height * (width + 1), dtype=torch.int16)
    changes.index_add_(0, place, sign.to(torch.int16))
    depth = changes.view(num_objects, height, width + 1).cumsum(dim=2, dtype=torch.int16)
    return depth[..., :width] > 0


def _first_centre(position: Tensor, length: int, stride: int) -> Tensor:
    """Index of the first cell along an axis with its centre at a position or after; or length."""
    return (position / stride - 0.5).ceil().clamp(0, length).long()


def _pixels_under_centres(length: int, stride: int, device: torch.device) -> Tensor:
    """(cells,) int64: the pixel under each cell centre that lies on the axis."""
    centres = (torch.arange(_cell_count(length, stride), device=device) + 0.5) * stride
    return centres[centres <= length].long().clamp(max=length - 1)


def _cell_count(pixels: float, stride: int) -> int:
    return -int(-pixels // stride)
