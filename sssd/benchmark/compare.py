"""Compares the step time and the memory of trainings, interleaved in one run.

Machines are never quiet, and the times of two runs of one program differ by more than many methods
do. So the trainings take turns, a few steps each, A B C A B C ..., and what is compared is what
lies side by side: the ratio to the first one in each round.
"""

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from .inference import compare_inference
from .jobs import Job
from .worker import Worker

__all__ = ["measure", "measure_inference", "quartiles", "summarise", "take_turns"]

TURN = ("began", "ended", "step_seconds", "data_seconds")  # what is kept of each turn


class TakesTurns(Protocol):
    """What runs steps when it is asked to: a `Worker`, in this process or another."""

    def run(self, count: int) -> dict[str, Any]:
        """Runs ``count`` steps and returns what they cost."""


def take_turns(
    workers: Sequence[TakesTurns],
    rounds: int,
    steps: int,
    progress: Callable[[str], None] = lambda text: None,
) -> list[list[dict[str, Any]]]:
    """Lets one worker at a time run, A B C A B C ...

    Args:
        workers: those that take turns.
        rounds: turns of each.
        steps: of a turn.
        progress: is told of every round.

    Returns:
        For each worker, what each of its turns gave.
    """
    turns: list[list[dict[str, Any]]] = [[] for _ in workers]
    for i in range(rounds):
        progress(f"round {i + 1}/{rounds}")
        for worker, own in zip(workers, turns, strict=True):
            own.append(worker.run(steps))
    return turns


def measure(
    jobs: Sequence[Job],
    *,
    rounds: int,
    steps: int,
    warmup: int,
    breakdown: int = 0,
    exports: Sequence[Path] = (),
    progress: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Compares trainings.

    Args:
        jobs: the first one is what the others are compared with.
        rounds: turns of each.
        steps: of a turn.
        warmup: steps of each before the first round, which are left out.
        breakdown: steps of each that run under the profiler at the end; 0 for none.
        exports: for each job the file that its student is written to, for `measure_inference`.
        progress: is told what happens.

    Returns:
        For each job what `summarise` gives, and what it is; with ``breakdown``, under that key,
        what `sssd.benchmark.breakdown.read_profile` gives.

    Raises:
        BenchmarkError: a training failed.
    """
    with ExitStack() as stack:
        workers = []
        for i, job in enumerate(jobs):
            progress(f"{i + 1}/{len(jobs)} builds {job.name}")
            worker = Worker(job)
            stack.callback(worker.close)
            if exports:
                worker.ask("export", str(exports[i]))
            worker.ask("warm_up", warmup)
            workers.append(worker)
        turns = take_turns(workers, rounds, steps, progress)
        descriptions = [worker.description for worker in workers]
        if breakdown:
            progress("breakdown of the steps")
            for worker, description in zip(workers, descriptions, strict=True):
                description["breakdown"] = worker.ask("breakdown", breakdown)
    summaries = summarise(turns)
    return [
        {
            "name": job.name,
            "config_file": job.config_file,
            "stage": job.stage,
            "random_instead_of": job.download,
            **description,
            **summary,
        }
        for job, description, summary in zip(jobs, descriptions, summaries, strict=True)
    ]


def measure_inference(
    jobs: Sequence[Job],
    exports: Sequence[Path],
    *,
    rounds: int,
    passes: int,
    warmup: int,
    progress: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Compares what is left of the configs after training: the exported students.

    Args:
        jobs: the first one is what the others are compared with.
        exports: for each job the file that `measure` has written.
        rounds: turns of each.
        passes: of a turn, of one image each.
        warmup: passes of each before the first round.
        progress: is told what happens.

    Returns:
        For each job its ``name`` and number of ``parameters``, what `summarise` gives (a step is a
        pass) and what `sssd.benchmark.inference.compare_inference` gives.

    Raises:
        BenchmarkError: it failed.
    """
    with ExitStack() as stack:
        workers = []
        for i, (job, path) in enumerate(zip(jobs, exports, strict=True)):
            progress(f"{i + 1}/{len(jobs)} builds {job.name} for inference")
            worker = Worker(job, "inference", str(path))
            stack.callback(worker.close)
            worker.ask("warm_up", warmup)
            workers.append(worker)
        turns = take_turns(workers, rounds, passes, progress)
    named = [{"name": worker.job.name, **worker.description} for worker in workers]
    return [
        {"name": one["name"], "parameters": one["parameters"], **compared, **summary}
        for one, compared, summary in zip(
            named, compare_inference(named), summarise(turns), strict=True
        )
    ]


def summarise(turns: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Medians and ratios.

    Args:
        turns: of `take_turns`; those of the first worker are what the ratios refer to.

    Returns:
        For each worker

        - ``step_seconds``: median over all steps;
        - ``ratio``: ``median`` and quartiles ``q1`` and ``q3``, over the rounds, of the median
          step of the round divided by that of the first worker in the same round;
        - ``images_per_second``: of such a step, without loading (a pair of images counts once);
        - ``data_seconds``: median time to load a batch, no part of the step;
        - ``memory``: bytes at the ``peak``, those ``before`` that do not count, and ``above``, the
          difference; ``memory_ratio``: of ``above`` to that of the first. None where unknown;
        - ``batch_size``, and ``turns``: when each began and ended, and the times of its steps.
    """
    of_first = [statistics.median(turn["step_seconds"]) for turn in turns[0]]
    summaries = []
    for own in turns:
        of_own = [statistics.median(turn["step_seconds"]) for turn in own]
        ratios = [x / first for x, first in zip(of_own, of_first, strict=True)]
        step = statistics.median(x for turn in own for x in turn["step_seconds"])
        memory = own[-1]["memory"]
        known = memory["peak"] is not None
        above = memory["peak"] - memory["before"] if known else None
        first_above = summaries[0]["memory"]["above"] if summaries else above
        summaries.append(
            {
                "step_seconds": step,
                "ratio": quartiles(ratios),
                "images_per_second": own[0]["batch_size"] / step,
                "data_seconds": statistics.median(x for t in own for x in t["data_seconds"]),
                "memory": {**memory, "above": above},
                "memory_ratio": above / first_above if known and first_above else None,
                "batch_size": own[0]["batch_size"],
                "turns": [{key: turn[key] for key in TURN} for turn in own],
            }
        )
    return summaries


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """``median``, ``q1`` and ``q3`` of at least one value."""
    if len(values) == 1:
        return dict.fromkeys(("median", "q1", "q3"), values[0])
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}
