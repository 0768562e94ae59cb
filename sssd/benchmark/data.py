"""Batches of a comparison: generated ones, which are the same for every config, and their loading.

M: objects of an image, C: channels, H, W: height and width in pixels.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from torch import Tensor

__all__ = ["GeneratedData", "LoadedAhead", "generate_batches"]

SIDES = (1 / 16, 1 / 2)  # least and greatest side of a box, in sides of the image
_SEEDS = 1_000_003  # between those of two data sets, which have fewer images than that


@dataclass(frozen=True)
class GeneratedData:
    """What is generated.

    Attributes:
        height, width: of every image, in pixels.
        objects: of every image.
        num_batches: that are gone through again and again.
        seed: equal seeds give equal images and boxes.
    """

    height: int = 256
    width: int = 256
    objects: int = 10
    num_batches: int = 4
    seed: int = 0


def generate_batches(
    data: GeneratedData,
    *,
    batch_size: int,
    num_classes: int,
    channels: int = 3,
    mask_format: str = "",
) -> list[list[dict[str, Any]]]:
    """Random images with boxes, as Detectron2's mapper gives them for training.

    Sides of boxes are drawn log-uniformly between `SIDES`, places and classes uniformly. An image
    and its boxes depend on the seed and on its number, not on the batch size and the classes.

    Args:
        data: sizes and seed.
        batch_size: images of a batch.
        num_classes: of the objects.
        channels: C of the images.
        mask_format: "polygon" or "bitmask" for masks that fill the boxes; "" for none.

    Returns:
        Batches of dicts with "image" (uint8, (C, H, W)), "instances" and what names the image.
    """
    images = [
        _image(data, number, num_classes, channels, mask_format)
        for number in range(data.num_batches * batch_size)
    ]
    return [images[i : i + batch_size] for i in range(0, len(images), batch_size)]


def _image(
    data: GeneratedData, number: int, num_classes: int, channels: int, mask_format: str
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(data.seed * _SEEDS + number)
    size = (data.height, data.width)
    image = torch.randint(256, (channels, *size), generator=generator, dtype=torch.uint8)
    instances = Instances(size)
    instances.gt_boxes = Boxes(_boxes(data, generator))
    # From 0 to 1, so that the number of classes changes nothing that is drawn elsewhere.
    share = torch.rand(data.objects, generator=generator)
    instances.gt_classes = (share * num_classes).long().clamp(max=num_classes - 1)
    if mask_format:
        instances.gt_masks = _masks(instances.gt_boxes.tensor, size, mask_format)
    return {
        "image": image,
        "instances": instances,
        "height": data.height,
        "width": data.width,
        "image_id": number,
        "file_name": f"generated image {number}",
    }


def _boxes(data: GeneratedData, generator: torch.Generator) -> Tensor:
    """Corners (M, 4) of boxes that lie in the image."""
    low, high = map(math.log, SIDES)
    image = torch.tensor([data.width, data.height], dtype=torch.float32)
    sides = torch.rand(data.objects, 2, generator=generator) * (high - low) + low
    sides = sides.exp() * image
    corner = torch.rand(data.objects, 2, generator=generator) * (image - sides)
    return torch.cat([corner, corner + sides], dim=1)


def _masks(boxes: Tensor, size: tuple[int, int], mask_format: str) -> PolygonMasks | BitMasks:
    x1, y1, x2, y2 = boxes.double().unbind(1)
    corners = torch.stack([x1, y1, x2, y1, x2, y2, x1, y2], dim=1).numpy()
    polygons = PolygonMasks([[polygon] for polygon in corners])
    if mask_format == "bitmask":
        return BitMasks.from_polygon_masks(polygons, *size)
    return polygons


class LoadedAhead:
    """A data loader that loads the batches of a step when it is told to."""

    def __init__(self, loader: Iterable[list[dict[str, Any]]]) -> None:
        """
        Args:
            loader: gives the batches.
        """
        self.of_one_step = 1  # batches that a step takes
        self.learners = 1  # networks that each of its images is for
        self.source = iter(loader)
        self._ready: list[list[dict[str, Any]]] = []

    def load(self) -> int:
        """Loads the batches of the next step; returns its images."""
        self._ready = [next(self.source) for _ in range(self.of_one_step)]
        return sum(map(len, self._ready)) // self.learners

    def take(self) -> list[list[dict[str, Any]]]:
        """The batches that are loaded and not used."""
        ready, self._ready = self._ready, []
        return ready

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        while True:
            yield self._ready.pop(0)
