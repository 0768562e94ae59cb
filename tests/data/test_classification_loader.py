from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

from sssd.data.classification_loader import (
    SameClassPairs,
    build_classification_test_loader,
    build_classification_train_loader,
)
from sssd.data.classification_mapper import ClassificationMapper
from sssd.data.classification_sources import DatasetError

SIZES = (24, 2, 14)  # images of each class
COUNT = sum(SIZES)


def make_records():
    """Images filled with their position, which is also their id; the classes are mixed."""
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(3), SIZES))
    return [
        {"image": np.full((8, 8, 1), position, np.uint8), "label": int(k), "image_id": position}
        for position, k in enumerate(labels)
    ]


RECORDS = make_records()
LABEL_OF = {record["image_id"]: record["label"] for record in RECORDS}


@pytest.fixture(autouse=True)
def numbers():
    """The dataset "numbers", and others for single tests."""
    for name, records, classes in (
        ("numbers", RECORDS, ["a", "b", "c"]),
        ("swapped", RECORDS, ["b", "a", "c"]),
        ("lonely", [*RECORDS, {**RECORDS[0], "label": 3}], ["a", "b", "c", "d"]),
        ("empty", [], ["a"]),
        ("alike", [{**r, "image": RECORDS[9]["image"]} for r in RECORDS], ["a", "b", "c"]),
    ):
        DatasetCatalog.register(name, lambda records=records: records)
        MetadataCatalog.get(name).classes = classes
    yield
    for name in ("numbers", "swapped", "lonely", "empty", "alike"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def process(monkeypatch):
    """Makes this process the one of a rank, of so many processes."""

    def become(rank, processes):
        monkeypatch.setattr(comm, "get_world_size", lambda: processes)
        monkeypatch.setattr(comm, "get_rank", lambda: rank)

    return become


def still(is_train=True):
    return ClassificationMapper(is_train, 8, "none")


def augmented():
    return ClassificationMapper(True, 8, "crop_flip")


def train_batches(count, mapper=None, names="numbers", **options):
    options = {"total_batch_size": 4, "num_workers": 0, "seed": 5, **options}
    loader = build_classification_train_loader(names, mapper or still(), **options)
    return list(islice(loader, count))


def ids(batches):
    return [sample["image_id"] for batch in batches for sample in batch]


def test_batches_are_lists_of_samples():
    (batch,) = train_batches(1)
    assert isinstance(batch, list) and len(batch) == 4
    for sample in batch:
        assert set(sample) == {"image", "label", "image_id"}
        assert (sample["image"] == sample["image_id"]).all() and sample["image"].shape == (1, 8, 8)
        assert sample["label"] == LABEL_OF[sample["image_id"]]


def test_every_image_is_seen_once_in_a_pass():
    passes = ids(train_batches(COUNT // 2))
    first, second = passes[:COUNT], passes[COUNT:]
    assert sorted(first) == sorted(second) == list(range(COUNT))
    assert first != second and first != sorted(first)


def test_the_seed_decides_the_order():
    assert ids(train_batches(10)) == ids(train_batches(10))
    assert ids(train_batches(10)) != ids(train_batches(10, seed=6))
    assert sorted(ids(train_batches(10, seed=None))) == list(range(COUNT))


@pytest.mark.parametrize("workers", [0, 2])
def test_pairs_over_processes_and_workers(process, workers):
    """Each process makes its half of every batch, and the pass is complete."""
    seen, pairs = [], []
    for rank in range(2):
        process(rank, 2)
        batches = train_batches(COUNT // 4, pairs=True, num_workers=workers)
        assert {len(batch) for batch in batches} == {2}
        for sample in (sample for batch in batches for sample in batch):
            (pair,) = sample["pair"].unique().tolist()
            seen.append(sample["image_id"])
            pairs.append(pair)
    assert sorted(seen) == list(range(COUNT))
    assert [LABEL_OF[i] for i in seen] == [LABEL_OF[i] for i in pairs]
    assert all(i != pair for i, pair in zip(seen, pairs, strict=True))


def test_every_other_image_of_the_class_is_drawn_alike():
    dataset = SameClassPairs(RECORDS, still(), ["a", "b", "c"])
    assert len(dataset) == COUNT
    np.random.seed(0)
    for label, size in enumerate(SIZES):
        members = [i for i, k in LABEL_OF.items() if k == label]
        for index in (members[0], members[len(members) // 2], members[-1]):
            draws = 200 * (size - 1)
            counts = Counter(dataset._draw(index) for _ in range(draws))
            assert set(counts) == set(members) - {index}
            # 200 expected, standard deviation below 14.2: five of them
            assert all(abs(count - 200) < 71 for count in counts.values())


def test_the_pair_is_augmented_on_its_own():
    image = np.arange(1, 65, dtype=np.uint8).reshape(8, 8, 1)
    records = [{"image": image, "label": 0, "image_id": i} for i in range(2)]
    dataset = SameClassPairs(records, augmented(), ["a"])
    np.random.seed(0)
    torch.manual_seed(0)
    samples = [dataset[0] for _ in range(60)]
    same = sum(torch.equal(sample["image"], sample["pair"]) for sample in samples)
    assert 0 < same < 20  # 1 of 18 windows: 3.3 are expected
    assert all(set(sample) == {"image", "label", "image_id", "pair"} for sample in samples)


def images(batches, key="image"):
    return torch.stack([sample[key] for batch in batches for sample in batch])


def test_samples_draw_by_the_seed_whatever_the_workers_and_what_the_process_has_drawn():
    def run(global_seed, seed=5, num_workers=2):
        torch.manual_seed(global_seed)
        batches = train_batches(10, augmented(), num_workers=num_workers, pairs=True, seed=seed)
        return torch.stack([images(batches), images(batches, "pair")])

    first = run(1)
    assert torch.equal(first, run(2))
    assert torch.equal(first, run(3, num_workers=0))
    assert not torch.equal(first, run(1, seed=6))


def test_two_processes_draw_differently(process):
    """All images are alike, so what differs is the augmentation."""
    drawn = []
    for rank in range(2):
        process(rank, 2)
        torch.manual_seed(1)
        drawn.append(images(train_batches(10, augmented(), names="alike", num_workers=2)))
    assert not torch.equal(*drawn)


def test_several_datasets_are_put_together():
    doubled = Counter(ids(train_batches(COUNT // 2, names=["numbers", "numbers"])))
    assert doubled == dict.fromkeys(range(COUNT), 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_everything_once_and_in_order(process, workers):
    shares = []
    for rank in range(3):
        process(rank, 3)
        loader = build_classification_test_loader(
            "numbers", still(False), batch_size=5, num_workers=workers
        )
        batches = list(loader)
        assert [len(batch) for batch in batches] == ([5, 5, 4] if rank == 0 else [5, 5, 3])
        assert len(loader) == 3
        shares += ids(batches)
    assert shares == list(range(COUNT))


def test_bad_input(process):
    def raised(names="numbers", **options):
        with pytest.raises(ValueError) as caught:
            train_batches(1, names=names, **options)
        return caught.type, str(caught.value)

    kind, message = raised("lonely", pairs=True)
    assert kind is DatasetError and "1 of the 4 classes have a single image (d), which" in message
    assert len(train_batches(1, names="lonely")) == 1  # without pairs it does no harm
    kind, message = raised(["numbers", "swapped"])
    assert kind is DatasetError and "label 0 is 'a' in the dataset 'numbers' but 'b'" in message
    assert "'nonsense' is not registered" in raised(["numbers", "nonsense"])[1]
    assert "'empty' has no images" in raised("empty")[1]
    assert "name one in DATASETS.TRAIN" in raised([])[1]
    process(0, 3)
    assert "4 images cannot be divided among 3 processes" in raised()[1]
    with pytest.raises(DatasetError, match="'empty' has no images"):
        build_classification_test_loader("empty", still(), batch_size=1, num_workers=0)
