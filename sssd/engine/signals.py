"""Signals that end a program: SIGTERM, and the end of the time that it has."""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

__all__ = ["REASON", "STATUS", "limit_time", "signals_passed_on"]

# Exit status by signal: the usual one of a process that SIGTERM ends, and sysexits' "try again".
STATUS = {signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGALRM: 75}
REASON = {STATUS[signal.SIGTERM]: "SIGTERM came", STATUS[signal.SIGALRM]: "the time is over"}


def limit_time(seconds: float | None) -> None:
    """From now on this process has so many seconds; None for no limit.

    A training saves when they are over; before and between trainings there is nothing to save.
    """
    if seconds:
        signal.signal(signal.SIGALRM, lambda *args: sys.exit(STATUS[signal.SIGALRM]))
        signal.setitimer(signal.ITIMER_REAL, seconds)


@contextmanager
def signals_passed_on(processes: Sequence[Any]) -> Iterator[None]:
    """The signals go to other processes (with a ``pid``), which end in order; this one waits."""

    def pass_on(number: int, frame: Any) -> None:
        for process in processes:
            with suppress(ProcessLookupError):  # it has ended
                os.kill(process.pid, number)

    before = {number: signal.signal(number, pass_on) for number in STATUS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
