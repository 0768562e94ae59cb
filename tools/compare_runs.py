#!/usr/bin/env python
"""Mean and spread of the final COCO figures over seeds, from the metrics.json of each run.

    python tools/compare_runs.py docs/results/bccd_fcos/*_seed*

Folders are named VARIANT_seedN; a row of the table is a variant.
"""

import argparse
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from sssd.engine import user_errors
from sssd.visualization import read_metrics

COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def final_figures(folder: Path) -> dict[str, float]:
    """The figures of the last evaluation of a run, by column."""
    lines = [x for x in read_metrics(folder / "metrics.json") if "bbox/AP" in x]
    if not lines:
        sys.exit(f"error: {folder}/metrics.json holds no evaluation; let the run finish.")
    return {column: lines[-1][f"bbox/{column}"] for column in COLUMNS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="output folders VARIANT_seedN")
    variants: dict[str, list[dict[str, float]]] = defaultdict(list)
    for folder in parser.parse_args().folders:
        named = re.fullmatch(r"(.+)_seed\d+", folder.name)
        if named is None:
            sys.exit(f"error: the folder {folder} is not named VARIANT_seedN.")
        variants[named[1]].append(final_figures(folder))
    print("| variant | seeds | " + " | ".join(COLUMNS) + " |")
    print("|---|---|" + "---|" * len(COLUMNS))
    for variant, runs in variants.items():
        cells = []
        for column in COLUMNS:
            values = [run[column] for run in runs]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        print(f"| {variant} | {len(runs)} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    with user_errors():
        main()
