"""Training batches as a function of the seed and of how many came before.

Which images make the n-th batch, and how each is augmented, depends on the seed and on the position
in the order of samples, and on nothing else: not on the number of workers, nor on what else draws
random numbers. So a training that goes on behind batch n sees what it would have seen without the
interruption, and all that must be kept is n.

Loaders that save the state of their workers (torchdata's StatefulDataLoader) go on with the same
workers only.
"""

import atexit
import logging
import multiprocessing
import signal
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, build_detection_train_loader
from detectron2.data.build import trivial_batch_collator
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from detectron2.utils.serialize import PicklableWrapper
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from ..random_state import seeded
from .errors import DataError

__all__ = [
    "MappedRecords",
    "ResumableLoader",
    "build_resumable_train_loader",
    "part_of_batch",
    "train_loader_from_config",
]

logger = logging.getLogger("sssd")

_RETRIES = 100


class MappedRecords(Dataset):
    """``mapper(record)`` for each record of a dataset."""

    def __init__(self, records: Dataset, mapper: Callable[[Any], Any]) -> None:
        self._records = records
        self._mapper = PicklableWrapper(mapper)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Any:
        return self._mapper(self._records[index])


class _SeededSamples(Dataset):
    """Samples by (position, index): what a sample draws depends on the seed and its position.

    An error that the user can mend is returned, not raised: out of a worker it would come back as
    the text of a traceback. Where the mapper leaves out an image (it returns None), another one,
    drawn at random, takes its place.
    """

    def __init__(self, samples: Dataset, seed: int) -> None:
        self._samples, self._seed = samples, seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        position, index = key
        with seeded(self._seed, position):
            try:
                for _ in range(_RETRIES):
                    sample = self._samples[index]
                    if sample is not None:
                        return sample
                    logger.warning(
                        "The mapper leaves out image %d: another takes its place.", index
                    )
                    index = int(np.random.randint(len(self._samples)))
            except DataError as error:
                return error
        return DataError(
            f"The mapper returned None for {_RETRIES} images in a row: there is nothing to train "
            "on; check what it leaves out."
        )


class ResumableLoader:
    """An endless loader of lists of samples that can go on behind any batch.

    Its state is how many samples all processes together have been given, and the seed.
    """

    def __init__(
        self,
        samples: Dataset,
        make_sampler: Callable[[int], Sampler],
        *,
        total_batch_size: int,
        num_workers: int,
        seed: int,
        groups: Sequence[Hashable] | None = None,
    ) -> None:
        """
        Args:
            samples: map-style dataset of mapped samples.
            make_sampler: seed -> endless sampler of indices, of this process's share.
            total_batch_size: images a batch, over all processes; each gets an equal part.
            num_workers: of each process.
            seed: from 0 on; the same in all processes.
            groups: for each sample the group that it is batched with; None for one group.

        Raises:
            ValueError: the batch cannot be divided among the processes.
        """
        processes = comm.get_world_size()
        if total_batch_size < 1 or total_batch_size % processes:
            raise ValueError(
                f"A batch of {total_batch_size} images cannot be divided among {processes} "
                f"processes: set SOLVER.IMS_PER_BATCH to a multiple of {processes}."
            )
        self.samples, self.make_sampler = samples, make_sampler
        self.total_batch_size, self.num_workers = total_batch_size, num_workers
        self.seed, self.groups = seed, groups
        self._given = 0  # batches of the present size

    def __iter__(self) -> Iterator[list[Any]]:
        """Goes on behind the batches that were given; those fetched ahead do not count."""
        order = self.order(self._given)
        dataset = _SeededSamples(self.samples, self.seed)
        common = {
            "num_workers": self.num_workers,
            "worker_init_fn": _leave_signals_to_the_parent,
            "generator": torch.Generator(),  # else the loader draws from the training's stream
        }
        # A sample at a time where they are large (so does Detectron2): as few of them as possible
        # wait in shared memory. The groups are what detectors have.
        if self.groups is None:
            loader = DataLoader(
                dataset, batch_sampler=order, collate_fn=trivial_batch_collator, **common
            )
        else:
            flat = (key for batch in order for key in batch)
            loader = DataLoader(
                dataset, sampler=flat, batch_size=None, collate_fn=_unchanged, **common
            )
        with _workers_killed_at_exit():
            batches: Iterator = iter(loader)
        if self.groups is not None:
            batches = _chunks(batches, self.batch_size)
        for batch in batches:
            for sample in batch:
                if isinstance(sample, DataError):
                    raise sample
            self._given += 1
            yield batch

    def order(self, start: int = 0) -> Iterator[list[tuple[int, int]]]:
        """(position, index) of the samples of each batch of this process, from batch ``start`` on.

        The position counts over all processes, whose samplers take turns.
        """
        return islice(self._order(), start, None)

    def _order(self) -> Iterator[list[tuple[int, int]]]:
        rank, processes = comm.get_rank(), comm.get_world_size()
        waiting: dict[Hashable, list[tuple[int, int]]] = defaultdict(list)
        for step, index in enumerate(self.make_sampler(self.seed)):
            group = waiting[None if self.groups is None else self.groups[index]]
            group.append((step * processes + rank, index))
            if len(group) == self.batch_size:
                yield list(group)
                group.clear()

    @property
    def batch_size(self) -> int:
        """Images a batch of this process."""
        return self.total_batch_size // comm.get_world_size()

    def state_dict(self) -> dict[str, int]:
        return {"samples": self._given * self.total_batch_size, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """For iterators that begin afterwards."""
        self._given, rest = divmod(state["samples"], self.total_batch_size)
        self.seed = state["seed"]
        if rest:
            logger.info(
                "The batch has another size than before: of the next images, %d come again.", rest
            )


def build_resumable_train_loader(
    dataset: Sequence[dict[str, Any]] | Dataset,
    *,
    mapper: Callable[[dict[str, Any]], Any],
    sampler: Sampler | None = None,
    total_batch_size: int,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 0,
    seed: int | None = None,
    make_sampler: Callable[[int], Sampler] | None = None,
) -> ResumableLoader:
    """Detectron2's ``build_detection_train_loader`` for a training that can be resumed exactly.

    The order of the samples and how they are batched are the same. For LazyConfig and for loops of
    one's own; :func:`train_loader_from_config` is for yacs.

    Args:
        dataset: records in Detectron2's format.
        mapper: record -> sample; None leaves the record out.
        sampler: endless, of this process's share; None for a ``TrainingSampler`` with ``seed``.
        total_batch_size: images a batch, over all processes.
        aspect_ratio_grouping: upright images come together, and so do wide ones.
        num_workers: of each process.
        seed: None draws one, the same for all processes.
        make_sampler: instead of ``sampler``: seed -> sampler.
    """
    seed = comm.shared_random_seed() if seed is None else seed
    groups = None
    if aspect_ratio_grouping:
        records = (dataset[i] for i in range(len(dataset)))
        groups = np.fromiter((d["width"] > d["height"] for d in records), bool, len(dataset))
    if isinstance(dataset, list):
        dataset = DatasetFromList(dataset, copy=False)
    if sampler is not None:
        make_sampler = lambda seed: sampler  # noqa: E731
    elif make_sampler is None:
        size = len(dataset)
        make_sampler = lambda seed: TrainingSampler(size, seed=seed)  # noqa: E731
    return ResumableLoader(
        MappedRecords(dataset, mapper),
        make_sampler,
        total_batch_size=total_batch_size,
        num_workers=num_workers,
        seed=seed,
        groups=groups,
    )


def train_loader_from_config(
    cfg: CfgNode, mapper: Callable[[dict[str, Any]], Any]
) -> Iterable[list[dict[str, Any]]]:
    """The loader of a yacs config, with the dataset and sampler that Detectron2 makes of it.

    A stream (a torch ``IterableDataset``) has no positions: it gets Detectron2's own loader, and a
    resume begins it anew.
    """
    from_config = build_detection_train_loader.from_config
    options = {**from_config(cfg, mapper=mapper), "total_batch_size": part_of_batch(cfg)}
    dataset = options.pop("dataset")
    del options["sampler"]
    if isinstance(dataset, IterableDataset):
        return build_detection_train_loader(dataset, **options)

    def make_sampler(seed: int) -> Sampler:
        # v0.6's samplers draw their seed from NumPy, and main's are given cfg.SEED.
        with seeded(seed):
            return from_config(cfg, mapper=mapper, dataset=dataset)["sampler"]

    return build_resumable_train_loader(
        dataset, **options, seed=None if cfg.SEED < 0 else cfg.SEED, make_sampler=make_sampler
    )


def part_of_batch(cfg: CfgNode) -> int:
    """Images that all processes together take at a time.

    Raises:
        ValueError: the batch cannot be divided into the parts that the config asks for.
    """
    size, parts = cfg.SOLVER.IMS_PER_BATCH, cfg.MODEL.SSSD.SOLVER.BATCH_PARTS
    if parts < 1 or size % parts:
        raise ValueError(
            f"A batch of {size} images (SOLVER.IMS_PER_BATCH) cannot be divided into {parts} equal "
            "parts: set MODEL.SSSD.SOLVER.BATCH_PARTS to a divisor of it."
        )
    return size // parts


def _chunks(samples: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while chunk := list(islice(samples, size)):
        yield chunk


def _unchanged(sample: Any) -> Any:
    return sample


def _leave_signals_to_the_parent(worker: int) -> None:
    # Schedulers and terminals signal the whole group of processes. The training ends in order, and
    # needs its workers for that.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _workers_killed_at_exit() -> Iterator[None]:
    """Workers that begin inside do not outlive the process, although they ignore SIGTERM.

    Python's own way, at the end of a process, is to send that and to wait.
    """
    before = multiprocessing.active_children()
    yield
    workers = [child for child in multiprocessing.active_children() if child not in before]
    if workers:
        atexit.register(_kill, workers)


def _kill(workers: Sequence[multiprocessing.Process]) -> None:
    # torch's handler would raise an error for each of them, with a traceback behind the last word.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in workers:
        if worker.is_alive():
            worker.kill()
