import hashlib
import io
import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sssd.data import demo

# Of all files of seed 0. A change of the pictures is legitimate, but it has to raise demo.VERSION,
# or caches keep the old ones: the two change together.
FINGERPRINT = (2, "407b0a5673e9ea19517159051795cf72a487609853378905735d7850d310f6c0")


def files_of(folder):
    folder = Path(folder)
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read(root, split):
    return json.loads((Path(root) / f"sssd_demo/annotations/instances_{split}.json").read_text())


@pytest.fixture
def tiny(monkeypatch):
    """Makes the demo set a few pictures small."""
    monkeypatch.setattr(demo, "SPLITS", {"train": 4, "val": 2})


def test_bytes_are_those_of_every_other_machine(demo_root):
    digest = hashlib.sha256()
    for name, content in files_of(demo_root / "sssd_demo").items():
        digest.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
    assert (demo.VERSION, digest.hexdigest()) == FINGERPRINT


def test_same_seed_same_bytes_other_seed_other_pictures(tiny, tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        demo.make_demo_dataset(str(tmp_path / name), seed)
    a, b, c = (files_of(tmp_path / name) for name in "abc")
    assert a == b
    pictures = [{v for k, v in files.items() if k.endswith(".png")} for files in (a, c)]
    assert not pictures[0] & pictures[1]


def test_png_holds_the_pixels():
    # more rows than fit into one stored block of 65535 bytes
    pixels = np.random.default_rng(0).integers(0, 256, (151, 187, 3), dtype=np.uint8)
    with Image.open(io.BytesIO(demo.encode_png(pixels))) as image:
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), pixels)


def test_annotations_fit_the_pictures(demo_root):
    for split, count in (("train", 320), ("val", 96)):
        content = read(demo_root, split)
        assert len(content["images"]) == count
        sizes = {}
        for entry in content["images"]:
            with Image.open(demo_root / "sssd_demo/images" / entry["file_name"]) as image:
                image.load()
                assert image.size == (entry["width"], entry["height"])
            sizes[entry["id"]] = image.size
            assert 150 <= min(image.size) <= 160 <= max(image.size) <= 192
        for entry in content["annotations"]:
            x, y, width, height = entry["bbox"]
            assert 0 <= x < x + width <= sizes[entry["image_id"]][0]
            assert 0 <= y < y + height <= sizes[entry["image_id"]][1]
            assert 0 < entry["area"] <= width * height


def test_set_is_varied_enough_to_learn_from(demo_root):
    content = read(demo_root, "train")
    labels = np.array([entry["category_id"] for entry in content["annotations"]])
    assert all((labels == number).sum() >= 150 for number in demo.CATEGORY_IDS)
    longest = np.array([max(entry["bbox"][2:]) for entry in content["annotations"]])
    assert longest.min() <= 14 and longest.max() >= 80
    shares = np.histogram(longest, bins=[0, 30, 50, 100])[0] / len(longest)
    assert shares.min() > 0.1
    empty = {e["id"] for e in content["images"]} - {a["image_id"] for a in content["annotations"]}
    assert 4 <= len(empty) <= 32


def test_names_and_ids_tell_nothing(demo_root):
    train, val = read(demo_root, "train"), read(demo_root, "val")
    for section, key in (("images", "id"), ("images", "file_name")):
        assert not {e[key] for e in train[section]} & {e[key] for e in val[section]}
    images = train["images"] + val["images"]
    annotations = train["annotations"] + val["annotations"]
    is_train = [1] * len(train["images"]) + [0] * len(val["images"])
    count = dict.fromkeys((image["id"] for image in images), 0)
    for entry in annotations:
        count[entry["image_id"]] += 1
    counts = [count[image["id"]] for image in images]
    names = [int(image["file_name"][:-4]) for image in images]
    ids = [image["id"] for image in images]
    labels = [entry["category_id"] for entry in annotations]
    areas = [entry["area"] for entry in annotations]
    numbers = [entry["id"] for entry in annotations]
    pairs = {
        "name-split": (names, is_train),
        "id-split": (ids, is_train),
        "name-count": (names, counts),
        "id-count": (ids, counts),
        "annotation-label": (numbers, labels),
        "annotation-area": (numbers, areas),
        "image-label": ([entry["image_id"] for entry in annotations], labels),
    }
    for content in (train, val):  # the place in the file says what the id says: nothing
        for section in ("images", "annotations"):
            assert content[section] == sorted(content[section], key=lambda entry: entry["id"])
    # the correlation of n independent pairs has a standard deviation of 1 / sqrt(n)
    deviations = {k: np.corrcoef(a, b)[0, 1] * len(a) ** 0.5 for k, (a, b) in pairs.items()}
    assert {key: value for key, value in deviations.items() if abs(value) > 3} == {}


def test_finished_set_is_kept(tiny, tmp_path, monkeypatch):
    demo.make_demo_dataset(str(tmp_path))
    before = files_of(tmp_path)
    monkeypatch.setattr(demo, "_write_set", lambda *_: pytest.fail("made again"))
    demo.make_demo_dataset(str(tmp_path))
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("change", ["version", "seed", "no stamp"])
def test_outdated_or_damaged_set_is_replaced(tiny, tmp_path, monkeypatch, change):
    demo.make_demo_dataset(str(tmp_path), seed=1)
    before = files_of(tmp_path / "sssd_demo")
    if change == "version":
        monkeypatch.setattr(demo, "VERSION", demo.VERSION + 1)
    if change == "no stamp":
        (tmp_path / "sssd_demo/stamp.json").unlink()
        next((tmp_path / "sssd_demo/images").iterdir()).unlink()
    demo.make_demo_dataset(str(tmp_path), seed=2 if change == "seed" else 1)
    assert (files_of(tmp_path / "sssd_demo") == before) == (change == "no stamp")
    assert len(files_of(tmp_path / "sssd_demo")) == 6 + 2 + 1
    assert {path.name for path in tmp_path.iterdir()} == {"sssd_demo", ".sssd_demo.lock"}


def test_interrupted_run_leaves_nothing(tiny, tmp_path, monkeypatch):
    calls = []

    def encode(pixels):
        calls.append(pixels)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return b""

    monkeypatch.setattr(demo, "encode_png", encode)
    with pytest.raises(KeyboardInterrupt):
        demo.make_demo_dataset(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [".sssd_demo.lock"]


def test_processes_at_once_leave_one_whole_set(tiny, tmp_path):
    together, alone = tmp_path / "together", tmp_path / "alone"
    demo.make_demo_dataset(str(together), seed=2)  # an outdated set is in everybody's way
    context = multiprocessing.get_context("fork")
    start = context.Barrier(4)

    def make():
        start.wait()
        demo.make_demo_dataset(str(together), seed=3)
        # an exit code other than 0 if this process sees less than a whole set
        assert demo._is_whole(str(together / "sssd_demo"), 3)
        assert len(files_of(together / "sssd_demo")) == 6 + 2 + 1

    processes = [context.Process(target=make) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    demo.make_demo_dataset(str(alone), seed=3)
    assert files_of(together / "sssd_demo") == files_of(alone / "sssd_demo")
    assert {path.name for path in together.iterdir()} == {"sssd_demo", ".sssd_demo.lock"}


def test_files_of_others_are_not_deleted(tiny, tmp_path):
    (tmp_path / "sssd_demo").mkdir()
    (tmp_path / "sssd_demo/thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"sssd_demo is not a demo set.*thesis\.tex.*move"):
        demo.make_demo_dataset(str(tmp_path))
    assert files_of(tmp_path / "sssd_demo") == {"thesis.tex": b"years of work"}


def test_unwritable_root_names_the_variable(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot be made in .*file.*SSSD_DEMO_ROOT"):
        demo.make_demo_dataset(str(tmp_path / "file"))
