"""Whatever is wrong with files, images and configs: an iteration, or a sentence and no traceback.

The cases are drawn by hypothesis from ``tests/hostile.py``, the same in each run: a few of each
kind by `make test`, the others, more than 2,000 in all, by `make test-long`.
"""

import copy
import io
import json
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import yaml
from detectron2.data import DatasetCatalog
from detectron2.engine import default_setup
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from sssd.data import CheckedDatasetMapper, ImageError
from sssd.data.annotations import check_annotation_file
from sssd.engine import Checkpointer, argument_parser, load_config
from sssd.engine.config_check import check_values

from .hostile import (
    HEIGHT,
    NAME,
    WIDTH,
    coco_content,
    config_content,
    damaged,
    ends_with,
    mutated,
    one_iteration,
    register,
    small_config,
    write_images,
)

DETECTORS = ("faster_rcnn", "retinanet", "fcos")
COCO = coco_content()


def cases(quick: int, others: int):
    """The number of cases, quick ones and long ones, and the seed that they are drawn with."""
    return pytest.mark.parametrize(
        ("number", "start"), [(quick, 1), pytest.param(others, 2, marks=pytest.mark.long)]
    )


def every(strategy: st.SearchStrategy, number: int, start: int, check: Callable[[Any], None]):
    """``check(case)`` for so many cases of a strategy."""
    options = settings(
        max_examples=number,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    seed(start)(options(given(strategy)(check)))()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a good dataset, where nothing is saved and little is said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Checkpointer, "save", lambda *args, **kwargs: None)
    write_images(tmp_path / "images")
    (tmp_path / "annotations.json").write_text(json.dumps(COCO))
    os.makedirs("output")
    # Nor kept by pytest, which would keep each error with its traceback, and so with its model.
    logging.disable(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield tmp_path
    logging.disable(logging.NOTSET)


def train_on(place, detector="faster_rcnn"):
    register(place)
    return ends_with(lambda: one_iteration(small_config(detector)))


def test_what_is_not_changed_trains(place):
    for detector in DETECTORS:
        assert train_on(place, detector) == ""


@cases(25, 700)
def test_annotation_files(place, number, start):
    trained, counted = [], []

    def check(case):
        content, _ = case
        (place / "annotations.json").write_text(json.dumps(content))
        sentence = train_on(place)
        trained.append(not sentence)
        if sentence:
            return
        report = check_annotation_file("annotations.json", 3)
        mapper = CheckedDatasetMapper(small_config(), is_train=True)
        try:
            records = [mapper(copy.deepcopy(record)) for record in DatasetCatalog.get(NAME)]
        except ImageError:  # an image that the iteration did not come to
            return
        # No box is lost without being counted.
        assert report.boxes == len(content["annotations"])
        assert report.usable_boxes == sum(len(r["instances"]) for r in records)
        counted.append(True)

    every(mutated(COCO), number, start, check)
    assert 0.1 < np.mean(trained) < 0.9
    assert len(counted) > sum(trained) / 2


@cases(10, 200)
def test_damaged_annotation_files(place, number, start):
    def check(data):
        (place / "annotations.json").write_bytes(data)
        train_on(place)

    every(damaged(json.dumps(COCO).encode()), number, start, check)


@cases(25, 800)
def test_configs(place, number, start):
    contents = {detector: config_content(detector) for detector in DETECTORS}
    trained = []

    def run():
        args = argument_parser().parse_args(["--config-file", "config.yaml"])
        cfg = load_config(args.config_file)
        check_values(cfg)
        default_setup(cfg, args)
        one_iteration(cfg)

    def check(case):
        (place / "config.yaml").write_text(yaml.safe_dump(case[0]))
        register(place)
        trained.append(not ends_with(run))

    every(st.sampled_from(DETECTORS).flatmap(lambda d: mutated(contents[d])), number, start, check)
    assert 0.1 < np.mean(trained) < 0.9


@st.composite
def images(draw):
    """Name, annotated size and bytes of a picture of any kind, which may be damaged."""
    size = draw(st.sampled_from([(WIDTH, HEIGHT)] * 3 + [(1, 1), (1, 300), (300, 1), (200, 3)]))
    mode = draw(st.sampled_from(["RGB", "L", "CMYK", "P", "1", "RGBA", "LA", "I;16", "I", "F"]))
    rng = np.random.default_rng(0)
    if mode in ("I;16", "I", "F"):
        dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        image = Image.fromarray(rng.integers(0, 60000, size[::-1]).astype(dtype))
    else:
        image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
        image = image.convert(mode)
    formats = {"RGB": ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"], "L": ["PNG", "JPEG", "TIFF"],
               "CMYK": ["JPEG", "TIFF"], "I": ["TIFF"], "F": ["TIFF"]}  # fmt: skip
    kind = draw(st.sampled_from(formats.get(mode, ["PNG"])))
    exif = Image.Exif()
    exif[0x0112] = draw(st.sampled_from([1, 1, 3, 6, 8]))  # which side is up
    file = io.BytesIO()
    image.save(file, kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}))
    data = file.getvalue()
    if draw(st.booleans()):
        data = draw(damaged(data))
    name = draw(st.sampled_from(["0.png", "0.jpg", "0", "ü 0.tiff"]))
    width, height = draw(st.sampled_from([size, size, size, size[::-1], (WIDTH + 1, HEIGHT)]))
    return name, width, height, data


@cases(25, 400)
def test_images(place, number, start):
    trained = []

    def check(case):
        name, width, height, data = case
        content = copy.deepcopy(COCO)
        content["images"] = [{**content["images"][0], "file_name": name, "width": width,
                              "height": height}]  # fmt: skip
        box = {"bbox": [0, 0, width, height], "segmentation": None}
        content["annotations"] = [{**content["annotations"][0], **box}]
        (place / "annotations.json").write_text(json.dumps(content))
        (place / "images" / name).write_bytes(data)
        sentence = train_on(place)
        assert not sentence or str(place / "images" / name) in sentence
        trained.append(not sentence)

    every(images(), number, start, check)
    assert 0.1 < np.mean(trained) < 0.9
