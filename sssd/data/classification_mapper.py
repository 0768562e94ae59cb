"""From a record of a classification dataset to what the model gets, by torchvision's transforms.

Letters: H: height, W: width, C: channels (1, or 3 for RGB).
"""

from collections.abc import Callable
from typing import Any

import torch
from detectron2.data import detection_utils
from torchvision.transforms import v2

from .classification_check import image_complaint
from .mapper import ImageError, check_depth

AUGMENTATIONS = ("none", "crop", "crop_flip", "resized_crop")


def build_transform(is_train: bool, size: int, augmentation: str) -> v2.Compose:
    """The transform of an augmentation, on uint8 tensors (C, H, W).

    - "none": the shorter side to ``size``, then the centre.
    - "crop": as "none", then a random ``size`` x ``size`` window of the image with a black border
      of ``size // 8`` pixels.
    - "crop_flip": as "crop", then half of the images are flipped; with ``size`` 32 the recipe of
      CIFAR (He et al., arXiv 1512.03385, 4.2).
    - "resized_crop": a random window of 8 to 100 % of the area and a shape of 3:4 to 4:3, resized,
      and half of the images flipped; the recipe of ImageNet (Szegedy et al., arXiv 1409.4842, 6).

    In evaluation the first three are "none", and "resized_crop" takes the centre of the image
    whose shorter side is 256 / 224 of ``size``. Images that already have the size keep their bits.

    Args:
        is_train: whether to augment.
        size: height and width of the result, in pixels.
        augmentation: one of ``AUGMENTATIONS``.

    Raises:
        ValueError: for another augmentation, or a size with which it does nothing.
    """
    if augmentation not in AUGMENTATIONS:
        raise ValueError(
            f"Unknown augmentation {augmentation!r}; choose one of {', '.join(AUGMENTATIONS)}."
        )
    if size < (8 if augmentation.startswith("crop") else 1):
        raise ValueError(
            f"The augmentation {augmentation!r} cannot be used with images of {size} pixels: "
            "set the size to 8 or more, or choose the augmentation 'none' (1 pixel or more)."
        )
    if augmentation == "resized_crop":
        if is_train:
            return v2.Compose(
                [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
            )
        return v2.Compose([v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size)])
    steps: list[Callable] = [v2.Resize(size, antialias=True), v2.CenterCrop(size)]
    if is_train and augmentation in ("crop", "crop_flip"):
        steps.append(v2.RandomCrop(size, padding=size // 8))
    if is_train and augmentation == "crop_flip":
        steps.append(v2.RandomHorizontalFlip())
    return v2.Compose(steps)


class ClassificationMapper:
    """Maps a record of a classification dataset to the input of a model.

    Whatever is random is drawn from torch's global generator, which Detectron2 seeds in every
    worker.
    """

    def __init__(self, is_train: bool, size: int, augmentation: str) -> None:
        """
        Args:
            is_train: whether to augment.
            size: height and width of the result, in pixels.
            augmentation: "none", "crop", "crop_flip" or "resized_crop", see ``build_transform``.

        Raises:
            ValueError: for another augmentation, or a size with which it does nothing.
        """
        self._transform = build_transform(is_train, size, augmentation)

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """
        Args:
            record: with ``image`` (H, W, C) uint8 or ``file_name``, ``label`` and ``image_id``.

        Returns:
            ``image`` uint8 (C, size, size), not sharing memory with the record, RGB if it came from
            a file; ``label`` and ``image_id`` as they are.

        Raises:
            ImageError: the image is missing or cannot be read, or is not an array of that kind.
        """
        return {
            "image": self._transform(_read_image(record)).contiguous(),
            "label": record["label"],
            "image_id": record["image_id"],
        }


def _read_image(record: dict[str, Any]) -> torch.Tensor:
    """The image of a record as a uint8 tensor (C, H, W) of its own."""
    path = record.get("file_name")
    if path is None:
        image = record.get("image")
        complaint = image_complaint(image)
        if complaint is not None:
            raise ImageError(f"The record with image_id {record['image_id']} {complaint}.")
    else:
        try:
            image = detection_utils.read_image(path, format="RGB")
        except FileNotFoundError as error:
            raise ImageError(
                f"The image {path} does not exist: put it there, or register the dataset again."
            ) from error
        except Exception as error:  # Pillow's decoders raise all kinds
            raise ImageError(
                f"The image {path} cannot be read ({error}): fetch it again, or remove the file."
            ) from error
        check_depth(path)
    return torch.from_numpy(image.transpose(2, 0, 1).copy())
