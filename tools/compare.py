#!/usr/bin/env python
"""Compares methods over seeds and settings, by a plan.

    python tools/compare.py docs/results/bccd/plan.yaml --jobs 2
    python tools/compare.py docs/results/bccd/plan.yaml --gpus 0 1 2 3 --only methods
    python tools/compare.py docs/results/classification/plan.yaml --jobs 2 --hours 2

A plan with "task: detection" trains detectors (sssd/studies/plan.py), any other one classifiers.
Every run has a record in the plan's folder; what has one is not run again, so the command may be
stopped (by Ctrl-C, SIGTERM or --hours) and given again. The order leaves whole parts done. It ends
with the tables and pictures of all that is complete.
"""

import sssd  # noqa: F401  (before Detectron2: it applies the compatibility layer)

# isort: split
import argparse
import math
import sys
from pathlib import Path

from sssd.engine import user_errors
from sssd.studies import classification, classification_plan, detection, plan
from sssd.studies.plan_file import read_plan
from sssd.studies.training import TrainingFailed

TOOLS = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plan", type=Path, help="YAML; its folder gets the records and tables")
    parser.add_argument("--jobs", type=at_least_one, default=1,
                        help="runs at a time, of one thread each")  # fmt: skip
    parser.add_argument("--gpus", nargs="+",
                        help="a run on each of these, instead of --jobs (detectors)")  # fmt: skip
    parser.add_argument("--hours", type=hours, help="stop after them")
    parser.add_argument("--only", nargs="*", default=(), help="studies, or datasets, of the plan")
    parser.add_argument("--tables", action="store_true", help="run nothing, write the tables")
    parser.add_argument("--scratch", type=Path, help="folder of checkpoints and logs "
                        "(output/compare/<name of the plan's folder>)")  # fmt: skip
    args = parser.parse_args()
    args.scratch = args.scratch or Path("output/compare") / args.plan.resolve().parent.name
    with user_errors(TrainingFailed):
        if is_of_detectors(args.plan):
            compare_detectors(args)
        else:
            compare_classifiers(args)


def at_least_one(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of runs: give 1 or more")
    return int(text)


def hours(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of hours: give one above 0")
    return value


def is_of_detectors(path: Path) -> bool:
    content = read_plan(path)
    return isinstance(content, dict) and content.get("task") == "detection"


def compare_detectors(args: argparse.Namespace) -> None:
    studies, folder = plan.load_plan(args.plan), args.plan.parent
    places = [{"OMP_NUM_THREADS": "1"}] * args.jobs
    if args.gpus:
        places = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in args.gpus]
    failures = []
    try:
        if not args.tables:
            failures = detection.run_studies(
                studies, folder, args.scratch, TOOLS, names=args.only, places=places,
                hours=args.hours,
            )  # fmt: skip
    finally:
        print(f"\n{detection.write_studies(studies, folder, args.only)}")
    if failures:
        sys.exit("\n".join(f"error: {failure}." for failure in failures))


def compare_classifiers(args: argparse.Namespace) -> None:
    if args.gpus:
        raise ValueError("--gpus is for detectors: classifiers run --jobs at a time.")
    methods, folder = classification_plan.load_plan(args.plan), args.plan.parent
    failures, complete = [], True
    try:
        if not args.tables:
            failures, complete = classification.run_comparison(
                methods, folder, args.scratch, names=args.only, jobs=args.jobs,
                hours=args.hours or math.inf,
            )  # fmt: skip
    finally:
        classification.write_tables(methods, folder)
    if failures:
        sys.exit("\n".join(f"error: {failure}." for failure in failures))
    if not complete:
        sys.exit("compare: the time is over; give the command again to go on.")


if __name__ == "__main__":
    main()
