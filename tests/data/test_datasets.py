import importlib
import json
import logging
import os
import pickle
import shutil

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator

from sssd.data import datasets, demo
from sssd.data.datasets import dataset_files, is_coco_style


@pytest.fixture
def fresh_metadata():
    """Forgets what earlier tests loaded into the metadata of our datasets."""
    for name in (*datasets._BCCD, *datasets._DEMO):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    datasets.register_datasets()


@pytest.fixture
def bccd(tmp_path, monkeypatch):
    """A BCCD folder with one image and one box in each split, named by DETECTRON2_DATASETS."""
    (tmp_path / "bccd/annotations").mkdir(parents=True)
    (tmp_path / "bccd/images").mkdir()
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 30, "height": 20}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 9, "bbox": [1, 2, 3, 4]}],
        "categories": [{"id": 9, "name": "cell"}, {"id": 4, "name": "dust"}],
    }
    for split in ("train", "val", "test"):
        (tmp_path / f"bccd/annotations/instances_{split}.json").write_text(json.dumps(content))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return tmp_path / "bccd"


def test_root_is_read_when_the_dataset_is_used(bccd, fresh_metadata, monkeypatch):
    (record,) = DatasetCatalog.get("bccd_val")
    assert record["file_name"] == str(bccd / "images/a.jpg")
    assert record["annotations"][0]["category_id"] == 1  # 9 is the second of the sorted ids
    metadata = MetadataCatalog.get("bccd_val")
    assert metadata.thing_classes == ["dust", "cell"]
    assert metadata.thing_dataset_id_to_contiguous_id == {4: 0, 9: 1}
    assert metadata.evaluator_type == "coco"
    assert metadata.json_file == str(bccd / "annotations/instances_val.json")
    monkeypatch.setenv("DETECTRON2_DATASETS", "/elsewhere")
    assert metadata.image_root == "/elsewhere/bccd/images"
    assert metadata.as_dict()["json_file"] == "/elsewhere/bccd/annotations/instances_val.json"
    assert pickle.loads(pickle.dumps(metadata)).json_file == metadata.json_file
    monkeypatch.delenv("DETECTRON2_DATASETS")
    assert metadata.image_root == "datasets/bccd/images"


def test_missing_files_are_named_with_the_variable(bccd, monkeypatch):
    missing = bccd / "annotations/instances_val.json"
    missing.unlink()
    for call in (dataset_files, DatasetCatalog.get):
        with pytest.raises(FileNotFoundError) as caught:
            call("bccd_val")
        message = str(caught.value)
        assert str(missing) in message and "'bccd_val'" in message
        assert f"DETECTRON2_DATASETS (it is '{bccd.parent}')" in message
        assert "\n" not in message and message.endswith(".")
    shutil.rmtree(bccd / "images")
    with pytest.raises(FileNotFoundError, match=f"image folder.*{bccd / 'images'} and is not"):
        dataset_files("bccd_train")
    monkeypatch.delenv("DETECTRON2_DATASETS")
    with pytest.raises(FileNotFoundError, match=r"is not set, so \./datasets is searched"):
        dataset_files("bccd_train")


def test_importing_again_keeps_everything(caplog):
    loader, metadata = DatasetCatalog["bccd_val"], MetadataCatalog.get("bccd_val")
    datasets.register_datasets()
    assert DatasetCatalog["bccd_val"] is loader and MetadataCatalog.get("bccd_val") is metadata
    assert caplog.messages == []


def test_reloading_the_module_is_harmless(fresh_metadata, caplog):
    loader = DatasetCatalog["sssd_demo_val"]
    importlib.reload(datasets)
    assert DatasetCatalog["sssd_demo_val"] is loader
    assert datasets.is_coco_style("sssd_demo_val")
    assert caplog.messages == []


def test_a_name_taken_by_others_stays_theirs(caplog):
    ours, metadata = DatasetCatalog.pop("bccd_test"), MetadataCatalog.pop("bccd_test")
    DatasetCatalog.register("bccd_test", lambda: ["theirs"])
    try:
        with caplog.at_level(logging.WARNING):
            datasets.register_datasets()
        assert DatasetCatalog.get("bccd_test") == ["theirs"]
        (message,) = caplog.messages
        assert "'bccd_test' was already registered by other code" in message
    finally:
        DatasetCatalog["bccd_test"], MetadataCatalog["bccd_test"] = ours, metadata


def test_metadata_set_before_the_import_is_kept():
    ours, metadata = DatasetCatalog.pop("bccd_test"), MetadataCatalog.pop("bccd_test")
    MetadataCatalog.get("bccd_test").thing_colors = [(1, 2, 3)]
    try:
        datasets.register_datasets()
        assert MetadataCatalog.get("bccd_test").thing_colors == [(1, 2, 3)]
        assert MetadataCatalog.get("bccd_test").evaluator_type == "coco"
    finally:
        DatasetCatalog["bccd_test"], MetadataCatalog["bccd_test"] = ours, metadata


def test_demo_set_is_made_on_first_use_by_the_evaluator(tmp_path, monkeypatch, fresh_metadata):
    monkeypatch.setattr(demo, "SPLITS", {"train": 3, "val": 2})
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SSSD_DEMO_ROOT", raising=False)
    metadata = MetadataCatalog.get("sssd_demo_val")
    assert metadata.thing_classes == ["disc", "block", "triangle", "ring", "star"]
    assert is_coco_style("sssd_demo_val")
    assert metadata.image_root == "output/datasets/sssd_demo/images"
    assert metadata.as_dict()["image_root"] == metadata.image_root
    assert not (tmp_path / "output").exists()  # so far only names were asked for
    evaluator = COCOEvaluator("sssd_demo_val", output_dir=str(tmp_path))
    assert len(evaluator._coco_api.imgs) == 2


def test_demo_records_are_mapped_to_contiguous_classes(demo_root, monkeypatch, fresh_metadata):
    monkeypatch.setenv("SSSD_DEMO_ROOT", str(demo_root))
    records = DatasetCatalog.get("sssd_demo_train")
    assert len(records) == 320
    assert {a["category_id"] for r in records for a in r["annotations"]} == {0, 1, 2, 3, 4}
    assert MetadataCatalog.get("sssd_demo_train").thing_dataset_id_to_contiguous_id == {
        3: 0,
        7: 1,
        11: 2,
        19: 3,
        42: 4,
    }
    assert all(os.path.isfile(record["file_name"]) for record in records)


def test_a_dataset_of_the_users_own(bccd):
    json_file = str(bccd / "annotations/instances_val.json")
    for name, root in (("own_coco", str(bccd / "images")), ("own_full_names", "")):
        register_coco_instances(name, {}, json_file, root)
        try:
            assert is_coco_style(name)
            assert dataset_files(name) == (json_file, root)
        finally:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def test_names_without_coco_files_get_a_sentence():
    assert not is_coco_style("nonsense") and "nonsense" not in MetadataCatalog
    with pytest.raises(ValueError, match=r"'nonsense' is not registered: correct DATASETS\.TRAIN"):
        dataset_files("nonsense")
    assert not is_coco_style("voc_2007_val")
    with pytest.raises(ValueError, match="'voc_2007_val' was registered without a COCO"):
        dataset_files("voc_2007_val")


@pytest.mark.usefixtures("datasets_root")
@pytest.mark.parametrize(
    ("name", "images", "boxes"),
    [
        ("bccd_train", 205, 2804),
        ("bccd_val", 87, 1137),
        ("bccd_test", 72, 945),
        ("coco_2017_train", 80, 705),
        ("coco_2017_val", 80, 815),
    ],
)
def test_real_data(name, images, boxes):
    records = DatasetCatalog.get(name)
    assert len(records) == images
    assert sum(len(record["annotations"]) for record in records) == boxes
    assert dataset_files(name) == (
        MetadataCatalog.get(name).json_file,
        MetadataCatalog.get(name).image_root,
    )
    assert all(os.path.isfile(record["file_name"]) for record in records)
