"""Compares the step time and the memory of trainings, interleaved in one run.

Machines are never quiet, and the times of two runs of one program differ by more than many methods
do. So the trainings take turns, a few steps each, A B C A B C ..., and what is compared is what
lies side by side: the ratio to the first one in each round.
"""

import multiprocessing
import os
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from detectron2.config import CfgNode

from .benchmark_worker import serve
from .config_file import load_config
from .labelenc import labelenc_step
from .stages import plan_stages

__all__ = ["BenchmarkError", "Job", "Worker", "measure", "plan_jobs", "summarise", "take_turns"]

LABELENC_STEPS = ("step1", "step2")
TURN = ("began", "ended", "step_seconds", "data_seconds")  # what is kept of each turn


class BenchmarkError(RuntimeError):
    """A comparison that cannot be made, said in one sentence."""


@dataclass(frozen=True)
class Job:
    """One training of a comparison.

    Attributes:
        name: file name of the config without its suffix, with the stage if it is not the last one.
        config_file: path, as it was given.
        stage: name of the stage; "" where there is only one training.
        cfg: of that training.
    """

    name: str
    config_file: str
    stage: str
    cfg: CfgNode


class TakesTurns(Protocol):
    """What runs steps when it is asked to: a `Worker`, in this process or another."""

    def run(self, count: int) -> dict[str, Any]:
        """Runs ``count`` steps and returns what they cost."""


def plan_jobs(
    config_files: Sequence[str], opts: Sequence[str] = (), *, device: str = "cpu", stage: str = ""
) -> list[Job]:
    """Reads the configs.

    Args:
        config_files: paths.
        opts: alternating keys and values, for all of them.
        device: for MODEL.DEVICE.
        stage: of a training of several stages, time this one, in the configs that have it. The
            others, and all if it is empty, give their last.

    Raises:
        BenchmarkError: a file or the value of an override is missing, there is no such stage or
            device.
        ConfigError: there is no such key, or a value is of another type.
        ValueError: a config does not describe its stages as it should.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise BenchmarkError(f"There is no device {device} here: use --device cpu.")
    if len(opts) % 2:
        raise BenchmarkError(
            f"The overrides {' '.join(opts)} are no pairs: give a value after each key."
        )
    jobs, known = [], {}
    for path in config_files:
        if not os.path.isfile(path):
            raise BenchmarkError(f"The config {path} does not exist: correct --config-file.")
        cfg = load_config(path, [*opts, "MODEL.DEVICE", device])
        stages = _stages_of(cfg)
        known.update(dict.fromkeys(stages))
        own = stage if stage in stages else list(stages)[-1]
        is_last = own == list(stages)[-1]
        name = Path(path).stem if is_last else f"{Path(path).stem} ({own})"
        jobs.append(Job(name, path, own, stages[own]))
    if stage and stage not in known:
        there_are = ", ".join(filter(None, known)) or "none"
        raise BenchmarkError(f"No config has the stage {stage!r}: the stages are {there_are}.")
    return jobs


def _stages_of(cfg: CfgNode) -> dict[str, CfgNode]:
    """The trainings that tools/train_net.py or tools/train_labelenc.py make of a config."""
    if cfg.MODEL.META_ARCHITECTURE == "ClassificationDistiller":
        return {stage.name: stage.cfg for stage in plan_stages(cfg)}
    if cfg.MODEL.SSSD.TEACHER.NAME == "label_map" and not cfg.MODEL.SSSD.LABELENC.STEP:
        return {name: labelenc_step(cfg, i + 1) for i, name in enumerate(LABELENC_STEPS)}
    return {"": cfg}


class Worker:
    """A process that trains one config when it is asked to, and sleeps otherwise."""

    def __init__(self, job: Job) -> None:
        """Starts it, and waits until its training is built.

        Raises:
            BenchmarkError: it failed.
        """
        self.job = job
        # A process that was forked could not use a GPU that this one has touched.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(job.cfg, theirs), daemon=True)
        self._process.start()
        theirs.close()  # so that its end is noticed
        try:
            self.description = self._answer()
        except BaseException:
            self.close()
            raise

    def run(self, count: int) -> dict[str, Any]:
        """Lets it run steps; see `TrainingInTurns.run`.

        Raises:
            BenchmarkError: it failed.
        """
        with suppress(BrokenPipeError):  # it died while it waited: what it said is still to be read
            self._connection.send(count)
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        self._connection.close()
        self._process.join(timeout=5)
        self._process.terminate()
        self._process.join()

    def _answer(self) -> dict[str, Any]:
        try:
            answer = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode
            how = f"signal {-code} ended it" if code < 0 else f"it ended with the exit code {code}"
            memory = "; is there memory for all of them?" if code == -9 else "."
            raise BenchmarkError(
                f"The training of {self.job.config_file} is gone: {how}{memory}"
            ) from None
        if "error" in answer:
            raise BenchmarkError(
                f"The training of {self.job.config_file} failed: {answer['error']}"
            )
        return answer


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
    progress: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Runs a comparison.

    Args:
        jobs: the first one is what the others are compared with.
        rounds: turns of each.
        steps: of a turn.
        warmup: steps of each before the first round, which are left out.
        progress: is told what happens.

    Returns:
        For each job what `summarise` gives, and what it is.

    Raises:
        BenchmarkError: a training failed.
    """
    with ExitStack() as stack:
        workers = []
        for i, job in enumerate(jobs):
            progress(f"{i + 1}/{len(jobs)} builds {job.name}")
            worker = Worker(job)
            stack.callback(worker.close)
            worker.run(warmup)
            workers.append(worker)
        turns = take_turns(workers, rounds, steps, progress)
        descriptions = [worker.description for worker in workers]
    return [
        {
            "name": job.name,
            "config_file": job.config_file,
            "stage": job.stage,
            **description,
            **summary,
        }
        for job, description, summary in zip(jobs, descriptions, summarise(turns), strict=True)
    ]


def summarise(turns: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Medians and ratios.

    Args:
        turns: of `take_turns`; those of the first worker are what the ratios refer to.

    Returns:
        For each worker

        - ``step_seconds``: median over all steps;
        - ``ratio``: ``median`` and quartiles ``q1`` and ``q3``, over the rounds, of the median step
          of the round divided by that of the first worker in the same round;
        - ``images_per_second``: of a median step, without loading (a pair of images counts once);
        - ``data_seconds``: median time to load a batch, no part of the step;
        - ``memory``: bytes ``before`` the first step, at the ``peak``, and ``above``, their
          difference; ``memory_ratio``: of ``above`` to that of the first. None where unknown;
        - ``batch_size``, and ``turns``: when each began and ended, and the times of its steps.
    """
    of_first = [statistics.median(turn["step_seconds"]) for turn in turns[0]]
    summaries = []
    for own in turns:
        ratios = [
            statistics.median(turn["step_seconds"]) / first
            for turn, first in zip(own, of_first, strict=True)
        ]
        q1, median, q3 = _quartiles(ratios)
        step = statistics.median(x for turn in own for x in turn["step_seconds"])
        memory = own[-1]["memory"]
        known = memory["peak"] is not None
        above = memory["peak"] - memory["before"] if known else None
        first_above = summaries[0]["memory"]["above"] if summaries else above
        summaries.append(
            {
                "step_seconds": step,
                "ratio": {"median": median, "q1": q1, "q3": q3},
                "images_per_second": own[0]["batch_size"] / step,
                "data_seconds": statistics.median(x for t in own for x in t["data_seconds"]),
                "memory": {**memory, "above": above},
                "memory_ratio": above / first_above if known and first_above else None,
                "batch_size": own[0]["batch_size"],
                "turns": [{key: turn[key] for key in TURN} for turn in own],
            }
        )
    return summaries


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3
