"""The tables of a comparison: mean and spread of each method, and the difference to a baseline."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "COCO_COLUMNS",
    "Row",
    "bootstrap_interval",
    "comparison_rows",
    "markdown_table",
    "paired_difference",
    "paired_interval",
    "spread",
]

# The figures of Detectron2's COCO evaluator, as it calls them.
COCO_COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """What the seeds of one method say, in percent, ready to print.

    Attributes:
        method: its name.
        seeds: how many runs there are.
        accuracy: mean and standard deviation.
        difference: to the baseline of the same seeds, with its 95 % interval; empty for the
            baseline, and for fewer than two common seeds.
        ensemble: of those that it trains along, the best on validation; empty for none.
        settings: its own, as chosen by its trials.
    """

    method: str
    seeds: int
    accuracy: str
    difference: str
    ensemble: str
    settings: str


def paired_interval(values: Sequence[float], baseline: Sequence[float]) -> tuple[float, float]:
    """Mean of the paired differences, and half the width of its 95 % interval (Student's t).

    Args:
        values, baseline: figures of equal seeds, in equal order; two or more.
    """
    from scipy import stats

    differences = [a - b for a, b in zip(values, baseline, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.mean(differences), float(stats.t.ppf(0.975, len(differences) - 1)) * error


def bootstrap_interval(values: Sequence[float], baseline: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean paired difference by the bootstrap over seeds (percentiles).

    With few seeds it is too narrow (for five it covers 83 % instead of 95 %), and Student's t the
    one to trust.

    Args:
        values, baseline: figures of equal seeds, in equal order; two or more.
    """
    from scipy import stats

    differences = [float(a - b) for a, b in zip(values, baseline, strict=True)]
    if len(set(differences)) == 1:
        return differences[0], differences[0]
    result = stats.bootstrap(
        (differences,), statistics.mean, vectorized=False, method="percentile", random_state=0
    )
    return tuple(map(float, result.confidence_interval))


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> str:
    """The interval of :func:`paired_interval`, ready to print; empty for fewer than two figures."""
    if len(values) < 2:
        return ""
    mean, half = paired_interval(values, baseline)
    return f"{mean:+.2f} ± {half:.2f}"


def comparison_rows(
    records: Mapping[str, Sequence[Record]], *, baseline: str, metric: str, split: str = "test"
) -> list[Row]:
    """A row for each method that has runs.

    Args:
        records: method -> the records of its seeds.
        baseline: method that the others are compared with, by seed.
        metric: such as "classification/top1".
        split: "validation" or "test".
    """
    reference = {r["seed"]: r[split][metric] for r in records.get(baseline, ())}
    rows = []
    for method, runs in records.items():
        if not runs:
            continue
        paired = [(r[split][metric], reference[r["seed"]]) for r in runs if r["seed"] in reference]
        difference = ""
        if method != baseline and paired:
            difference = paired_difference(*zip(*paired, strict=True))
        ensembles = [
            key
            for key in runs[0][split]
            if key.startswith("ensemble") and key.endswith(metric.rpartition("/")[2])
        ]
        # Chosen as everything is, by the validation split.
        best = max(
            ensembles,
            key=lambda key: statistics.mean(r["validation"][key] for r in runs),
            default=None,
        )
        ensemble = [] if best is None else [r[split][best] for r in runs]
        accuracy = spread([r[split][metric] for r in runs])
        rows.append(
            Row(method, len(runs), accuracy, difference, spread(ensemble), _settings(runs[0]))
        )
    return rows


def markdown_table(header: Sequence[str], cells: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *cells]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def spread(values: Sequence[float]) -> str:
    """Mean and, of several figures, standard deviation, ready to print."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def _settings(record: Record) -> str:
    own = {k: v for k, v in record["options"].items() if not k[0].isupper()}
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, int | float) else f"{name} {value}"
        for name, value in own.items()
    )
