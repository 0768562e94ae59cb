"""Pictures of a study: AP over iterations, over a sweep, and of every seed."""

import statistics
from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .plan import Plan, Study
from .report import Variant

__all__ = ["draw_study"]

_DPI = 120


def draw_study(
    plan: Plan, study: Study, found: Mapping[str, list[Variant]], folder: Path
) -> list[Path]:
    """Draws what the records of a study allow; returns the files.

    Args:
        found: from :func:`sssd.studies.report.variants_of`; not empty.
        folder: of the files.
    """
    drawn = []
    for name, draw in (("seeds", _draw_seeds), ("curves", _draw_curves), ("sweep", _draw_sweep)):
        path = folder / f"{study.name}_{name}.png"
        if draw(path, plan, study, found):
            drawn.append(path)
    return drawn


def _panels(found: Mapping[str, list[Variant]], width: float, height: float):
    """A row of axes, one for each detector."""
    figure, axes = plt.subplots(
        1, len(found), figsize=(width * len(found), height), squeeze=False, layout="constrained"
    )
    for axis, detector in zip(axes[0], found, strict=True):
        axis.set_title(detector)
        axis.grid(alpha=0.3)
    return figure, axes[0]


def _save(figure: plt.Figure, path: Path) -> bool:
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
    return True


def _draw_seeds(path: Path, plan: Plan, study: Study, found: Mapping[str, list[Variant]]) -> bool:
    """Every run as a point, the mean as a line: what a difference has to be compared with."""
    most = max(map(len, found.values()))
    figure, axes = _panels(found, 5.0, 1.2 + 0.42 * most)
    for axis, variants in zip(axes, found.values(), strict=True):
        for row, variant in enumerate(variants):
            values = list(variant.figures(plan.metric, "validation").values())
            if not values:
                continue
            color = f"C{row}"
            axis.plot(values, [row] * len(values), "o", color=color, alpha=0.7)
            mean = statistics.mean(values)
            axis.plot([mean, mean], [row - 0.35, row + 0.35], color=color, linewidth=2)
        axis.set_yticks(range(len(variants)), [variant.name for variant in variants])
        axis.invert_yaxis()
        axis.set_xlabel(f"{plan.judged},\non {plan.validation}")
    return _save(figure, path)


def _draw_curves(path: Path, plan: Plan, study: Study, found: Mapping[str, list[Variant]]) -> bool:
    """Mean over seeds and, around it, one standard deviation, at each evaluation."""
    curves = {d: [(v, _curve(plan, study, v)) for v in vs] for d, vs in found.items()}
    if study.sweep or all(len(points) < 2 for vs in curves.values() for _, points in vs):
        return False
    figure, axes = _panels(found, 5.5, 3.8)
    for axis, variants in zip(axes, curves.values(), strict=True):
        for number, (variant, points) in enumerate(variants):
            color = f"C{number}"
            iterations = list(points)
            mean = [statistics.mean(v) for v in points.values()]
            half = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in points.values()]
            axis.plot(iterations, mean, "o-", markersize=3, color=color, label=variant.name)
            low = [m - h for m, h in zip(mean, half, strict=True)]
            high = [m + h for m, h in zip(mean, half, strict=True)]
            axis.fill_between(iterations, low, high, color=color, alpha=0.12, linewidth=0)
        axis.set_xlabel("iteration")
        axis.set_ylabel(f"{plan.judged},\non {plan.validation}")
        axis.legend(fontsize=8)
    return _save(figure, path)


def _curve(plan: Plan, study: Study, variant: Variant) -> dict[int, list[float]]:
    """Iterations done -> the judged figure of the seeds that were evaluated there."""
    points: dict[int, list[float]] = {}
    for seed, curve in variant.curves.items():
        first = study.figure_from * variant.records[seed]["iterations"]
        for iteration, figures in curve.items():
            if iteration >= first and plan.metric in figures:
                points.setdefault(iteration, []).append(figures[plan.metric])
    return dict(sorted(points.items()))


def _draw_sweep(path: Path, plan: Plan, study: Study, found: Mapping[str, list[Variant]]) -> bool:
    """The judged figure, and the share of the distillation, over the values of the sweep."""
    if not study.sweep:
        return False
    figure, axes = plt.subplots(
        2, len(found), figsize=(5.0 * len(found), 6.0), squeeze=False, sharex=True,
        layout="constrained",
    )  # fmt: skip
    for (above, below), (detector, variants) in zip(axes.T, found.items(), strict=True):
        judged = [v for v in variants if v.figures(plan.metric, "validation")]
        swept = [v for v in judged if v.setting]
        # Texts stand side by side.
        names = list(dict.fromkeys(v.setting for v in swept))
        numbers = all(v.value is not None for v in swept)
        places = {v.setting: v.value if numbers else names.index(v.setting) for v in swept}
        for number, method in enumerate(dict.fromkeys(v.method for v in swept)):
            of_method = {places[v.setting]: v for v in swept if v.method == method}
            _draw_method(above, below, plan, dict(sorted(of_method.items())), number)
        for variant in (v for v in judged if not v.setting):  # the baseline
            mean = statistics.mean(variant.figures(plan.metric, "validation").values())
            above.axhline(mean, linestyle=":", color="black", label=variant.name)
        above.set_title(detector)
        above.set_ylabel(f"{plan.judged},\non {plan.validation}")
        below.set_ylabel("share of the distillation, %")
        below.set_ylim(0, 100)
        below.set_xlabel(study.sweep.rpartition("SSSD.")[2])
        for axis in (above, below):
            axis.grid(alpha=0.3)
            if axis.has_data():  # no shares without distillation
                axis.legend(fontsize=8)
        if not numbers:
            below.set_xticks(range(len(names)), names)
        elif all(place > 0 for place in places.values()):
            below.set_xscale("log")
    return _save(figure, path)


def _draw_method(
    above: plt.Axes, below: plt.Axes, plan: Plan, variants: Mapping[float, Variant], number: int
) -> None:
    """
    Args:
        variants: by their places on the axis.
        number: of the method's colour.
    """
    method, color = next(iter(variants.values())).method, f"C{number}"
    values = list(variants)
    figures = [list(v.figures(plan.metric, "validation").values()) for v in variants.values()]
    error = [statistics.stdev(f) if len(f) > 1 else 0.0 for f in figures]
    mean = [statistics.mean(f) for f in figures]
    above.errorbar(values, mean, error, fmt="o-", capsize=3, color=color, label=method)
    for part, style in (("early", "--"), ("end", "-")):
        shares = [(x, statistics.mean(s)) for x, v in variants.items() if (s := v.share(part))]
        if shares:
            below.plot(*zip(*shares, strict=True), style, marker="o", markersize=3, color=color,
                       label=f"{method}, {part}")  # fmt: skip
