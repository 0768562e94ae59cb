"""What runs of equal settings vary by, and how many seeds a difference takes to show."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from .plan import Plan
from .report import variants_of
from .tables import markdown_table

__all__ = ["pairs_needed", "pooled_deviations", "variation_text"]

_MOST_PAIRS = 1000


def pooled_deviations(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
    """The standard deviation within groups, and its degrees of freedom.

    Args:
        groups: figures of equal settings and different seeds.

    Returns:
        NaN and 0 where no group has two figures.
    """
    several = [group for group in groups if len(group) > 1]
    freedom = sum(len(group) - 1 for group in several)
    if not freedom:
        return math.nan, 0
    squares = sum(statistics.variance(group) * (len(group) - 1) for group in several)
    return math.sqrt(squares / freedom), freedom


def pairs_needed(deviation: float, half_width: float = 1.0) -> int | None:
    """Seeds of either method with which the 95 % interval of a difference is as narrow.

    Args:
        deviation: standard deviation over the seeds of one method. Equal seeds are taken to have
            nothing in common: runs with different losses part within a few iterations.
        half_width: of the interval (Student's t).

    Returns:
        None for more than a thousand.
    """
    from scipy import stats

    for pairs in range(2, _MOST_PAIRS + 1):
        error = deviation * math.sqrt(2 / pairs)
        if stats.t.ppf(0.975, pairs - 1) * error <= half_width:
            return pairs
    return None


def variation_text(plan: Plan, folder: Path) -> str:
    """Standard deviations over seeds, pooled over all variants of a plan, in Markdown.

    Args:
        folder: of the plan and its records.

    Returns:
        A title, and a table with a row for each detector and for averaged and last weights; empty
        if no variant has two runs.
    """
    splits = [["validation"], ["test"], ["validation", "test"]] if plan.test else [["validation"]]
    rows = []
    for detector, variants in variants_of(plan, plan.trainings(), folder).items():
        for metric in dict.fromkeys([plan.metric, plan.metric.removeprefix("averaged/")]):
            columns = [[list(v.figures(metric, *s).values()) for v in variants] for s in splits]
            deviations = [pooled_deviations(groups) for groups in columns]
            validation, freedom = deviations[0]
            if not freedom:
                continue
            rows.append(
                [
                    detector,
                    "averaged weights" if metric.startswith("averaged/") else "last weights",
                    *(f"{deviation:.2f}" for deviation, _ in deviations),
                    *([_correlation(*(d for d, _ in deviations))] if plan.test else []),
                    freedom,
                    pairs_needed(validation) or f"more than {_MOST_PAIRS}",
                ]
            )
    if not rows:
        return ""
    test = [plan.test, "mean of both", "correlation of the two"] if plan.test else []
    header = ["detector", "AP of the", plan.validation, *test, "degrees of freedom",
              f"pairs of seeds for ± 1 on {plan.validation}"]  # fmt: skip
    about = "Standard deviation over seeds, pooled over all variants of the plan."
    return f"# What runs of equal settings vary by\n\n{about}\n\n{markdown_table(header, rows)}"


def _correlation(first: float, second: float, mean: float) -> str:
    """Of two figures over the seeds, from their standard deviations and that of their mean."""
    covariance = 2 * mean**2 - (first**2 + second**2) / 2
    return f"{covariance / (first * second):.2f}" if first and second else ""
