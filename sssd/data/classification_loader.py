"""Loaders of classification datasets, and pairs of images of the same class."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from detectron2.data import DatasetFromList, MapDataset
from detectron2.data.build import trivial_batch_collator
from detectron2.data.samplers import InferenceSampler, TrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from .classification_check import check_same_classes, read_dataset
from .classification_sources import DatasetError
from .coco_file import listed
from .train_loader import MappedRecords, ResumableLoader

Mapper = Callable[[dict[str, Any]], dict[str, Any]]


class SameClassPairs(Dataset):
    """A dataset whose samples carry a second image of their class (CS-KD, arXiv 2003.13964).

    Sample i is the mapped record i and, under "pair", the image of another record of its class,
    each other one being equally likely, mapped (and so augmented) on its own.

    The second index is drawn where the sample is made, from NumPy's global generator, as
    augmentations draw. So any sampler of single indices shards the pairs over processes and
    workers. The official code (alinlab/cs-kd) draws all indices in the main process by a batch
    sampler, which a distributed sampler cannot shard, and its pair may be the very same image,
    augmented anew.
    """

    def __init__(
        self, records: Sequence[dict[str, Any]], mapper: Mapper, classes: Sequence[str]
    ) -> None:
        """
        Args:
            records: dicts of a classification dataset.
            mapper: record -> sample with an "image".
            classes: names of the classes, for errors.

        Raises:
            DatasetError: a class has a single image.
        """
        labels = np.asarray([record["label"] for record in records], dtype=np.int64)
        counts = np.bincount(labels, minlength=len(classes))
        alone = np.flatnonzero(counts == 1)
        if len(alone):
            raise DatasetError(
                f"{len(alone)} of the {len(classes)} classes have a single image "
                f"({listed(classes[label] for label in alone)}), which cannot be paired with "
                "another one of its class, as CS-KD does: add images, or leave these classes out."
            )
        self._records = DatasetFromList(records, copy=False)
        self._mapper = mapper
        # Positions ordered by class, so that a class is a range of ranks.
        self._by_class = np.argsort(labels, kind="stable")
        self._rank = np.argsort(self._by_class)
        ends = np.cumsum(counts)
        self._start, self._count = (ends - counts)[labels], counts[labels]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self._mapper(self._records[index])
        other = self._records[self._draw(index)]
        return {**sample, "pair": self._mapper(other)["image"]}

    def _draw(self, index: int) -> int:
        """The position of another record of the same class."""
        rank = int(self._start[index]) + np.random.randint(self._count[index] - 1)
        return int(self._by_class[rank + (rank >= self._rank[index])])


def build_classification_train_loader(
    dataset_names: str | Sequence[str],
    mapper: Mapper,
    *,
    total_batch_size: int,
    num_workers: int,
    seed: int | None,
    pairs: bool = False,
) -> ResumableLoader:
    """An endless loader of shuffled batches, each image once in every pass over the data.

    Args:
        dataset_names: one name in Detectron2's ``DatasetCatalog``, or several, whose images are put
            together.
        mapper: record -> sample.
        total_batch_size: images a step, over all processes; each gets an equal part.
        num_workers: workers of each process.
        seed: of the order and of what each sample draws; None draws one, the same for all
            processes.
        pairs: adds "pair" to the samples, see ``SameClassPairs``.

    Returns:
        Of lists of samples.

    Raises:
        DatasetError: the data cannot be read, is empty, two datasets have other classes, or a class
            has a single image that needs a pair.
        ValueError: the batch cannot be divided among the processes.
    """
    names = [dataset_names] if isinstance(dataset_names, str) else list(dataset_names)
    if not names:
        raise DatasetError("There is no dataset to train on: name one in DATASETS.TRAIN.")
    contents = [read_dataset(name) for name in names]
    check_same_classes(*names)
    records = [record for part, _ in contents for record in part]
    if pairs:
        dataset: Dataset = SameClassPairs(records, mapper, contents[0][1])
    else:
        dataset = MappedRecords(DatasetFromList(records, copy=False), mapper)
    return ResumableLoader(
        dataset,
        lambda seed: TrainingSampler(len(records), seed=seed),
        total_batch_size=total_batch_size,
        num_workers=num_workers,
        seed=comm.shared_random_seed() if seed is None else seed,
    )


def build_classification_test_loader(
    dataset_name: str, mapper: Mapper, *, batch_size: int, num_workers: int
) -> DataLoader:
    """A loader that goes once, in order, through this process's share of a dataset.

    Args:
        dataset_name: a name in Detectron2's ``DatasetCatalog``.
        mapper: record -> sample.
        batch_size: images a batch of each process; the last one may have fewer.
        num_workers: workers of each process.

    Returns:
        Of lists of samples.

    Raises:
        DatasetError: the data cannot be read or is empty.
    """
    records, _ = read_dataset(dataset_name)
    dataset = MapDataset(DatasetFromList(records, copy=False), mapper)
    # Not build_detection_test_loader: on v0.6 its batches have one image.
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=InferenceSampler(len(dataset)),
        num_workers=num_workers,
        collate_fn=trivial_batch_collator,
    )
