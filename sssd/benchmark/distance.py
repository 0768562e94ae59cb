"""Time, saved memory and bandwidth of distances between two maps, forward and backward.

N: images, C: channels, H, W: height and width.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor

from .compare import quartiles
from .distance_rows import Distance, Row

__all__ = ["Case", "measure_distances", "saved_bytes"]

_CACHE = 2**28  # bytes, more than the last cache of a GPU


@dataclass(frozen=True)
class Case:
    """The maps that are compared.

    Attributes:
        shape: (N, C, H, W).
        device: of both.
        dtype: of both.
        masked: whether some of the cells are padding.
    """

    shape: tuple[int, int, int, int]
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    masked: bool = False

    def maps(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Random maps of student and teacher, and the mask: bool (N, H, W) or None."""
        generator = torch.Generator().manual_seed(0)
        student, teacher = (
            torch.randn(self.shape, generator=generator).to(self.device, self.dtype)
            for _ in range(2)
        )
        if not self.masked:
            return student, teacher, None
        images, _, height, width = self.shape
        mask = torch.ones(images, height, width, dtype=torch.bool, device=self.device)
        mask[:, height - height // 8 :] = False
        mask[1::2, :, width - width // 4 :] = False
        return student, teacher, mask


def measure_distances(
    case: Case,
    rows: Sequence[Row],
    *,
    rounds: int,
    repeats: int,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Runs distances in turns.

    Args:
        case: the maps.
        rows: the first one is what the others are compared with.
        rounds: turns of each.
        repeats: calls of a turn, after one that does not count.
        progress: is told what happens.

    Returns:
        ``map_bytes`` of one map; ``copy_bytes_per_second``, read and written by copying one map;
        ``rows``: for each its ``name``; median seconds ``forward``, ``backward`` and ``both``;
        ``ratio`` of both to the first row, median and quartiles over the rounds; ``saved_bytes``
        for the backward pass; ``bytes_per_second``, as if it read both maps once and wrote the
        gradient once; ``value`` of the distance.
    """
    student, teacher, mask = case.maps()
    calls = []
    for row in rows:
        progress(f"{case.shape}: prepares {row.name}")
        distance = row.build(student, teacher, mask)
        saved, value = saved_bytes(distance.compute)
        calls.append(_Call(row.name, distance, saved, value.item()))
        calls[-1].run(3)  # with what is compiled in the first backward pass
    copied = torch.empty_like(student)
    copies: list[float] = []
    for i in range(rounds):
        progress(f"{case.shape}: round {i + 1}/{rounds}")
        copies += (a for a, _ in _timed(case.device, repeats, lambda: copied.copy_(student)))
        for call in calls:
            call.turns.append(call.run(repeats))
    map_bytes = student.numel() * student.element_size()
    return {
        "map_bytes": map_bytes,
        "copy_bytes_per_second": 2 * map_bytes / statistics.median(copies),
        "rows": [call.summary(calls[0], 3 * map_bytes) for call in calls],
    }


def saved_bytes(compute: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """What autograd keeps for the backward pass of a call, inputs that it keeps included.

    Args:
        compute: the forward pass.

    Returns:
        Bytes, each storage once, and what ``compute`` returned.
    """
    storages: dict[int, torch.UntypedStorage] = {}  # kept, so that no address comes twice

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        storages[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = compute()
    return sum(storage.nbytes() for storage in storages.values()), result.detach()


class _Call:
    def __init__(self, name: str, distance: Distance, saved: int, value: float) -> None:
        self.name, self._distance, self._saved, self._value = name, distance, saved, value
        self.turns: list[list[tuple[float, float]]] = []

    def run(self, repeats: int) -> list[tuple[float, float]]:
        """Seconds of the forward and of the backward pass of each call."""
        leaf = self._distance.leaf

        def backward(value: Tensor) -> None:
            leaf.grad = None
            value.backward()

        return list(_timed(leaf.device.type, repeats, self._distance.compute, backward))

    def summary(self, first: "_Call", least_bytes: int) -> dict[str, Any]:
        both = statistics.median(self._both(chain.from_iterable(self.turns)))
        ratios = [
            statistics.median(self._both(own)) / statistics.median(self._both(reference))
            for own, reference in zip(self.turns, first.turns, strict=True)
        ]
        return {
            "name": self.name,
            "forward": statistics.median(f for turn in self.turns for f, _ in turn),
            "backward": statistics.median(b for turn in self.turns for _, b in turn),
            "both": both,
            "ratio": quartiles(ratios),
            "saved_bytes": self._saved,
            "bytes_per_second": least_bytes / both,
            "value": self._value,
        }

    @staticmethod
    def _both(turn: Any) -> list[float]:
        return [forward + backward for forward, backward in turn]


def _timed(
    device: str,
    repeats: int,
    forward: Callable[[], Any],
    backward: Callable[[Any], None] = lambda value: None,
) -> Iterator[tuple[float, float]]:
    """Seconds of both passes, ``repeats`` times, after one that does not count.

    On a GPU the caches are overwritten before each, which also hides the time that it takes to
    start the first kernel.
    """
    is_cuda = device.startswith("cuda")
    flushed = torch.empty(_CACHE if is_cuda else 0, dtype=torch.int8, device=device)
    for i in range(repeats + 1):
        if is_cuda:
            flushed.zero_()
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
            marks[0].record()
            value = forward()
            marks[1].record()
            backward(value)
            marks[2].record()
            torch.cuda.synchronize(device)
            seconds = tuple(a.elapsed_time(b) / 1e3 for a, b in pairwise(marks))
        else:
            start = time.perf_counter()
            value = forward()
            middle = time.perf_counter()
            backward(value)
            seconds = middle - start, time.perf_counter() - middle
        if i:
            yield seconds
