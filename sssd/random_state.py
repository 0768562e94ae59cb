"""The random streams of a process: Python's, NumPy's and torch's."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["random_state", "seeded", "set_random_state", "undisturbed"]


def random_state(device: torch.device | None = None) -> dict[str, Any]:
    """The states of this process's global generators, as ``torch.load(weights_only=True)`` admits.

    Args:
        device: a CUDA device whose stream belongs to it; None or another device for none.
    """
    name, words, *position = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(words.astype(np.int64)), *position),
        "torch": torch.get_rng_state(),
    }
    if device is not None and device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device | None = None) -> None:
    """Puts back what :func:`random_state` returned; a CUDA stream only where there is a device."""
    random.setstate(state["python"])
    name, words, *position = state["numpy"]
    np.random.set_state((name, words.numpy().astype(np.uint32), *position))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and device is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Random numbers drawn inside are not missing from the CPU's streams outside."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)


@contextmanager
def seeded(*words: int) -> Iterator[None]:
    """Seeds the generators of the CPU by ``words``, and gives the streams back as they were.

    Args:
        words: numbers from 0 on; each sequence of them gives independent streams.
    """
    seeds = np.random.SeedSequence(words).generate_state(3)
    with undisturbed():
        random.seed(int(seeds[0]))
        np.random.seed(int(seeds[1]))
        # Not torch.manual_seed, which seeds CUDA's streams as well.
        torch.default_generator.manual_seed(int(seeds[2]))
        yield
