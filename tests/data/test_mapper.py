import copy
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MapDataset, detection_utils
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


def test_errors_about_something_else_name_the_image_and_the_place(cfg, record):
    record["annotations"] = [{"bbox": [0, 0, 1, 1]}]  # no bbox_mode
    message = fail(cfg, record)
    assert "can be read, but not be prepared (KeyError in data/detection_utils.py, line" in message
    assert "'bbox_mode')" in message


def save(record, image, name, **options):
    path = Path(record["file_name"]).parent / name
    image.save(path, **options)
    record.update(file_name=str(path), width=image.width, height=image.height)


def picture(width=64, height=48):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6  # its top is on the right
    return exif


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("gray.jpg", "L", {}),
        ("cmyk.jpg", "CMYK", {}),
        ("palette.png", "P", {}),
        ("bits.png", "1", {}),
        ("alpha.png", "RGBA", {}),
        ("gray_alpha.png", "LA", {}),
        ("moving.gif", "P", {"save_all": True, "append_images": [picture(), picture()]}),
        ("wrong_name.png", "RGB", {"format": "JPEG"}),
    ],
)
def test_unusual_images_are_read_as_by_detectron2(cfg, record, name, mode, options):
    save(record, picture().convert(mode), name, **options)
    mapper, stock = CheckedDatasetMapper(cfg, False), DatasetMapper(cfg, False)
    mapped = mapper(copy.deepcopy(record))["image"]
    assert torch.equal(mapped, stock(copy.deepcopy(record))["image"])
    assert mapped.shape[0] == 3 and mapped.float().std() > 20


def test_a_rotated_image_has_the_size_that_it_is_shown_with(cfg, record):
    save(record, picture(), "rotated.jpg", exif=rotated())
    assert "is 48x64 pixels (width x height) but its annotation says 64x48" in fail(cfg, record)
    record.update(width=48, height=64)
    image = CheckedDatasetMapper(cfg, True)(record)["image"]
    assert image.shape[1] > image.shape[2]


@pytest.mark.parametrize(
    ("name", "dtype", "mode"),
    [("deep.png", np.uint16, "I;16"), ("deep.tiff", np.int32, "I"), ("real.tiff", np.float32, "F")],
)
def test_more_than_8_bits_are_refused_and_not_cut_off(cfg, record, name, dtype, mode):
    save(record, Image.fromarray((np.arange(48 * 64).reshape(48, 64) * 20).astype(dtype)), name)
    assert (
        detection_utils.read_image(record["file_name"], "BGR").mean() > 250
    )  # in stock Detectron2
    message = fail(cfg, record)
    assert f"has more than 8 bits a channel (mode {mode})" in message
    assert "convert it to 8 bits" in message


def test_one_pixel_and_a_line_that_vanishes(cfg, record):
    save(record, picture(1, 1), "pixel.png")
    record["annotations"] = []
    assert CheckedDatasetMapper(cfg, True)(copy.deepcopy(record))["image"].shape[0] == 3
    save(record, picture(1, 5000), "line.png")
    message = fail(cfg, record)
    assert "can be read, but not be prepared (ValueError in" in message and "INPUT" in message


def test_a_huge_image_is_read_or_named(cfg, record, monkeypatch):
    save(record, Image.new("RGB", (6000, 5000)), "large.png")
    record["annotations"] = []
    assert max(CheckedDatasetMapper(cfg, True)(copy.deepcopy(record))["image"].shape) < 6000
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**7)
    message = fail(cfg, record)
    assert "is too large" in message and "scale it down together with its annotations" in message


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
