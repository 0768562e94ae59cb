#!/usr/bin/env python
"""Compares classification methods over seeds and datasets, by a plan.

    python tools/compare.py docs/results/classification/plan.yaml --jobs 2

Every run has a record in the plan's folder; what has one is not run again, so the command may be
stopped (or limited by --hours) and given again. The order leaves whole parts done: for each dataset
the trials of all methods, then one seed after the other. It ends with a table for each dataset.
"""

import sssd  # noqa: F401  (before Detectron2: it applies the compatibility layer)

# isort: split
import argparse
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import astuple
from pathlib import Path

import torch

from sssd.engine import user_errors
from sssd.engine.comparison import (
    TEACHER,
    Plan,
    Run,
    final_options,
    final_records,
    has_teacher,
    load_plan,
    read_record,
    trial_runs,
)
from sssd.engine.comparison_run import execute
from sssd.evaluation.comparison_table import comparison_rows, markdown_table


def phases(plan: Plan, folder: Path, data: str) -> Iterator[list[Run]]:
    """Lists of runs, each of which needs the lists before it to be complete."""
    methods = [method for method in plan.methods.values() if data in method.data]
    yield trial_runs(plan, folder, plan.methods[plan.shared], data)
    shared = final_options(plan, folder, plan.methods[plan.shared], data)
    teacher = plan.methods[TEACHER]
    trials = [run for method in methods for run in trial_runs(plan, folder, method, data)]
    yield [Run(teacher, data, plan.trial_seed, options=shared), *trials]
    yield [
        Run(method, data, seed, options=final_options(plan, folder, method, data))
        for seed in plan.methods[plan.baseline].seeds
        for method in methods  # the teacher is the first
        if seed in method.seeds
    ]


def begin_worker() -> None:
    """One thread of computation, and no life after the command's own end."""
    torch.set_num_threads(1)

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plan", type=Path, help="YAML; its folder gets the records and tables")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of one thread each")
    parser.add_argument("--hours", type=float, default=float("inf"), help="begin no run after them")
    parser.add_argument("--data", nargs="*", help="only these datasets of the plan")
    parser.add_argument("--scratch", type=Path, default=Path("output/compare"))
    args = parser.parse_args()
    with user_errors():
        plan, folder = load_plan(args.plan), args.plan.parent
        deadline = time.time() + 3600 * args.hours
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.jobs, context, initializer=begin_worker) as pool:
            for data in args.data or plan.data:
                for runs in phases(plan, folder, data):
                    if not complete(pool, plan, runs, folder, args, deadline):
                        write_tables(plan, folder)
                        sys.exit("compare: the time is over; give the command again to go on.")
        write_tables(plan, folder)


def complete(pool, plan, runs, folder, args, deadline) -> bool:
    """Makes the runs that have no record; False if the time is over before."""
    waiting, teachers = missing_runs(plan, runs, folder, args.scratch)
    total, running, start, done = len(waiting), {}, time.time(), 0

    def next_run() -> Run | None:
        """The first that need not wait for a teacher that is still to come."""
        for run in waiting:
            if run not in taught or run.seed not in teachers:
                return run
        return None

    taught = [run for run in waiting if has_teacher(run)]
    while waiting or running:
        while len(running) < args.jobs and time.time() < deadline and (run := next_run()):
            waiting.remove(run)
            running[pool.submit(execute, plan, run, folder, args.scratch)] = run
        if not running:
            return False
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            run, record = running.pop(future), future.result()
            done += 1
            if run.method.name == TEACHER:
                teachers.discard(run.seed)
            left = (time.time() - start) / done * (total - done)
            print(
                f"{run.name}: {record['validation'][plan.metric]:.2f} on validation, "
                f"{record['seconds']:.0f} s; {done}/{total}, about {left / 60:.0f} min left "
                "of this part",
                flush=True,
            )
    return True


def missing_runs(plan, runs, folder, scratch) -> tuple[list[Run], set[int]]:
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
            (folder / f"{data}.md").write_text(table)
            print(f"\n{data}:\n\n{table}")


if __name__ == "__main__":
    main()
