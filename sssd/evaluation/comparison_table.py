"""The table of a comparison: mean and spread of each method, and its difference to the baseline."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["comparison_table", "paired_interval"]

Record = Mapping[str, Any]


def paired_interval(values: Sequence[float], baseline: Sequence[float]) -> tuple[float, float]:
    """Mean of the paired differences, and half the width of its 95 % interval (Student's t).

    Args:
        values, baseline: figures of equal seeds, in equal order; two or more.
    """
    from scipy import stats

    differences = [a - b for a, b in zip(values, baseline, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.mean(differences), float(stats.t.ppf(0.975, len(differences) - 1)) * error


def comparison_table(
    records: Mapping[str, Sequence[Record]], *, baseline: str, metric: str, split: str = "test"
) -> str:
    """A Markdown table.

    Args:
        records: method -> the records of its seeds.
        baseline: method that the others are compared with, by seed.
        metric: such as "classification/top1".
        split: "validation" or "test".

    Returns:
        A row for each method: seeds, mean and standard deviation, paired difference to the baseline
        with its 95 % interval, the best ensemble that the method has, and the settings.
    """
    reference = {r["seed"]: r[split][metric] for r in records.get(baseline, ())}
    lines = [
        "| method | seeds | accuracy | difference | ensemble | settings |",
        "|---|---|---|---|---|---|",
    ]
    for method, runs in records.items():
        if not runs:
            continue
        values = [r[split][metric] for r in runs]
        paired = [(r[split][metric], reference[r["seed"]]) for r in runs if r["seed"] in reference]
        difference = ""
        if method != baseline and len(paired) > 1:
            mean, half = paired_interval(*zip(*paired, strict=True))
            difference = f"{mean:+.2f} ± {half:.2f}"
        ensembles = [
            [r[split][key] for r in runs]
            for key in runs[0][split]
            if key.startswith("ensemble") and key.endswith(metric.rpartition("/")[2])
        ]
        best = max(ensembles, key=statistics.mean, default=None)
        lines.append(
            f"| {method} | {len(runs)} | {_spread(values)} | {difference} | "
            f"{_spread(best) if best else ''} | {_settings(runs[0])} |"
        )
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def _settings(record: Record) -> str:
    own = {k: v for k, v in record["options"].items() if not k[0].isupper()}
    return ", ".join(f"{name} {value:g}" for name, value in own.items())
