"""Label maps: a picture of the ground truth, one channel for each class (LabelEnc, 2007.03282).

N: images, M: most objects in an image, K: objects of the whole batch, P: classes that occur in the
batch, H, W: height and width of the network's padded input in pixels.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .objects import ObjectBatch

__all__ = ["LabelMaps", "draw_label_maps", "pixel_chunks", "random_scales"]

PIXELS_AT_ONCE = 1 << 20
"""Pixels of boxes that are drawn together; each takes about 100 bytes meanwhile."""


class LabelMaps(NamedTuple):
    """Label maps with the channels of those classes alone that occur in the batch.

    The other channels would be 0 throughout. With all 80 classes of COCO, an image of 800 x 1344
    pixels would take 344 MB; with 1203, five gigabytes.
    """

    maps: Tensor
    """(N, P, H, W) float32 in [0, 1], P >= 1."""
    classes: Tensor
    """(P,) int64, ascending: the class of each channel. Class 0 when there is no object at all."""


@torch.no_grad()
def draw_label_maps(
    objects: ObjectBatch,
    size: tuple[int, int],
    *,
    scales: Tensor | None = None,
    device: torch.device | None = None,
    chunk_size: int = PIXELS_AT_ONCE,
) -> LabelMaps:
    """Draws each object as a pyramid that is highest at the centre of its box.

    At a pixel within the box the value is ``1 - max(|x - cx| / w, |y - cy| / h)``, 1 at the centre
    and 0.5 at the border; outside it is 0. Where objects of one class overlap, the highest counts.

    Ours: (x, y) is the middle of the pixel, half a pixel from its corner, as boxes are corners in
    Detectron2 (LabelEnc's code takes the corner). And no object is lost: one without the middle of
    any pixel between its borders, along either axis, has there the pixel under its own centre, with
    a distance of at most 0.5. So every pixel of an object has a value in [0.5, 1], also of one
    without any area.

    The work and the memory go with the area of the boxes, in chunks; there is no loop over objects.

    Args:
        objects: the batch. Valid objects have a class (no context boxes). The number of pixels has
            to be known on the CPU: from objects that are still there, nothing waits for the GPU.
        size: (H, W) of the padded batch.
        scales: (N, M), a factor on all values of each object; None for 1.
        device: where the maps are made; that of the objects by default.
        chunk_size: most pixels to draw at once.

    Raises:
        ValueError: when an image is larger than ``size``.
    """
    height, width = size
    device = device or objects.boxes.device
    # Not objects.to("cpu"): that does not wait for the GPU, and what is read may not be there yet.
    boxes, classes, valid, image_sizes = (x.cpu() for x in objects)
    _check_size(image_sizes, size)

    image, slot = valid.nonzero(as_tuple=True)  # (K,), as is all that follows
    present, channel = classes[image, slot].unique(return_inverse=True)
    if not len(present):
        present = classes.new_zeros(1)
    # float64: a box of a fraction of a pixel lies at a thousand of them.
    x1, y1, x2, y2 = boxes[image, slot].double().unbind(1)
    image_height, image_width = image_sizes[image].long().unbind(1)
    left, columns = _pixels_along(x1, x2, image_width)
    top, rows = _pixels_along(y1, y2, image_height)
    corner = ((image * len(present) + channel) * height + top) * width + left

    corner, columns_on_device = torch.stack([corner, columns]).to(device, non_blocking=True)
    middle_x, steepness_x, middle_y, steepness_y = (
        torch.stack([*_slope(x1, x2, left), *_slope(y1, y2, top)])
        .float()
        .to(device, non_blocking=True)
    )
    if scales is not None:
        scales = scales[image.to(scales.device), slot.to(scales.device)].to(device).float()

    maps = torch.zeros(len(boxes) * len(present) * height * width, device=device)
    for owner, pixel in pixel_chunks(rows * columns, chunk_size, device=device):
        row_length = columns_on_device[owner]
        row = pixel.div(row_length, rounding_mode="floor")
        column = pixel - row * row_length
        distance_x = (column - middle_x[owner]).abs() * steepness_x[owner]
        distance_y = (row - middle_y[owner]).abs() * steepness_y[owner]
        value = 1 - torch.maximum(distance_x, distance_y).clamp(max=0.5)
        if scales is not None:
            value = value * scales[owner]
        maps.scatter_reduce_(0, corner[owner] + row * width + column, value, "amax")
    return LabelMaps(
        maps.view(len(boxes), len(present), height, width),
        present.to(device, non_blocking=True),
    )


def random_scales(shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
    """``min(1, 2u)`` with u uniform in [0, 1): half of the objects as they are, others paler.

    LabelEnc's augmentation, in its first step only.
    """
    return (2 * torch.rand(shape, generator=generator)).clamp(max=1)


def pixel_chunks(
    areas: Tensor, chunk_size: int, *, device: torch.device | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Enumerates the pixels of all objects, object by object, ``chunk_size`` at a time.

    Args:
        areas: int64 (K,) on the CPU, number of pixels of each object.
        chunk_size: most pixels in a chunk. A chunk may begin and end within an object.
        device: where the chunks are made.

    Yields:
        For each pixel of a chunk the index of its object, in [0, K), and its own index among the
        pixels of that object: int64 (pixels,) both.
    """
    ends = areas.cumsum(0)
    starts = ends - areas
    starts_on_device = starts.to(device, non_blocking=True)
    total = int(areas.sum())
    for begin in range(0, total, chunk_size):
        end = min(begin + chunk_size, total)
        counts = ends.clamp(begin, end) - starts.clamp(begin, end)
        # With the size given, the GPU need not be asked for the sum of the counts.
        owner = torch.repeat_interleave(counts.to(device), output_size=end - begin)
        yield owner, torch.arange(begin, end, device=device) - starts_on_device[owner]


def _pixels_along(low: Tensor, high: Tensor, extent: Tensor) -> tuple[Tensor, Tensor]:
    """First pixel of each object along an axis of the image, and how many there are: at least 1.

    Those with their middle in [low, high], or the one under the object's centre. None lies beyond
    ``extent``, the size of the image, on the padding of the batch.
    """
    first = (low - 0.5).ceil().long().clamp(min=0)
    last = (high - 0.5).floor().long().minimum(extent - 1)
    # A centre at the far border of the image is under no pixel of it: then the last one.
    under = ((low + high) / 2).floor().long().clamp(min=0).minimum(extent - 1)
    is_empty = last < first
    first, last = torch.where(is_empty, under, first), torch.where(is_empty, under, last)
    return first, last - first + 1


def _slope(low: Tensor, high: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """Where an object's centre lies, counted in pixel middles from its first pixel, and 1 / size.

    The size is at least a millionth of a pixel, so that the distance of an object without extent
    is large (and then clamped) instead of a division by 0.
    """
    return (low + high) / 2 - 0.5 - first, 1 / (high - low).clamp(min=1e-6)


def _check_size(image_sizes: Tensor, size: tuple[int, int]) -> None:
    for index, (height, width) in enumerate(image_sizes.long().tolist()):
        if height > size[0] or width > size[1]:
            raise ValueError(
                f"Image {index} of the batch is {height} x {width} pixels (height x width), more "
                f"than the label maps of {size[0]} x {size[1]}; give the size of the padded batch."
            )
