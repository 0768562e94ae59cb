"""The segmentations and keypoints of COCO annotations, as far as Detectron2 relies on them.

Letter: A: annotations.
"""

from collections.abc import Iterable
from itertools import chain
from typing import Any

import numpy as np

__all__ = ["bad_keypoints", "bad_segmentations", "without_polygon"]

_POINTS = 3  # of the smallest polygon
_FAR = 1e9  # pixels; no image is as large, and NaN is not below


def bad_segmentations(annotations: list[dict[str, Any]], sizes: np.ndarray) -> np.ndarray:
    """Which segmentations are neither polygons nor a run-length encoding of their image.

    Args:
        annotations: entries of a COCO file.
        sizes: (A, 2) width and height of the image of each, in pixels.

    Returns:
        (A,) bool. Without a segmentation there is nothing bad about it.
    """
    segmentations = [entry.get("segmentation") for entry in annotations]
    bad = np.zeros(len(segmentations), dtype=bool)
    polygons = [s for s in segmentations if type(s) is list]
    # In bulk, and one by one only to find out which.
    all_good = set(map(type, chain.from_iterable(polygons))) <= {list} and _are_numbers(
        chain.from_iterable(chain.from_iterable(polygons))
    )
    for index, segmentation in enumerate(segmentations):
        if type(segmentation) is dict:
            bad[index] = not _is_encoding(segmentation, *sizes[index])
        elif type(segmentation) is list:
            bad[index] = not (all_good or all(map(_is_list_of_numbers, segmentation)))
        else:
            bad[index] = segmentation is not None
    return bad


def without_polygon(annotations: list[dict[str, Any]]) -> np.ndarray:
    """Which have polygons, but none that Detectron2 takes: (A,) bool.

    It leaves out polygons with an odd number of values or less than three points, and annotations
    with no other.
    """
    return np.fromiter(
        (
            bool(polygons := entry.get("segmentation"))
            and type(polygons) is list
            and not any(len(p) % 2 == 0 and len(p) >= 2 * _POINTS for p in polygons)
            for entry in annotations
        ),
        dtype=bool,
        count=len(annotations),
    )


def bad_keypoints(annotations: list[dict[str, Any]]) -> np.ndarray:
    """Which keypoints are no list of numbers, three a point: (A,) bool."""
    return np.fromiter(
        (
            (points := entry.get("keypoints")) is not None
            and not (_is_list_of_numbers(points) and len(points) % 3 == 0)
            for entry in annotations
        ),
        dtype=bool,
        count=len(annotations),
    )


def _is_encoding(segmentation: dict[str, Any], width: float, height: float) -> bool:
    counts = segmentation.get("counts")
    if segmentation.get("size") != [height, width]:
        return False
    if type(counts) is str:
        counts = _uncompressed(counts)
    elif not (type(counts) is list and set(map(type, counts)) <= {int}):
        return False
    # Where they do not add up, pycocotools leaves the rest of the mask to chance.
    return all(count >= 0 for count in counts) and sum(counts) == width * height


def _uncompressed(text: str) -> list[int]:
    """The counts of COCO's compressed encoding, as pycocotools reads them; [-1] where it is none.

    Six bits a character: five of a number, the lowest first, and whether it goes on. From the
    fourth on, a number is the difference to the one before the last.
    """
    codes = np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8).astype(np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 0x20:
        return [-1]
    ends = np.flatnonzero(codes & 0x20 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 6:
        return [-1]
    place = np.arange(len(codes)) - np.repeat(starts, lengths)
    numbers = np.add.reduceat((codes & 0x1F) << (5 * place), starts)
    numbers -= np.where(codes[ends] & 0x10, 1 << (5 * lengths), 0)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers.tolist()


def _is_list_of_numbers(values: Any) -> bool:
    return type(values) is list and _are_numbers(values)


def _are_numbers(values: Iterable[Any]) -> bool:
    """Whether all are finite numbers."""
    values = list(values)
    return set(map(type, values)) <= {int, float} and all(-_FAR < value < _FAR for value in values)
