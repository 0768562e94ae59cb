"""Checks classification datasets before training starts."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from .classification_sources import DatasetError
from .coco_file import listed


@dataclass(frozen=True)
class ClassificationReport:
    """What a checked dataset holds.

    Attributes:
        name: of the dataset.
        images: number of images.
        images_of_class: class name -> number of its images, in the order of the labels.
        channels: how many its images have; files count as 3, since they are read as RGB.
    """

    name: str
    images: int
    images_of_class: dict[str, int]
    channels: frozenset[int]

    def summary(self) -> str:
        """The counts in one line."""
        counts = self.images_of_class.values()
        return (
            f"{self.name}: {self.images} images of {len(counts)} classes, {min(counts)} to "
            f"{max(counts)} a class"
        )


def check_classification_dataset(name: str, num_classes: int) -> ClassificationReport:
    """Checks a registered dataset against the number of classes of the network.

    Files of images are not opened.

    Args:
        name: a name in Detectron2's ``DatasetCatalog``.
        num_classes: outputs of the network.

    Returns:
        The counts.

    Raises:
        DatasetError: the name is not registered, the dataset cannot be read or is empty, has
            another number of classes, or has a record that cannot be used.
    """
    records, classes = read_dataset(name)
    if len(classes) != num_classes:
        raise DatasetError(
            f"The dataset {name!r} has {len(classes)} classes ({listed(classes, 4)}) but the "
            f"network is built for {num_classes}: set MODEL.SSSD.CLASSIFIER.NUM_CLASSES to "
            f"{len(classes)}, or correct DATASETS.TRAIN and DATASETS.TEST."
        )
    counts = [0] * num_classes
    positions: dict[int, int] = {}
    for position, record in enumerate(records):
        complaint = _complaint(record, num_classes)
        if complaint is None and positions.setdefault(record["image_id"], position) != position:
            complaint = (
                f"has the image_id {record['image_id']} of record {positions[record['image_id']]}, "
                "and an accuracy counts each once: number the images of a dataset through"
            )
        if complaint is not None:
            raise DatasetError(f"Record {position} of the dataset {name!r} {complaint}.")
        counts[record["label"]] += 1
    channels = frozenset(3 if "file_name" in x else x["image"].shape[2] for x in records)
    return ClassificationReport(
        name, sum(counts), dict(zip(classes, counts, strict=True)), channels
    )


def read_dataset(name: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The records of a registered classification dataset, and the class names by label.

    Raises:
        DatasetError: the name is not registered, or the dataset cannot be read, is empty or has no
            class names.
    """
    if name not in DatasetCatalog:
        raise DatasetError(
            f"The dataset {name!r} is not registered: correct DATASETS.TRAIN and DATASETS.TEST, or "
            "register it first, for instance with sssd.data.register_image_folder."
        )
    records = DatasetCatalog.get(name)
    if not records:
        raise DatasetError(f"The dataset {name!r} has no images: put some there.")
    classes = MetadataCatalog.get(name).get("classes")
    if classes is None:
        raise DatasetError(
            f"The dataset {name!r} was registered without class names, so it is not one of image "
            f"classification: choose another, or set MetadataCatalog.get({name!r}).classes."
        )
    return records, classes


def check_same_classes(*names: str) -> None:
    """Checks that a label means the same in all of some datasets, registered with ``classes``.

    Raises:
        DatasetError: one of them has other classes than the first, or in another order.
    """
    first = MetadataCatalog.get(names[0]).classes
    for name in names[1:]:
        classes = MetadataCatalog.get(name).classes
        if list(classes) == list(first):
            continue
        label = next(
            (k for k, pair in enumerate(zip(first, classes, strict=False)) if pair[0] != pair[1]),
            min(len(first), len(classes)),
        )
        meaning = [repr(c[label]) if label < len(c) else "no class" for c in (first, classes)]
        raise DatasetError(
            f"The label {label} is {meaning[0]} in the dataset {names[0]!r} but {meaning[1]} in "
            f"{name!r}: use datasets of the same classes (of folders, the same folder names)."
        )


def _complaint(record: dict[str, Any], num_classes: int) -> str | None:
    """What is wrong with a record and what to do about it; None if it is fine."""
    label = record.get("label")
    if not isinstance(label, int | np.integer) or not 0 <= label < num_classes:
        return f"has the label {label!r}: give it a whole number in 0..{num_classes - 1}"
    if not isinstance(record.get("image_id"), int | np.integer):
        return f"has the image_id {record.get('image_id')!r}: give it a whole number"
    if "file_name" in record:
        return None
    return image_complaint(record.get("image"))


def image_complaint(image: Any) -> str | None:
    """What is wrong with the image of a record that has no file; None if it is fine."""
    if not isinstance(image, np.ndarray):
        return "has no 'image' array and no 'file_name': give it one of them"
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
        return (
            f"has an image of {image.dtype} and the shape {image.shape}: give it uint8 and the "
            "shape (height, width, channels), with 1 or 3 channels"
        )
    return None
