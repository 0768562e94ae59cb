import hashlib
import importlib
import logging
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, cifar

from sssd.data import classification
from sssd.data.classification import LateClasses, register_image_folder, register_npz
from sssd.data.classification_check import check_classification_dataset, check_same_classes
from sssd.data.classification_sources import DatasetError, hold_out
from tests.conftest import REPOSITORY


@pytest.fixture(autouse=True)
def catalogs():
    """Takes out what a test registers, and forgets what it has read."""
    before = set(DatasetCatalog)
    yield
    for name in set(DatasetCatalog) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    for name in classification._OWN:
        vars(MetadataCatalog.get(name)).pop("classes", None)


def arrays(**changes):
    """The arrays of a good file: classes of 20 and 10 images, image i filled with the value i."""
    images = np.arange(30, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 5, 3), np.uint8)
    content = {
        "train_x": images,
        "train_y": np.repeat(np.array([1, 0], dtype=np.uint8), (20, 10)),
        "test_x": images[:3] + 100,
        "test_y": np.array([0, 1, 1]),
        "class_names": np.array(["cat", "dog"]),
    }
    return {key: value for key, value in {**content, **changes}.items() if value is not None}


def image_ids(name):
    return [record["image_id"] for record in DatasetCatalog.get(name)]


def labels(name):
    return [record["label"] for record in DatasetCatalog.get(name)]


def digest(ids):
    return hashlib.sha256(np.asarray(ids, dtype="<i8").tobytes()).hexdigest()[:16]


def raised(call, *args):
    """The message of the DatasetError, which has to be one sentence."""
    with pytest.raises(DatasetError) as caught:
        call(*args)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and ". " not in message
    return message


def test_digits():
    pytest.importorskip("sklearn")
    from sklearn.datasets import load_digits

    splits = {split: DatasetCatalog.get(f"digits_{split}") for split in classification.SPLITS}
    assert {split: len(records) for split, records in splits.items()} == {
        "train": 1076,
        "val": 362,
        "trainval": 1438,
        "test": 359,
    }
    assert MetadataCatalog.get("digits_val").classes == [str(digit) for digit in range(10)]
    source = load_digits()
    for record in splits["val"]:
        image, original = record["image"], source.images[record["image_id"]]
        assert image.shape == (8, 8, 1) and image.dtype == np.uint8
        assert record["label"] == source.target[record["image_id"]]
        np.testing.assert_array_equal(image[..., 0][original == 8], 128)  # 127.5
        np.testing.assert_array_equal(image[..., 0][original == 3], 48)  # 47.8
        np.testing.assert_array_equal(image[..., 0][original == 16], 255)


def test_splits_are_disjoint_and_complete():
    pytest.importorskip("sklearn")
    ids = {split: image_ids(f"digits_{split}") for split in classification.SPLITS}
    assert sorted(ids["train"] + ids["val"]) == ids["trainval"]
    assert sorted(ids["trainval"] + ids["test"]) == list(range(1797))
    assert ids["val"][:8] == [1, 16, 20, 22, 24, 50, 56, 74]  # never to change: results rest on it


def test_splits_keep_the_shares_of_the_classes():
    """scikit-learn's stratified split of the same sizes has the same numbers, but for rounding."""
    pytest.importorskip("sklearn")
    from sklearn.model_selection import train_test_split

    pool = labels("digits_trainval") + labels("digits_test")
    _, peer = train_test_split(pool, test_size=359, stratify=pool, random_state=0)
    counts = np.bincount(labels("digits_test"))
    assert np.abs(counts - np.bincount(peer)).max() <= 1
    shares = np.bincount(labels("digits_val")) / np.bincount(labels("digits_trainval"))
    assert np.abs(shares - 0.25).max() < 0.005


def test_the_splits_of_another_process_are_the_same():
    pytest.importorskip("sklearn")
    script = (
        "import sssd.data.classification, sys, numpy\n"
        "from detectron2.data import DatasetCatalog\n"
        "assert 'sklearn' not in sys.modules\n"  # importing touches no data
        "numpy.random.seed(7)\n"
        "print([r['image_id'] for r in DatasetCatalog.get('digits_val')])\n"
    )
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "5"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == str(image_ids("digits_val"))


def test_hold_out_by_hand():
    labels = np.array([3, 0, 3, 3, 0, 3, 7, 3, 3, 3, 3, 3, 3, 3, 3, 3])  # 13, 2 and 1
    state = np.random.get_state()[1].copy()
    kept, held = hold_out(labels, 0.2)
    assert np.array_equal(np.sort(np.concatenate([kept, held])), np.arange(16))
    assert np.bincount(labels[held]).tolist() == [1, 0, 0, 3]  # 2.6, and at least one of two
    assert 6 in kept  # a class of one image stays
    assert np.array_equal(kept, np.sort(kept)) and np.array_equal(held, np.sort(held))
    assert not np.array_equal(held[labels[held] == 3], np.flatnonzero(labels == 3)[:3])
    assert np.array_equal(state, np.random.get_state()[1])


def test_npz(tmp_path):
    path = tmp_path / "pets.npz"
    register_npz("pets", str(path))  # before there is such a file
    np.savez(path, **arrays())
    assert MetadataCatalog.get("pets_val").evaluator_type == "classification"
    assert MetadataCatalog.get("pets_val").classes == ["cat", "dog"]
    assert {split: len(image_ids(f"pets_{split}")) for split in classification.SPLITS} == {
        "train": 27,
        "val": 3,
        "trainval": 30,
        "test": 3,
    }
    assert sorted(labels("pets_val")) == [0, 1, 1]
    assert labels("pets_trainval") == [1] * 20 + [0] * 10
    for record in DatasetCatalog.get("pets_train"):
        assert record["image"].shape == (4, 5, 3) and (record["image"] == record["image_id"]).all()
        assert type(record["label"]) is int and type(record["image_id"]) is int
    assert [record["image"][0, 0, 0] for record in DatasetCatalog.get("pets_test")] == [
        100,
        101,
        102,
    ]
    assert not set(image_ids("pets_train")) & set(image_ids("pets_val"))


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"train_y": None}, ["lacks 'train_y' (it has 'train_x', ", "train_x, train_y, test_x"]),
        ({"train_x": arrays()["train_x"] / 255}, ["'train_x'", "float64", "(30, 4, 5, 3)"]),
        ({"train_x": arrays()["train_x"].transpose(0, 3, 1, 2)}, ["(30, 3, 4, 5)", "channels)"]),
        ({"train_x": arrays()["train_x"][..., 0]}, ["(30, 4, 5)", "(images, height, width"]),
        ({"train_x": np.uint8(3)}, ["'train_x'", "of the shape ()"]),
        (
            {"train_x": arrays()["train_x"][:0], "train_y": np.zeros(0, int)},
            ["(0, 4, 5, 3)", "one or more images"],
        ),
        ({"train_y": np.zeros(29, int)}, ["'train_y'", "(29,)", "(30,)"]),
        ({"train_y": np.zeros(30)}, ["'train_y'", "float64", "whole numbers"]),
        ({"train_y": np.eye(30, dtype=int)}, ["'train_y'", "(30, 30)"]),
        ({"train_y": np.arange(30) % 3}, ["label 2 at position 2", "outside 0..1", "10 of 30"]),
        ({"train_y": np.arange(30) % 2 - 1}, ["label -1 at position 0", "outside 0..1"]),
        ({"class_names": np.arange(2)}, ["'class_names'", "int64", "text"]),
        ({"class_names": np.array(["cat", 1], dtype=object)}, ["cannot be read", "objects"]),
    ],
)
def test_bad_npz(tmp_path, changes, fragments):
    path = str(tmp_path / "bad.npz")
    np.savez(path, **arrays(**changes))
    register_npz("bad", path)
    message = raised(DatasetCatalog.get, "bad_train")
    assert path in message
    for fragment in fragments:
        assert fragment in message


def test_unreadable_npz(tmp_path):
    path = tmp_path / "bad.npz"
    register_npz("bad", str(path))
    assert f"{path} does not exist" in raised(DatasetCatalog.get, "bad_test")
    np.savez_compressed(path, **arrays())
    path.write_bytes(path.read_bytes()[:-40])
    assert f"{path} cannot be read as an .npz" in raised(DatasetCatalog.get, "bad_test")
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))
    assert "it is a single array" in raised(DatasetCatalog.get, "bad_test")


def test_names_that_are_taken(tmp_path):
    register_image_folder("mine_val", str(tmp_path))
    assert "'mine_val' is already registered" in raised(register_npz, "mine", "a.npz")
    assert "mine_train" not in DatasetCatalog  # all four or none
    raised(register_image_folder, "mine_val", str(tmp_path))


def test_image_folder(tmp_path):
    for place in ("zebra/b.png", "zebra/a.JPG", "ant/deeper/c.png", "ant/d.jpeg"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5, 4)).save(tmp_path / place)
    (tmp_path / "ant/notes.txt").write_text("no image")
    register_image_folder("animals", str(tmp_path))
    assert MetadataCatalog.get("animals").classes == ["ant", "zebra"]
    assert DatasetCatalog.get("animals") == [
        {"file_name": str(tmp_path / place), "label": label, "image_id": image_id}
        for image_id, (place, label) in enumerate(
            [("ant/d.jpeg", 0), ("ant/deeper/c.png", 0), ("zebra/a.JPG", 1), ("zebra/b.png", 1)]
        )
    ]


def test_bad_image_folders(tmp_path):
    root = tmp_path / "animals"
    register_image_folder("animals", str(root))
    message = f"{root} does not exist or holds no folders"
    assert message in raised(DatasetCatalog.get, "animals")
    root.mkdir()
    assert message in raised(DatasetCatalog.get, "animals")
    for name in ("ant", "bee", "cow"):
        (root / name).mkdir()
    Image.new("RGB", (5, 4)).save(root / "bee/a.png")
    assert f"2 of the 3 class folders of {root} (ant, cow)" in raised(DatasetCatalog.get, "animals")


def test_imagenet(tmp_path, monkeypatch):
    for split in ("train", "val"):
        (tmp_path / f"imagenet/{split}/n01").mkdir(parents=True)
        Image.new("L", (5, 4)).save(tmp_path / f"imagenet/{split}/n01/{split}.png")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    (record,) = DatasetCatalog.get("imagenet_val")
    assert record["file_name"] == str(tmp_path / "imagenet/val/n01/val.png")


@pytest.mark.parametrize(
    ("dataset", "name", "folder", "keys"),
    [
        (CIFAR10, "cifar10", "cifar-10-batches-py", ("labels", "label_names")),
        (CIFAR100, "cifar100", "cifar-100-python", ("fine_labels", "fine_label_names")),
    ],
)
def test_cifar(tmp_path, monkeypatch, dataset, name, folder, keys):
    """CIFAR's own files are a download: small ones of the same layout, with the checksums off."""
    (tmp_path / folder).mkdir()
    for position, (file, _) in enumerate(dataset.train_list + dataset.test_list):
        content = {"data": np.full((20, 3072), position, np.uint8), keys[0]: [0] * 10 + [1] * 10}
        content["data"][:, 1024:2048] = 50  # green: the second of three planes
        (tmp_path / folder / file).write_bytes(pickle.dumps(content))
    meta = pickle.dumps({keys[1]: ["apple", "pear"]})
    (tmp_path / folder / dataset.meta["filename"]).write_bytes(meta)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    message = raised(DatasetCatalog.get, f"{name}_test")
    assert str(tmp_path / folder) in message and dataset.filename in message
    monkeypatch.setattr(cifar, "check_integrity", lambda *args: True)

    files = len(dataset.train_list)
    test = DatasetCatalog.get(f"{name}_test")
    assert len(test) == 20 and test[0]["image"].shape == (32, 32, 3)
    assert test[0]["image"][5, 7].tolist() == [files, 50, files]
    assert MetadataCatalog.get(f"{name}_test").classes == ["apple", "pear"]
    assert np.bincount(labels(f"{name}_val")).tolist() == [files, files]
    assert np.bincount(labels(f"{name}_train")).tolist() == [9 * files, 9 * files]
    both = image_ids(f"{name}_train") + image_ids(f"{name}_val")
    assert sorted(both) == image_ids(f"{name}_trainval") == list(range(20 * files))


def test_missing_data_is_named_with_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for name, place in (
        ("cifar10_small_val", "cifar10_small/cifar10_small.npz"),
        ("cifar10_train", "cifar-10-batches-py"),
        ("cifar100_trainval", "cifar-100-python"),
        ("imagenet_train", "imagenet/train"),
    ):
        message = raised(DatasetCatalog.get, name)
        assert f"at {tmp_path / place} and is not there" in message
        assert f"DETECTRON2_DATASETS (it is '{tmp_path}')" in message
    monkeypatch.delenv("DETECTRON2_DATASETS")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatasetError, match=r"is not set, so \./datasets is searched"):
        _ = MetadataCatalog.get("cifar10_small_val").classes


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "pip install scikit-learn" in raised(DatasetCatalog.get, "digits_val")


def test_metadata_is_filled_on_first_use(tmp_path):
    path = tmp_path / "pets.npz"
    np.savez(path, **arrays())
    register_npz("pets", str(path))
    metadata = MetadataCatalog.get("pets_test")
    assert "classes" not in metadata.as_dict()
    assert metadata.get("thing_classes") is None
    metadata.classes = ["cat", "dog"]  # Detectron2 refuses to change a value, and takes the same
    with pytest.raises(AssertionError):
        metadata.classes = ["dog", "cat"]
    assert pickle.loads(pickle.dumps(metadata)).as_dict()["classes"] == ["cat", "dog"]


def test_importing_again_keeps_everything(caplog):
    loader, metadata = DatasetCatalog["digits_val"], MetadataCatalog.get("digits_val")
    importlib.reload(classification)
    assert DatasetCatalog["digits_val"] is loader and MetadataCatalog.get("digits_val") is metadata
    assert type(metadata).__name__ == LateClasses.__name__
    assert caplog.messages == []


def test_a_name_taken_by_others_stays_theirs(caplog):
    ours, metadata = DatasetCatalog.pop("cifar10_val"), MetadataCatalog.pop("cifar10_val")
    DatasetCatalog.register("cifar10_val", lambda: ["theirs"])
    try:
        with caplog.at_level(logging.WARNING):
            classification.register_classification_datasets()
        assert DatasetCatalog.get("cifar10_val") == ["theirs"]
        (message,) = caplog.messages
        assert "'cifar10_val' was already registered by other code" in message
    finally:
        DatasetCatalog["cifar10_val"], MetadataCatalog["cifar10_val"] = ours, metadata


def register_records(name, records, **metadata):
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(**metadata)


def good_record(**changes):
    return {"image": np.zeros((2, 2, 1), np.uint8), "label": 0, "image_id": 0, **changes}


def test_check(tmp_path):
    path = tmp_path / "pets.npz"
    np.savez(path, **arrays())
    register_npz("pets", str(path))
    report = check_classification_dataset("pets_train", 2)
    assert report.images == 27 and report.images_of_class == {"cat": 9, "dog": 18}
    assert report.summary() == "pets_train: 27 images of 2 classes, 9 to 18 a class"
    message = raised(check_classification_dataset, "pets_train", 10)
    assert "has 2 classes (cat, dog) but the network is built for 10" in message
    assert "NUM_CLASSES to 2" in message


@pytest.mark.parametrize(
    ("record", "fragment"),
    [
        (good_record(label=2), "has the label 2: give it a whole number in 0..1"),
        (good_record(label=-1), "has the label -1"),
        (good_record(label=1.0), "has the label 1.0"),
        (good_record(label=None), "has the label None"),
        (good_record(image_id="a"), "has the image_id 'a'"),
        (good_record(image=None), "has no 'image' array and no 'file_name'"),
        (good_record(image=np.zeros((2, 2, 1))), "float64 and the shape (2, 2, 1)"),
        (good_record(image=np.zeros((3, 8, 8), np.uint8)), "uint8 and the shape (3, 8, 8)"),
    ],
)
def test_check_of_bad_records(record, fragment):
    register_records("own", [good_record(), record], classes=["a", "b"])
    message = raised(check_classification_dataset, "own", 2)
    assert message.startswith("Record 1 of the dataset 'own' ") and fragment in message


def test_check_of_bad_datasets():
    assert "'nonsense' is not registered" in raised(check_classification_dataset, "nonsense", 2)
    assert "nonsense" not in MetadataCatalog
    register_records("unnamed", [good_record()])
    assert "without class names" in raised(check_classification_dataset, "unnamed", 2)
    register_records("empty", [], classes=["a"])
    assert "'empty' has no images" in raised(check_classification_dataset, "empty", 1)


def test_labels_that_mean_something_else():
    for name, classes in (("a", ["x", "y"]), ("b", ["x", "y"]), ("c", ["x", "z"]), ("d", ["x"])):
        register_records(name, [good_record()], classes=classes)
    check_same_classes("a", "b")
    assert "label 1 is 'y' in the dataset 'a' but 'z' in 'c'" in raised(
        check_same_classes, "a", "b", "c"
    )
    assert "label 1 is 'y' in the dataset 'a' but no class in 'd'" in raised(
        check_same_classes, "a", "d"
    )


def test_cifar10_small(datasets_root):
    if not (datasets_root / "cifar10_small").is_dir():
        pytest.skip("real data: DETECTRON2_DATASETS has no folder cifar10_small")
    for split, per_class in (("train", 450), ("val", 50), ("trainval", 500), ("test", 100)):
        report = check_classification_dataset(f"cifar10_small_{split}", 10)
        assert set(report.images_of_class.values()) == {per_class}
    assert list(report.images_of_class)[:3] == ["airplane", "automobile", "bird"]
    both = image_ids("cifar10_small_train") + image_ids("cifar10_small_val")
    assert sorted(both) == list(range(5000))
    assert digest(image_ids("cifar10_small_val")) == "b1b4adc7b1657ace"
