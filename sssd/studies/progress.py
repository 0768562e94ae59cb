"""Runs beside each other, as many at a time as there is room for, with the time that is left."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TypeVar

from ..disk import complaint

__all__ = ["complete", "failure"]

Run = TypeVar("Run")


def complete(
    runs: Sequence[Run],
    begin: Callable[[Run], Future],
    finished: Callable[[Run, Future], str],
    *,
    at_a_time: int,
    deadline: float = float("inf"),
    may_begin: Callable[[Run], bool] = lambda run: True,
) -> bool:
    """Makes runs in their order, and says after each how many are left, and how long they take.

    Args:
        runs: to be made.
        begin: gives one to a pool.
        finished: takes what has come of one; returns what to say of it.
        at_a_time: how many.
        deadline: no run begins after it (:func:`time.time`).
        may_begin: False for a run that has to wait for another one's end.

    Returns:
        Whether all were made.
    """
    waiting, running = list(runs), {}
    total, start, done = len(waiting), time.time(), 0

    def next_run() -> Run | None:
        return next(filter(may_begin, waiting), None)

    while waiting or running:
        while len(running) < at_a_time and time.time() < deadline and (run := next_run()):
            waiting.remove(run)
            running[begin(run)] = run
        if not running:
            return False
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            line = finished(running.pop(future), future)
            done += 1
            left = (time.time() - start) / done * (total - done)
            print(f"{line}; {done}/{total}, about {left / 60:.0f} min left", flush=True)
    return True


def failure(name: str, error: Exception) -> str:
    """What to say of a run that an error has ended; a sentence without its full stop."""
    reason = complaint(error) if isinstance(error, OSError) else str(error).removesuffix(".")
    return f"{name} has failed: {reason}"
