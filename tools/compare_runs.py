#!/usr/bin/env python
"""Mean and spread of the final COCO figures over seeds, from the metrics.json of each run.

    python tools/compare_runs.py docs/results/bccd_fcos/*_seed* --reference plain

Folders are named VARIANT_seedN; a row of the table is a variant. With --reference, a second table
has the differences to that variant, paired by seed, with their 95 % intervals (Student's t).
Runs with several test sets, or averaged weights, have several figures: --of names which. Of several
names, the mean counts.
"""

import argparse
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from sssd.engine import user_errors
from sssd.studies.tables import COCO_COLUMNS, markdown_table, paired_difference, spread
from sssd.visualization import read_metrics


def final_figures(folder: Path, of: Sequence[str]) -> dict[str, float]:
    """The figures of the last evaluation of a run, by column.

    Args:
        folder: of the run.
        of: what stands before "bbox/AP" in its metrics.json, without the slash; of several, their
            mean counts.
    """
    suffix = "bbox/AP"
    lines = [x for x in read_metrics(folder / "metrics.json") if any(k.endswith(suffix) for k in x)]
    if not lines:
        sys.exit(f"error: {folder}/metrics.json holds no evaluation; let the run finish.")
    last = lines[-1]
    prefixes = [f"{name}/" if name else "" for name in of]
    if not all(f"{prefix}{suffix}" in last for prefix in prefixes):
        found = [key.removesuffix(suffix).rstrip("/") for key in last if key.endswith(suffix)]
        known = ", ".join(repr(x) for x in found)
        sys.exit(f"error: {folder}/metrics.json has figures of {known}: choose with --of.")
    return {
        column: statistics.mean(last[f"{prefix}bbox/{column}"] for prefix in prefixes)
        for column in COCO_COLUMNS
    }


def main(args: argparse.Namespace) -> None:
    variants: dict[str, dict[int, dict[str, float]]] = defaultdict(dict)
    for folder in args.folders:
        named = re.fullmatch(r"(.+)_seed(\d+)", folder.name)
        if named is None:
            sys.exit(f"error: the folder {folder} is not named VARIANT_seedN.")
        variants[named[1]][int(named[2])] = final_figures(folder, args.of)
    rows = [
        [
            variant,
            len(runs),
            *(spread([run[column] for run in runs.values()]) for column in COCO_COLUMNS),
        ]
        for variant, runs in variants.items()
    ]
    print(markdown_table(["variant", "seeds", *COCO_COLUMNS], rows), end="")
    if args.reference is None:
        return
    if args.reference not in variants:
        known = ", ".join(variants)
        sys.exit(f"error: --reference {args.reference} is none of the variants: {known}.")
    reference = variants.pop(args.reference)
    rows = []
    for variant, runs in variants.items():
        seeds = sorted(set(runs) & set(reference))
        cells = [
            paired_difference(*([x[seed][column] for seed in seeds] for x in (runs, reference)))
            for column in COCO_COLUMNS
        ]
        rows.append([variant, len(seeds), *(cell or "-" for cell in cells)])
    header = [f"difference to {args.reference}", "seeds of both", *COCO_COLUMNS]
    print(f"\n{markdown_table(header, rows)}", end="")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="output folders VARIANT_seedN")
    parser.add_argument("--reference", help="variant that the others are compared with, by seed")
    parser.add_argument(
        "--of", nargs="+", default=[""], metavar="FIGURES",
        help="such as bccd_test, or bccd_test/averaged; of several, their mean",
    )  # fmt: skip
    return parser.parse_args(arguments)


if __name__ == "__main__":
    with user_errors():
        main(parse())
