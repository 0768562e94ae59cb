"""The demo set on disk: a few hundred small generated pictures in COCO format.

The set is made once under a cache folder and is the same, byte for byte, on every machine. A
finished set carries a stamp with the generator's version and the seed; it appears under its final
name by one rename, so whoever sees the stamp sees a whole set.
"""

import json
import os
import shutil
import struct
import uuid
import zlib

import numpy as np
from iopath.common.file_io import file_lock

from .demo_pictures import CLASS_NAMES, Dice, draw_picture

# Raise this whenever the pictures or the files change: cached sets of other versions are remade.
VERSION = 2
SPLITS = {"train": 320, "val": 96}  # pictures per split
# As in COCO, the ids have gaps, so the mapping to contiguous class numbers is put to use.
CATEGORY_IDS = (3, 7, 11, 19, 42)
FOLDER = "sssd_demo"
_STAMP = "stamp.json"


def encode_png(pixels: np.ndarray) -> bytes:
    """Encodes a picture as a PNG file without compression.

    Compressed bytes depend on the version of zlib; stored ones are the same everywhere.

    Args:
        pixels: (H, W, 3) uint8, RGB.

    Returns:
        The bytes of the file.
    """
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in np.ascontiguousarray(pixels))
    blocks = [rows[i : i + 65535] for i in range(0, len(rows), 65535)]
    stored = b"".join(
        struct.pack("<BHH", block is blocks[-1], len(block), len(block) ^ 0xFFFF) + block
        for block in blocks
    )
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", b"\x78\x01" + stored + struct.pack(">I", zlib.adler32(rows))),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def _distinct(dice: Dice, count: int) -> list[int]:
    """``count`` different numbers from 1 to 999999, in random order."""
    numbers: dict[int, None] = {}
    while len(numbers) < count:
        numbers[dice.integer(1, 999_999)] = None
    return list(numbers)


def _write_json(path: str, content: object) -> None:
    with open(path, "w", encoding="ascii", newline="\n") as file:
        json.dump(content, file, separators=(",", ":"))


def _write_set(folder: str, seed: int) -> None:
    """Writes the whole set into an existing, empty folder."""
    os.makedirs(os.path.join(folder, "images"))
    os.makedirs(os.path.join(folder, "annotations"))
    # Names and ids come from a stream of their own: they say nothing about split or content.
    names = Dice(seed, VERSION)
    total = sum(SPLITS.values())
    stems = [f"{number:06d}" for number in _distinct(names, total)]
    image_ids = _distinct(names, total)
    for split_index, (split, count) in enumerate(SPLITS.items()):
        images, annotations = [], []
        for index in range(count):
            picture = draw_picture(Dice(seed, VERSION, split_index, index))
            height, width, _ = picture.pixels.shape
            image_id, file_name = image_ids.pop(), f"{stems.pop()}.png"
            with open(os.path.join(folder, "images", file_name), "wb") as file:
                file.write(encode_png(picture.pixels))
            images.append(
                {"id": image_id, "file_name": file_name, "width": width, "height": height}
            )
            annotations += [
                {
                    "image_id": image_id,
                    "category_id": CATEGORY_IDS[drawn.class_index],
                    "bbox": list(drawn.box),
                    "area": drawn.area,
                    "iscrowd": 0,
                }
                for drawn in picture.objects
            ]
        numbers = _distinct(names, len(annotations))
        for number, annotation in zip(numbers, annotations, strict=True):
            annotation["id"] = number
        content = {
            "info": {"description": f"sssd demo set, {split}", "version": str(VERSION)},
            "images": sorted(images, key=lambda image: image["id"]),
            "annotations": sorted(annotations, key=lambda annotation: annotation["id"]),
            "categories": [
                {"id": number, "name": name, "supercategory": "shape"}
                for number, name in zip(CATEGORY_IDS, CLASS_NAMES, strict=True)
            ],
        }
        _write_json(os.path.join(folder, "annotations", f"instances_{split}.json"), content)
    _write_json(os.path.join(folder, _STAMP), {"version": VERSION, "seed": seed})


def _is_whole(folder: str, seed: int) -> bool:
    """Whether the folder holds a finished set of this version and seed."""
    try:
        with open(os.path.join(folder, _STAMP), encoding="ascii") as file:
            return json.load(file) == {"version": VERSION, "seed": seed}
    except (OSError, ValueError):
        return False


def _put_in_place(made: str, target: str) -> None:
    """Renames the finished folder ``made`` to ``target``, in place of an outdated set."""
    if os.path.isdir(target):
        strangers = set(os.listdir(target)) - {"annotations", "images", _STAMP}
        if strangers:
            raise FileExistsError(
                f"{target} is not a demo set (it holds {min(strangers)!r}), so it is left alone: "
                "move it away, or set SSSD_DEMO_ROOT to another folder."
            )
        outdated = f"{made}-outdated"
        os.rename(target, outdated)
        shutil.rmtree(outdated, ignore_errors=True)
    os.rename(made, target)


def make_demo_dataset(root: str, seed: int = 0) -> None:
    """Makes the demo set in ``root``/sssd_demo, unless it is there already.

    It holds annotations/instances_train.json, annotations/instances_val.json and images/. A set of
    another version or seed, or one that lost its stamp, is replaced. Several processes may call
    this at once: one makes the set, the others wait for it.

    Args:
        root: the folder to make it in; created if missing.
        seed: the seed of the pictures, not negative.

    Raises:
        OSError: ``root`` cannot be written.
        FileExistsError: ``root``/sssd_demo holds files that are not the demo set's.
    """
    target = os.path.join(root, FOLDER)
    if _is_whole(target, seed):
        return
    made = os.path.join(root, f".{FOLDER}-{os.getpid()}-{uuid.uuid4().hex}")
    try:
        os.makedirs(made)
    except OSError as error:
        raise OSError(
            f"The demo set cannot be made in {root} ({error.strerror}): "
            "set SSSD_DEMO_ROOT to a folder that can be written."
        ) from error
    try:
        with file_lock(os.path.join(root, f".{FOLDER}")):
            if not _is_whole(target, seed):  # another process may have made it meanwhile
                _write_set(made, seed)
                _put_in_place(made, target)
    finally:
        shutil.rmtree(made, ignore_errors=True)
