"""Data and configs that are wrong in every way that hypothesis finds, and one iteration on them."""

import copy
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from hypothesis import strategies as st
from PIL import Image

from sssd.engine import Trainer, user_errors

from .detectors import tiny_config

NAME = "hostile_coco"
WIDTH, HEIGHT, IMAGES = 64, 48, 4


def coco_content() -> dict[str, Any]:
    """Annotations of four pictures: boxes with polygons and keypoints, a crowd, three classes."""
    boxes = [[4, 5, 20, 16], [30, 10, 25.5, 30.25], [1, 1, 12, 12], [40, 20, 20, 20], [8, 8, 30, 9]]
    annotations = []
    for number, (x, y, w, h) in enumerate(boxes):
        annotations.append(
            {
                "id": number + 1,
                "image_id": number % IMAGES + 1,
                "category_id": 3 * (number % 3) + 1,
                "bbox": [x, y, w, h],
                "area": w * h,
                "iscrowd": 0,
                "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                "keypoints": [x, y, 2, x + w / 2, y + h / 2, 1],
                "num_keypoints": 2,
            }
        )
    crowd = {"id": 6, "image_id": 1, "category_id": 1, "bbox": [2, 4, 3, 40], "area": 50}
    encoding = {"counts": [100, 50, HEIGHT * WIDTH - 150], "size": [HEIGHT, WIDTH]}
    annotations.append({**crowd, "iscrowd": 1, "segmentation": encoding})
    return {
        "info": {"description": "pictures", "year": 2026},
        "licenses": [{"id": 1, "name": "none"}],
        "images": [
            {"id": i + 1, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT, "license": 1}
            for i in range(IMAGES)
        ],
        "categories": [
            {"id": 3 * c + 1, "name": name, "supercategory": "colour"}
            for c, name in enumerate(("red", "green", "blue"))
        ],
        "annotations": annotations,
    }


def write_images(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        picture = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"{i}.png")


def config_content(detector: str = "faster_rcnn") -> dict[str, Any]:
    """The whole config of a small distilled detector, as a file of it reads."""
    return yaml.safe_load(small_config(detector).dump())


def small_config(detector: str = "faster_rcnn") -> CfgNode:
    return tiny_config(
        "DATASETS.TRAIN", (NAME,), "DATASETS.TEST", (), "DATALOADER.NUM_WORKERS", 0,
        "INPUT.MIN_SIZE_TRAIN", (48,), "SOLVER.MAX_ITER", 1, "SOLVER.STEPS", (), "SEED", 3,
        "OUTPUT_DIR", "output", detector=detector,
    )  # fmt: skip


class Hang(BaseException):
    """Longer than anything here takes."""


def _hangs(number: int, frame: Any) -> None:
    raise Hang


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, _hangs)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def register(folder: Path) -> None:
    if NAME in DatasetCatalog:
        DatasetCatalog.remove(NAME)
        MetadataCatalog.remove(NAME)
    register_coco_instances(NAME, {}, str(folder / "annotations.json"), str(folder / "images"))


def one_iteration(cfg: CfgNode) -> None:
    """The first iteration of a training, as tools/train_net.py has it."""
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.max_iter = min(trainer.max_iter, 1)
    trainer.train()


def ends_with(run: Callable[[], Any], seconds: float = 60) -> str:
    """The sentence that a script would end with, or "" where it would not end with one.

    Raises:
        Exception: any other error, as a script would show it with its traceback.
        Hang: it takes longer than the seconds.
    """
    try:
        with at_most(seconds), user_errors():
            run()
    except SystemExit as error:
        sentence = str(error.code)
        assert sentence.startswith("error: ") and sentence.endswith("."), sentence
        assert "\n" not in sentence and 20 < len(sentence) < 1000, sentence
        return sentence.removeprefix("error: ")
    return ""


# ---- Mutations of JSON and YAML ----

_SCALARS = [None, True, False, -1, 0, 1, 2, 7, 10**9, -(10**9), 10**25, 1e-12, 0.5, -0.5, 1e30,
            math.nan, math.inf, -math.inf, "", "banana", "0", "\u0000", "é\n"]  # fmt: skip
_CONTAINERS = [[], [0], [-1, 2], ["a"], [[]], [[[1.5]]], [None], {}, {"a": 1}, [{}], [0] * 1000]


def _alike(value: Any) -> st.SearchStrategy:
    """Other values of the same type."""
    if isinstance(value, bool):
        return st.just(not value)
    if isinstance(value, int):
        return st.sampled_from([-1, 0, 1, 2, 3, 5, 1000, 10**9, -(10**9), value + 1, -value])
    if isinstance(value, float):
        return st.sampled_from(
            [-1.0, 0.0, 1.0, 0.5, 1e-9, 1e9, -1e9, 1e38, math.nan, math.inf, value * 1.5, -value]
        )
    if isinstance(value, str):
        return st.sampled_from(["", "banana", value + "x", value[:-1], "../" + value, " ", "ü"])
    if isinstance(value, list):
        return st.sampled_from(
            [[], value + value, value[:-1], value[::-1], value[:1] * 5, [value], value[1:]]
        )
    return st.sampled_from(_CONTAINERS)


def _paths(node: Any, prefix: tuple = ()) -> list[tuple]:
    """The places of a tree, from the outside to the inside."""
    paths = [prefix] if prefix else []
    if isinstance(node, dict | list):
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            paths += _paths(child, (*prefix, key))
    return paths


@st.composite
def mutated(draw: Any, content: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A copy of a tree with one to three changes, and what they are."""
    tree, notes = copy.deepcopy(content), []
    for _ in range(draw(st.integers(1, 3))):
        paths = _paths(tree)
        if not paths:
            break
        *parents, key = draw(st.sampled_from(paths))
        node = tree
        for parent in parents:
            node = node[parent]
        way = draw(st.sampled_from(["alike", "alike", "alike", "other", "remove", "add", "twice"]))
        value = node[key]
        if way == "alike":
            node[key] = copy.deepcopy(draw(_alike(value)))
        elif way == "other":
            node[key] = copy.deepcopy(draw(st.sampled_from(_SCALARS + _CONTAINERS)))
        elif way == "remove":
            del node[key]
        elif way == "add" and isinstance(node, dict):
            name = draw(st.sampled_from(["banana", "ignore", "_BASE_", "id"]))
            node[name] = draw(st.sampled_from(_SCALARS))
        elif isinstance(node, list):
            node.insert(key, copy.deepcopy(value))
        notes.append(f"{way} {'.'.join(map(str, (*parents, key)))}: {value!r}"[:80])
    return tree, notes


@st.composite
def damaged(draw: Any, data: bytes) -> bytes:
    """The bytes of a file with a piece cut off, left out, changed or put in."""
    start = draw(st.integers(0, len(data)))
    length = draw(st.sampled_from([1, 2, 7, 64, len(data)]))
    way = draw(st.sampled_from(["cut", "leave out", "change", "put in"]))
    if way == "cut":
        return data[:start]
    if way == "leave out":
        return data[:start] + data[start + length :]
    noise = draw(st.binary(min_size=1, max_size=8))
    return data[:start] + noise + data[start + (len(noise) if way == "change" else 0) :]
