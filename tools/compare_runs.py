#!/usr/bin/env python
"""Mean and spread of the final COCO figures over seeds, from the metrics.json of each run.

    python tools/compare_runs.py docs/results/bccd_fcos/*_seed* --reference plain

Folders are named VARIANT_seedN; a row of the table is a variant. With --reference, a second table
has the differences to that variant, paired by seed, with their 95 % intervals (Student's t).
"""

import argparse
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from sssd.engine import user_errors
from sssd.evaluation.comparison_table import paired_interval
from sssd.visualization import read_metrics

COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def final_figures(folder: Path) -> dict[str, float]:
    """The figures of the last evaluation of a run, by column."""
    lines = [x for x in read_metrics(folder / "metrics.json") if "bbox/AP" in x]
    if not lines:
        sys.exit(f"error: {folder}/metrics.json holds no evaluation; let the run finish.")
    return {column: lines[-1][f"bbox/{column}"] for column in COLUMNS}


def main(args: argparse.Namespace) -> None:
    variants: dict[str, dict[int, dict[str, float]]] = defaultdict(dict)
    for folder in args.folders:
        named = re.fullmatch(r"(.+)_seed(\d+)", folder.name)
        if named is None:
            sys.exit(f"error: the folder {folder} is not named VARIANT_seedN.")
        variants[named[1]][int(named[2])] = final_figures(folder)
    print_row(["variant", "seeds", *COLUMNS])
    print("|" + "---|" * (2 + len(COLUMNS)))
    for variant, runs in variants.items():
        print_row([variant, str(len(runs)), *(spread(runs, column) for column in COLUMNS)])
    if args.reference is None:
        return
    if args.reference not in variants:
        known = ", ".join(variants)
        sys.exit(f"error: --reference {args.reference} is none of the variants: {known}.")
    reference = variants.pop(args.reference)
    print()
    print_row([f"difference to {args.reference}", "seeds of both", *COLUMNS])
    print("|" + "---|" * (2 + len(COLUMNS)))
    for variant, runs in variants.items():
        seeds = sorted(set(runs) & set(reference))
        cells = [difference(runs, reference, seeds, column) for column in COLUMNS]
        print_row([variant, str(len(seeds)), *cells])


def print_row(cells: Sequence[str]) -> None:
    print(f"| {' | '.join(cells)} |")


def spread(runs: Mapping[int, Mapping[str, float]], column: str) -> str:
    """Mean and standard deviation over the seeds."""
    values = [run[column] for run in runs.values()]
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def difference(
    runs: Mapping[int, Mapping[str, float]],
    reference: Mapping[int, Mapping[str, float]],
    seeds: Sequence[int],
    column: str,
) -> str:
    """Mean difference over the seeds, and half the width of its interval."""
    if len(seeds) < 2:
        return "-"
    values, baseline = ([x[seed][column] for seed in seeds] for x in (runs, reference))
    mean, half_width = paired_interval(values, baseline)
    return f"{mean:+.2f} ± {half_width:.2f}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="output folders VARIANT_seedN")
    parser.add_argument("--reference", help="variant that the others are compared with, by seed")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    with user_errors():
        main(parse())
