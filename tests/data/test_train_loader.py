import logging
import random
from itertools import islice

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, build_detection_train_loader
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm

from sssd.data import DataError, build_resumable_train_loader, train_loader_from_config
from sssd.random_state import random_state, seeded, set_random_state
from tests.coco_files import register_coco
from tests.detectors import tiny_config

# Ten images, upright and wide ones.
RECORDS = [
    {"image_id": i, "width": 4 if i % 3 else 2, "height": 3, "file_name": f"{i}.png"}
    for i in range(10)
]


def drawn(record):
    """A sample with a number of each generator that augmentations draw from."""
    numbers = (random.random(), float(np.random.rand()), float(torch.rand(())))
    return {**record, "numbers": numbers}


def loader(mapper=drawn, *, seed=7, batch=2, records=RECORDS, **options):
    options = {"total_batch_size": batch, "seed": seed, **options}
    return build_resumable_train_loader(records, mapper=mapper, **options)


def take(batches, count):
    return list(islice(batches, count))


def ids(batches):
    return [[sample["image_id"] for sample in batch] for batch in batches]


@pytest.mark.parametrize("grouping", [True, False])
def test_images_come_in_the_order_and_the_batches_of_detectron2(grouping):
    stock = build_detection_train_loader(
        RECORDS, mapper=drawn, sampler=TrainingSampler(len(RECORDS), seed=7), total_batch_size=3,
        aspect_ratio_grouping=grouping,
    )  # fmt: skip
    ours = loader(batch=3, aspect_ratio_grouping=grouping)
    assert ids(take(ours, 12)) == ids(take(stock, 12))


@pytest.mark.parametrize("grouping", [True, False])
def test_the_number_of_workers_changes_nothing(grouping):
    alone = take(loader(aspect_ratio_grouping=grouping), 12)
    for workers in (2, 4):
        assert take(loader(num_workers=workers, aspect_ratio_grouping=grouping), 12) == alone


@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 4), (4, 0)])
@pytest.mark.parametrize("grouping", [True, False])
def test_a_loader_goes_on_behind_any_batch_with_any_workers(before, after, grouping):
    whole = take(loader(aspect_ratio_grouping=grouping), 14)
    for behind in (0, 1, 6):  # 6: in the second pass over the images
        first = loader(num_workers=before, aspect_ratio_grouping=grouping)
        begun = take(first, behind)
        second = loader(seed=99, num_workers=after, aspect_ratio_grouping=grouping)
        second.load_state_dict(first.state_dict())
        assert begun + take(second, 14 - behind) == whole


def test_an_iterator_made_before_the_state_is_loaded_goes_on_too():
    """Detectron2 v0.6's trainer makes its iterator when it is built."""
    other = loader()
    iterator = iter(other)
    other.load_state_dict({"samples": 8, "seed": 7})
    assert take(iterator, 3) == take(loader(), 7)[4:]


def test_the_training_s_streams_are_left_alone():
    before = random_state()
    take(loader(), 4)
    after = random_state()
    assert before["python"] == after["python"]
    assert torch.equal(before["numpy"][1], after["numpy"][1])
    assert torch.equal(before["torch"], after["torch"])


def test_streams_are_put_back_as_they_were():
    state = random_state()

    def draw():
        return random.gauss(0, 1), np.random.randn(3).tolist(), torch.rand(3).tolist()

    first = draw()
    set_random_state(state)
    assert draw() == first
    with seeded(1, 2):
        inside = draw()
    with seeded(1, 2):
        assert draw() == inside
    with seeded(1, 3):
        assert draw() != inside


def test_each_sample_draws_its_own_numbers():
    samples = [sample["numbers"] for batch in take(loader(), 20) for sample in batch]
    for generator in zip(*samples, strict=True):
        assert len(set(generator)) == 40  # four passes over ten images


def test_two_processes_share_the_samples_of_one(monkeypatch):
    whole = take(loader(batch=4, aspect_ratio_grouping=False), 6)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    halves = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(
            "detectron2.data.samplers.distributed_sampler.comm.get_rank", lambda rank=rank: rank
        )
        halves.append(take(loader(batch=4, aspect_ratio_grouping=False), 6))
    for batch, *parts in zip(whole, *halves, strict=True):
        assert batch[0::2] == parts[0] and batch[1::2] == parts[1]


def test_with_another_batch_size_no_image_is_left_out(caplog):
    first = loader(batch=4, aspect_ratio_grouping=False)
    take(first, 2)
    second = loader(batch=3, aspect_ratio_grouping=False)
    caplog.set_level(logging.INFO, "sssd")
    second.load_state_dict(first.state_dict())
    whole = [
        i for batch in ids(take(loader(batch=1, aspect_ratio_grouping=False), 12)) for i in batch
    ]
    assert ids(take(second, 2)) == [whole[6:9], whole[9:12]]
    assert "2 come again" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_the_mapper_leaves_out_is_replaced_by_another(workers):
    def even(record):
        return record if record["image_id"] % 2 == 0 else None

    batches = take(loader(even, num_workers=workers, aspect_ratio_grouping=False), 10)
    numbers = [i for batch in ids(batches) for i in batch]
    assert len(numbers) == 20 and not any(i % 2 for i in numbers)
    assert batches == take(loader(even, aspect_ratio_grouping=False), 10)


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_for_people_come_out_of_the_workers_as_they_are(workers):
    def broken(record):
        raise DataError(f"The image {record['image_id']} is broken.")

    with pytest.raises(DataError, match=r"^The image \d is broken\.$"):
        take(loader(broken, num_workers=workers), 1)
    with pytest.raises(DataError, match="^The mapper returned None for 100 images in a row"):
        take(loader(lambda record: None, num_workers=workers), 1)


@pytest.mark.parametrize(
    ("sampler", "option"),
    [
        ("TrainingSampler", ()),
        ("RepeatFactorTrainingSampler", ("DATALOADER.REPEAT_THRESHOLD", 1.0)),
        ("RandomSubsetTrainingSampler", ("DATALOADER.RANDOM_SUBSET_RATIO", 0.5)),
    ],
)
@pytest.mark.parametrize("seed", [-1, 3])
def test_every_sampler_of_a_config_goes_on(tmp_path, sampler, option, seed):
    if option and option[0].split(".")[1] not in get_cfg().DATALOADER:
        pytest.skip(f"this Detectron2 has no {option[0]}, which {sampler} reads")
    name = register_coco("loader_coco", tmp_path / "data")
    cfg = tiny_config(
        "DATASETS.TRAIN", (name,), "SEED", seed, "SOLVER.IMS_PER_BATCH", 2,
        "DATALOADER.SAMPLER_TRAIN", sampler, *option,
    )  # fmt: skip

    def build():
        np.random.seed(None)
        return train_loader_from_config(cfg, lambda record: record)

    first = build()
    whole = take(first, 9)
    state = first.state_dict()
    assert state["samples"] == 18
    second = build()
    second.load_state_dict({**state, "samples": 8})
    assert ids(take(second, 5)) == ids(whole[4:])
    images = {i for batch in ids(whole) for i in batch}
    half = sampler == "RandomSubsetTrainingSampler"
    assert len(images) == len(DatasetCatalog.get(name)) // (2 if half else 1)


def test_a_batch_that_cannot_be_divided_is_a_sentence(monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    with pytest.raises(ValueError, match="2 images cannot be divided among 3 processes"):
        loader()
