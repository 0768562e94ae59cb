import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MapDataset
from PIL import Image

from sssd.data import CheckedDatasetMapper, ImageError


@pytest.fixture
def cfg():
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN = (96, 128, 160)
    cfg.INPUT.CROP.ENABLED = True
    return cfg


@pytest.fixture
def record(tmp_path):
    """A good record of one 64x48 image."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    path = tmp_path / "cell.jpg"
    Image.fromarray(pixels).save(path)
    return {"file_name": str(path), "image_id": 1, "width": 64, "height": 48, "annotations": []}


def seeded(mapper, record):
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    mapped = mapper(record)
    # what is drawn next shows whether the two have used as much of the random streams
    return mapped, (random.random(), np.random.rand(), torch.rand(1).item())


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        if key == "instances":
            assert value.image_size == b[key].image_size
            assert torch.equal(value.gt_boxes.tensor, b[key].gt_boxes.tensor)
            assert torch.equal(value.gt_classes, b[key].gt_classes)
        elif isinstance(value, torch.Tensor):
            assert value.dtype == b[key].dtype and torch.equal(value, b[key])
        else:
            assert value == b[key]


@pytest.mark.parametrize("is_train", [True, False])
def test_good_images_are_mapped_as_by_detectron2(cfg, demo_root, monkeypatch, is_train):
    monkeypatch.setenv("SSSD_DEMO_ROOT", str(demo_root))
    ours, stock = CheckedDatasetMapper(cfg, is_train), DatasetMapper(cfg, is_train)
    for record in DatasetCatalog.get("sssd_demo_val")[:12]:
        (a, a_next), (b, b_next) = seeded(ours, record), seeded(stock, record)
        assert_same(a, b)
        assert a_next == b_next
    assert ("instances" in a) == is_train


def fail(cfg, record):
    """The message for a bad image, which has to be one sentence that names the file."""
    with pytest.raises(ImageError) as caught:
        CheckedDatasetMapper(cfg, True)(record)
    message = str(caught.value)
    assert record["file_name"] in message and message.endswith(".") and "\n" not in message
    assert caught.value.__cause__ is not None
    return message


def test_truncated_image(cfg, record):
    path = Path(record["file_name"])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "cannot be read (image file is truncated" in fail(cfg, record)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_not_an_image(cfg, record, content):
    Path(record["file_name"]).write_bytes(content)
    assert "cannot be read (" in fail(cfg, record)


def test_missing_image(cfg, record):
    record["file_name"] += ".gone"
    assert "does not exist: put it there" in fail(cfg, record)


def test_image_of_another_size(cfg, record):
    record["width"] = 65
    message = fail(cfg, record)
    assert "is 64x48 pixels (width x height) but its annotation says 65x48" in message


def test_errors_about_something_else_stay_themselves(cfg, record):
    record["annotations"] = [{"bbox": [0, 0, 1, 1]}]  # no bbox_mode
    with pytest.raises(KeyError, match="bbox_mode"):
        CheckedDatasetMapper(cfg, True)(record)


def test_the_sentence_comes_through_a_loader_worker(cfg, record):
    record["width"] = 65
    mapper = CheckedDatasetMapper(cfg, True)
    mapper = pickle.loads(pickle.dumps(mapper))  # as for a spawned worker
    loader = torch.utils.data.DataLoader(
        MapDataset([record], mapper), num_workers=1, batch_size=None
    )
    with pytest.raises(ImageError, match=r"cell\.jpg is 64x48 pixels .* says 65x48"):
        list(loader)
    error = pickle.loads(pickle.dumps(ImageError("a sentence")))
    assert type(error) is ImageError and str(error) == "a sentence"
