"""Reads a COCO annotation file and checks its structure: JSON, sections, keys and their types."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from .errors import DataError

_TYPE_NAMES = {list: "a list", int: "a whole number", str: "a text"}


class AnnotationError(DataError):
    """An annotation file that cannot be used; the message names the file, the entry and the fix."""


def read_coco_file(path: str) -> dict[str, Any]:
    """The content of a JSON file whose top level is an object."""
    try:
        with open(path, "rb") as file:
            content = json.load(file)
    except FileNotFoundError as error:
        raise AnnotationError(
            f"The annotation file {path} does not exist: correct the path, or put the file there."
        ) from error
    except OSError as error:
        raise AnnotationError(
            f"The annotation file {path} cannot be read ({error.strerror}): make it readable."
        ) from error
    except json.JSONDecodeError as error:
        raise AnnotationError(
            f"The annotation file {path} is truncated or not JSON ({error.msg} at line "
            f"{error.lineno}, column {error.colno}; character {error.pos} of {len(error.doc)}): "
            "fetch or write it again."
        ) from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise AnnotationError(
            f"The annotation file {path} is not JSON text ({error}): fetch or write it again."
        ) from error
    if not isinstance(content, dict):
        raise AnnotationError(
            f"The annotation file {path} is not in COCO format (its top level is a "
            f"{type(content).__name__}, not an object with 'images', 'annotations' and "
            "'categories'): convert it."
        )
    return content


def entries_of(
    path: str, content: dict[str, Any], section: str, keys: dict[str, type]
) -> list[dict[str, Any]]:
    """The list under ``section``, each entry an object that has the keys with these types."""
    entries = content.get(section)
    if not isinstance(entries, list):
        found = f"is a {type(entries).__name__}" if section in content else "is missing"
        raise AnnotationError(
            f"The annotation file {path} is not in COCO format ({section!r} {found}): "
            f"give it a list of {section}."
        )
    wrong = bad_positions(entries, lambda entry: type(entry) is dict, dict)
    if wrong:
        raise AnnotationError(
            f"{path}: entry number {wrong[0]} of {section!r} is {short(entries[wrong[0]])}, not "
            f"an object with the keys {listed(keys)}: correct it{and_others(len(wrong) - 1)}."
        )
    for key, kind in keys.items():
        values = [entry.get(key) for entry in entries]
        wrong = bad_positions(values, lambda value, kind=kind: type(value) is kind, kind)
        if wrong:
            entry, value = entries[wrong[0]], values[wrong[0]]
            found = f"has the {key!r} {short(value)}" if key in entry else f"lacks {key!r}"
            label = f" (id {short(entry['id'])})" if key != "id" and "id" in entry else ""
            raise AnnotationError(
                f"{path}: entry number {wrong[0]} of {section!r}{label} {found}: it has to be "
                f"{_TYPE_NAMES[kind]}{and_others(len(wrong) - 1)}."
            )
    return entries


def check_unique(path: str, what: str, entries: list[dict[str, Any]]) -> None:
    """No two entries may have the same id."""
    ids = [entry["id"] for entry in entries]
    if len(set(ids)) == len(ids):
        return
    repeated = {number: times for number, times in Counter(ids).items() if times > 1}
    number, times = next(iter(repeated.items()))
    detail = ""
    if what == "image":
        files = [entry["file_name"] for entry in entries if entry["id"] == number]
        detail = f" ({listed(files)})"
    elif what == "annotation":
        image_ids = {entry["image_id"] for entry in entries if entry["id"] == number}
        detail = f" (of image_id {listed(sorted(image_ids))})"
    raise AnnotationError(
        f"{path}: the {what} id {number} is used {times} times{detail}: give every {what} an id "
        f"of its own{and_others(len(repeated) - 1, 'id')}."
    )


def image_sizes(path: str, images: list[dict[str, Any]]) -> np.ndarray:
    """Width and height of every image in pixels: (I, 2) float64."""
    sides = [(image.get("width"), image.get("height")) for image in images]
    wrong = bad_positions(sides, _is_size)
    if wrong:
        image, (width, height) = images[wrong[0]], sides[wrong[0]]
        raise AnnotationError(
            f"{path}: image {image['id']} ({image['file_name']!r}) has width {short(width)} and "
            f"height {short(height)}: write both as positive whole numbers of pixels"
            f"{and_others(len(wrong) - 1, 'image')}."
        )
    return np.array(sides, dtype=np.float64)


def _is_size(sides: tuple[Any, Any]) -> bool:
    return all(type(side) in (int, float) and side > 0 and side % 1 == 0 for side in sides)


def bad_positions(
    values: Sequence[Any], is_good: Callable[[Any], bool], kind: type | None = None
) -> list[int]:
    """The positions of the bad values; quick where all are exactly of the type ``kind``."""
    if kind is not None and set(map(type, values)) <= {kind}:
        return []
    return [index for index, value in enumerate(values) if not is_good(value)]


def and_others(count: int, noun: str = "entry") -> str:
    """What to append to a sentence about the first of several bad things."""
    if count == 0:
        return ""
    nouns = {"entry": "entries"}.get(noun, f"{noun}s")
    return f" (and {count} more bad {noun if count == 1 else nouns})"


def listed(items: Iterable[Any], most: int = 12) -> str:
    """The items in a row, long lists cut short."""
    texts = [str(item) for item in items]
    more = f", and {len(texts) - most} more" if len(texts) > most else ""
    return (", ".join(texts[:most]) or "none") + more


def short(value: Any) -> str:
    """The value as written in JSON, cut short."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
