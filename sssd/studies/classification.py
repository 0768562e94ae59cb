"""Makes the runs of a plan of classification methods, and writes what they say."""

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import astuple
from pathlib import Path

import torch

from .classification_plan import (
    TEACHER,
    Plan,
    Run,
    final_options,
    final_records,
    final_runs,
    has_teacher,
    read_record,
    trial_runs,
)
from .classification_run import execute
from .progress import complete, failure
from .tables import comparison_rows, markdown_table
from .training import TrainingFailed

__all__ = ["run_comparison", "write_tables"]


def run_comparison(
    plan: Plan, folder: Path, scratch: Path, *, names: Sequence[str] = (), jobs: int, hours: float
) -> tuple[list[str], bool]:
    """Makes the runs that have no record.

    Args:
        folder: of the plan and its records.
        scratch: folder of checkpoints and logs.
        names: of the datasets; empty for all.
        jobs: runs at a time, of one thread each.
        hours: after which no run begins.

    Returns:
        A sentence for each run that has failed, without its full stop; and whether the time was
        enough.

    Raises:
        TrainingFailed: a process was killed.
    """
    failures: list[str] = []
    deadline = time.time() + 3600 * hours
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=_begin_worker) as pool:
        for data in names or plan.data:
            for runs in _phases(plan, folder, data):
                if not _complete(pool, plan, runs, folder, scratch, jobs, deadline, failures):
                    return failures, False
                if failures:  # what comes after may need them
                    return failures, True
    return failures, True


def _phases(plan: Plan, folder: Path, data: str) -> Iterator[list[Run]]:
    """Lists of runs, each of which needs the lists before it to be complete."""
    methods = [method for method in plan.methods.values() if data in method.data]
    yield trial_runs(plan, folder, plan.methods[plan.shared], data)
    shared = final_options(plan, folder, plan.methods[plan.shared], data)
    teacher = plan.methods[TEACHER]
    trials = [run for method in methods for run in trial_runs(plan, folder, method, data)]
    yield [Run(teacher, data, plan.trial_seed, options=shared), *trials]
    runs = [run for method in methods for run in final_runs(plan, folder, method, data)]
    yield sorted(runs, key=lambda run: run.seed)  # stable: the teacher is the first of a seed


def _begin_worker() -> None:
    """One thread of computation, and no life after the command's own end."""
    torch.set_num_threads(1)

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _complete(pool, plan, runs, folder, scratch, jobs, deadline, failures) -> bool:
    """Makes the runs that have no record; False if the time is over before.

    What has failed is added to ``failures``, and the others go on; those without a teacher, too,
    which then say that they lack it.
    """
    waiting, teachers = _missing_runs(plan, runs, folder, scratch)
    taught = [run for run in waiting if has_teacher(run)]

    def finished(run: Run, future: Future) -> str:
        if run.method.name == TEACHER:
            teachers.discard(run.seed)
        try:
            record = future.result()
        except BrokenProcessPool as error:
            raise TrainingFailed(f"{run.name} has failed: its process was killed.") from error
        except (FloatingPointError, OSError, ValueError) as error:
            failures.append(failure(run.name, error))
            return failures[-1]
        accuracy = record["validation"][plan.metric]
        return f"{run.name}: {accuracy:.2f} on validation, {record['seconds']:.0f} s"

    return complete(
        waiting,
        lambda run: pool.submit(execute, plan, run, folder, scratch),
        finished,
        at_a_time=jobs,
        deadline=deadline,
        # Those that need not wait for a teacher that is still to come.
        may_begin=lambda run: run not in taught or run.seed not in teachers,
    )


def _missing_runs(plan, runs, folder, scratch) -> tuple[list[Run], set[int]]:
    """The runs without a record, and the seeds whose teacher is among them.

    A teacher whose weights are gone is missing too, where a run waits for it.
    """
    missing = [run for run in runs if read_record(folder, run) is None]
    wanted = {run.seed for run in missing if has_teacher(run)}

    def is_missing(run: Run) -> bool:
        weights = scratch / run.name / "model_final.pth"
        gone = run.method.name == TEACHER and run.seed in wanted and not weights.is_file()
        return gone or run in missing

    waiting = [run for run in runs if is_missing(run)]
    return waiting, {run.seed for run in waiting if run.method.name == TEACHER}


def write_tables(plan: Plan, folder: Path) -> None:
    header = ["method", "seeds", "accuracy", "difference", "ensemble", "settings"]
    for data in plan.data:
        rows = comparison_rows(
            final_records(plan, folder, data), baseline=plan.baseline, metric=plan.metric
        )
        if rows:
            table = markdown_table(header, [astuple(row) for row in rows])
            (folder / f"{data}.md").write_text(f"# Methods on {data}\n\n{table}")
            print(f"\n{data}:\n\n{table}")
