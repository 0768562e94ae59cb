"""Checks a COCO annotation file before training starts.

One pass over the file finds what Detectron2 would trip over later, or silently learn from. The
annotations of COCO train2017 (860 thousand) have to be checked in seconds, so types and boxes are
tested in bulk, and one by one only to find out which of them is bad.

Letters: A: annotations, I: images.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from detectron2.utils.file_io import PathManager

from .coco_file import (
    AnnotationError,
    and_others,
    bad_positions,
    check_unique,
    entries_of,
    image_sizes,
    listed,
    read_coco_file,
    short,
)
from .coco_shapes import bad_keypoints, bad_segmentations, without_polygon
from .datasets import dataset_files

# COCO's own boxes stick out of their images by fractions of a pixel.
TOLERATED_EXCESS = 1.0  # pixels
_ROUNDING = 1e-6  # pixels; x + width of floats may miss the border by this much
_EMPTY_SIDE = 1e-5  # pixels; Detectron2 drops boxes with a side up to this

# What can be wrong with an annotation; of one with several faults, the first of these is named.
_FAULTS = {
    "unknown image": "refers to image_id {image_id}, which is not in 'images': add that image or "
    "remove the annotation",
    "no box": "has the bbox {bbox}: write it as four numbers, [x, y, width, height] in pixels",
    "not finite": "has the bbox {bbox}, which is not finite: correct it or remove the annotation",
    "negative": "has the bbox {bbox} with a negative size: write it as [x, y, width, height], not "
    "as corners",
    "outside": "has the bbox {bbox} ([x, y, width, height]), which sticks out of the {size} image "
    "by more than a pixel: clip it, or correct the size of the image",
    "unknown category": "has the category_id {category_id}, which is not in 'categories' "
    "({known}): correct it or add the category",
    "incomplete": "lacks 'area' or 'iscrowd', which the evaluation needs: add them (area in square "
    "pixels, iscrowd 0)",
    "no area": "has the area {area}: write a number of square pixels",
    "crowd": "has the iscrowd {iscrowd}: write 0 or 1",
    "ignored": "has the ignore {ignore}, which Detectron2 cannot train on: remove the annotation, "
    "or write iscrowd 1",
    "bad segmentation": "has the segmentation {segmentation}: write polygons, [[x, y, x, y, ...]], "
    "or a run-length encoding of the whole image, with counts and size; or remove the key",
    "bad keypoints": "has the keypoints {keypoints}: write numbers, [x, y, visibility, ...], or "
    "remove the key",
}


_SHOWN = (
    "image_id",
    "category_id",
    "bbox",
    "area",
    "iscrowd",
    "ignore",
    "segmentation",
    "keypoints",
)


@dataclass(frozen=True)
class AnnotationReport:
    """What a checked annotation file holds.

    Attributes:
        file: the path of the file.
        classes: the names of the categories, in the order of their ids.
        images: number of images.
        boxes: number of annotations of any kind.
        images_without_boxes: images with no annotation, or with crowd annotations only.
        crowd_boxes: annotations with ``iscrowd``; Detectron2 does not train on them.
        zero_size_boxes: boxes with no area inside their image; Detectron2 drops them.
        without_polygon: boxes whose segmentation has no polygon of three points; Detectron2 drops
            them, also from the training of boxes.
        usable_boxes: what is left to train on.
        clipped_boxes: boxes that stick out of their image by no more than a pixel; Detectron2
            clips them.
    """

    file: str
    classes: tuple[str, ...]
    images: int
    boxes: int
    images_without_boxes: int
    crowd_boxes: int
    zero_size_boxes: int
    without_polygon: int
    clipped_boxes: int
    usable_boxes: int

    def summary(self) -> str:
        """The counts in one line."""
        return (
            f"{self.file}: {self.images} images ({self.images_without_boxes} without boxes), "
            f"{self.boxes} boxes of {len(self.classes)} classes, {self.usable_boxes} of them to "
            f"train on ({self.crowd_boxes} crowd, {self.zero_size_boxes} of zero size, "
            f"{self.without_polygon} without a polygon of three points; {self.clipped_boxes} "
            "clipped to the image)"
        )


def check_dataset(name: str, num_classes: int, *, training: bool = True) -> AnnotationReport:
    """Checks the annotation file of a registered dataset in COCO format.

    Args:
        name: a name in Detectron2's ``DatasetCatalog``.
        num_classes: number of classes the detector is built for.
        training: False for a dataset that is only evaluated on, see ``check_annotation_file``.

    Returns:
        The counts of what the file holds.

    Raises:
        AnnotationError: the file is missing or cannot be used.
        ValueError: the name is not registered, or not with a COCO annotation file.
    """
    try:
        json_file, _ = dataset_files(name)
    except FileNotFoundError as error:
        raise AnnotationError(str(error)) from error
    path = PathManager.get_local_path(json_file)
    return check_annotation_file(path, num_classes, training=training)


def check_annotation_file(
    path: str, num_classes: int, *, training: bool = True
) -> AnnotationReport:
    """Checks a COCO annotation file.

    Args:
        path: the file.
        num_classes: number of classes the detector is built for.
        training: True asks for at least one annotation that is not a crowd. False allows a file
            without annotations, but the evaluator then needs ``area`` and ``iscrowd`` in each.

    Returns:
        The counts of what the file holds.

    Raises:
        AnnotationError: the file is missing or cannot be used.
    """
    content = read_coco_file(path)
    images = entries_of(path, content, "images", {"id": int, "file_name": str})
    categories = entries_of(path, content, "categories", {"id": int, "name": str})
    if not training:
        content.setdefault("annotations", [])  # COCO's test sets have none
    keys = {"id": int, "image_id": int, "category_id": int}
    annotations = entries_of(path, content, "annotations", keys)

    _check_classes(path, categories, num_classes)
    if not images:
        raise AnnotationError(f"{path} lists no images: add them under 'images'.")
    for what, entries in (("image", images), ("annotation", annotations)):
        check_unique(path, what, entries)
    sizes = image_sizes(path, images)
    crowd = _mask(entry.get("iscrowd", 0) != 0 for entry in annotations)
    if training and crowd.all():
        why = f"all its {len(crowd)} annotations are crowds" if len(crowd) else "it lists no boxes"
        raise AnnotationError(
            f"{path} has nothing to train on ({why}): annotate objects in it, or name another "
            "dataset in DATASETS.TRAIN."
        )
    return _check_annotations(path, images, sizes, categories, annotations, crowd, training)


def _check_annotations(
    path: str,
    images: list[dict[str, Any]],
    sizes: np.ndarray,
    categories: list[dict[str, Any]],
    annotations: list[dict[str, Any]],
    crowd: np.ndarray,
    training: bool,
) -> AnnotationReport:
    """Checks every annotation against the images, (I, 2) sizes, and categories of the file."""
    index_of = {image["id"]: index for index, image in enumerate(images)}
    known = {category["id"] for category in categories}
    image_index = np.array(
        [index_of.get(entry["image_id"], -1) for entry in annotations], dtype=np.int64
    )
    boxes, well_formed = _boxes(annotations)

    # Bad boxes may hold NaN or infinities; comparisons with NaN are False.
    with np.errstate(invalid="ignore", over="ignore"):
        low, side = boxes[:, :2], boxes[:, 2:]
        high, limit = low + side, sizes[image_index]
        excess = np.maximum(-low, high - limit).max(axis=1, initial=-np.inf)
        visible = np.minimum(high, limit) - np.maximum(low, 0)
    finite = np.isfinite(boxes).all(axis=1)
    needed = () if training else ("area", "iscrowd")
    faults = {
        "unknown image": image_index < 0,
        "no box": ~well_formed,
        "not finite": well_formed & ~finite,
        "negative": (side < 0).any(axis=1),
        "outside": finite & (excess > TOLERATED_EXCESS + _ROUNDING),
        "unknown category": _mask(entry["category_id"] not in known for entry in annotations),
        "incomplete": _mask(any(key not in entry for key in needed) for entry in annotations),
        "no area": _mask(not _is_area(entry.get("area", 0)) for entry in annotations),
        "crowd": _mask(entry.get("iscrowd", 0) not in (0, 1) for entry in annotations),
        "ignored": _mask(entry.get("ignore", 0) != 0 for entry in annotations),
        "bad segmentation": bad_segmentations(annotations, sizes[image_index]),
        "bad keypoints": bad_keypoints(annotations),
    }
    bad = np.any(list(faults.values()), axis=0)
    if bad.any():
        first = int(bad.argmax())
        entry, of_image, size = annotations[first], "", ""
        if image_index[first] >= 0:
            of_image = f" of image {images[image_index[first]]['file_name']!r}"
            size = "{:g}x{:g}".format(*sizes[image_index[first]])
        fault = next(fault for fault, mask in faults.items() if mask[first])
        what = _FAULTS[fault].format(
            size=size,
            known=listed(sorted(known)),
            **{key: short(entry.get(key)) for key in _SHOWN},
        )
        raise AnnotationError(
            f"{path}: annotation {entry['id']}{of_image} {what}"
            f"{and_others(int(bad.sum()) - 1, 'annotation')}."
        )

    with_boxes = np.unique(image_index[~crowd])
    zero_size = (visible <= _EMPTY_SIDE).any(axis=1)
    no_polygon = without_polygon(annotations)
    return AnnotationReport(
        file=path,
        classes=tuple(c["name"] for c in sorted(categories, key=lambda c: c["id"])),
        images=len(images),
        boxes=len(annotations),
        images_without_boxes=len(images) - len(with_boxes),
        crowd_boxes=int(crowd.sum()),
        zero_size_boxes=int(zero_size.sum()),
        without_polygon=int(no_polygon.sum()),
        clipped_boxes=int((excess > _ROUNDING).sum()),
        usable_boxes=int((~crowd & ~zero_size & ~no_polygon).sum()),
    )


def _is_area(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def _mask(flags: Iterable[bool]) -> np.ndarray:
    """The flags as a (A,) bool array."""
    return np.fromiter(flags, dtype=bool)


def _check_classes(path: str, categories: list[dict[str, Any]], num_classes: int) -> None:
    """Category ids have to be unique, and as many as the detector has classes."""
    check_unique(path, "category", categories)
    if len(categories) != num_classes:
        names = listed([category["name"] for category in categories])
        raise AnnotationError(
            f"{path} has {len(categories)} classes ({names}) but the config asks for "
            f"{num_classes}: set MODEL.ROI_HEADS.NUM_CLASSES (MODEL.RETINANET.NUM_CLASSES for "
            "RetinaNet; MODEL.SSSD.NUM_CLASSES if it is not 0) to "
            f"{len(categories)}, or name other datasets in DATASETS."
        )


def _boxes(annotations: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """The boxes, (A, 4) float64 as x, y, width, height with NaN where there is no box; and whether
    each annotation has four numbers, (A,) bool."""
    boxes = [entry.get("bbox") for entry in annotations]
    wrong = []
    if not (
        set(map(type, boxes)) <= {list}
        and set(map(len, boxes)) <= {4}
        and set(map(type, chain.from_iterable(boxes))) <= {int, float}
    ):
        wrong = bad_positions(boxes, _is_box)
    well_formed = np.ones(len(boxes), dtype=bool)
    well_formed[wrong] = False
    for index in wrong:
        boxes[index] = [math.nan] * 4
    try:
        return np.array(boxes, dtype=np.float64).reshape(-1, 4), well_formed
    except OverflowError:  # whole numbers beyond what a float can hold
        infinite = [[v if abs(v) < 1e300 else math.inf for v in box] for box in boxes]
        return np.array(infinite, dtype=np.float64), well_formed


def _is_box(box: Any) -> bool:
    return type(box) is list and len(box) == 4 and all(type(v) in (int, float) for v in box)
