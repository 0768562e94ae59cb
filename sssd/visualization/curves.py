"""Curves of one or more trainings, from what they have logged."""

import gzip
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

__all__ = ["PANELS", "plot_panels", "plot_runs", "read_metrics"]

Line = Mapping[str, float]


def read_metrics(path: Path) -> Any:
    """The lines of a metrics.json, or of what tools/compare.py keeps of one.

    An unfinished last line (a run in progress) is left out.

    Args:
        path: of a file ``metrics.json``, or of one whose name ends in ``_metrics.json.gz``; of a
            classifier that has the lines of each stage by its name.
    """
    path = Path(path)
    if path.suffix == ".gz":
        return json.loads(gzip.decompress(path.read_bytes()))
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


_KINDS = ("averaged", "teacher_with_ground_truth")


def _values(line: Line, keys: Mapping[str, str], factor: float = 1.0) -> dict[str, float]:
    """Label -> value, of the keys that the line has."""
    return {label: factor * line[key] for label, key in keys.items() if key in line}


def _one(key: str, factor: float = 1.0) -> Callable[[Line], dict[str, float]]:
    return lambda line: _values(line, {"": key}, factor)


def _losses(line: Line) -> dict[str, float]:
    values = {}
    for label, prefix in (("student's pass", "loss_"), ("teacher's pass", "teacher_loss_")):
        parts = [v for k, v in line.items() if k.startswith(prefix) and "distill" not in k]
        if parts:
            values[f"detection, {label}"] = sum(parts)
    return values | _values(line, {"distillation, weighted": "loss_distill"})


def _figure(name: str, *kinds: str) -> Callable[[Line], dict[str, float]]:
    """A figure of an evaluation, of each dataset and kind of weights on its own.

    Args:
        name: such as "bbox/AP".
        kinds: "averaged", "teacher_with_ground_truth", as the keys have it; "" for the weights.
    """

    def values(line: Line) -> dict[str, float]:
        found = {}
        for key, value in line.items():
            if key != name and not key.endswith(f"/{name}"):
                continue
            # "<dataset, if there are several>/<kind, unless it is the weights themselves>"
            before = key.removesuffix(name).rstrip("/")
            dataset, _, kind = before.rpartition("/") if "/" in before else ("", "", before)
            if kind not in _KINDS:
                dataset, kind = kind, ""
            if kind in kinds:
                weights = _WEIGHTS[kind] if len(kinds) > 1 else ""
                found[", ".join(filter(None, (weights, dataset)))] = value
        return found

    return values


_WEIGHTS = {"": "last weights", "averaged": "averaged weights"}

# Name -> title, and what a line of metrics.json has of it: label of a curve -> value.
PANELS: dict[str, tuple[str, Callable[[Line], dict[str, float]]]] = {
    "losses": ("losses", _losses),
    "share": ("distillation, % of the total loss", _one("loss_distill/share", 100)),
    "coefficient": ("coefficient", _one("loss_distill/coefficient")),
    "distance": ("distance, unweighted", _one("loss_distill/distance")),
    "lr": ("learning rate", _one("lr")),
    "ap": ("AP", _figure("bbox/AP", "", "averaged")),
    "accuracy": ("top-1 accuracy, %", _figure("classification/top1", "", "averaged")),
    "teacher": (
        "AP of the teacher, with the ground truth",
        _figure("bbox/AP", "teacher_with_ground_truth"),
    ),
}
_OF_EVALUATIONS = ("ap", "accuracy", "teacher")
_STYLES = ("-", "--", ":", "-.")


def plot_runs(
    path: Path,
    runs: Mapping[str, Sequence[Line]],
    panels: Sequence[str] = tuple(PANELS),
    title: str = "",
) -> None:
    """Plots what trainings have logged over the iterations.

    A run has a colour, and a curve of a panel with several of them a line style; of a single run
    its curves have the colours. Panels of which no run has a value are left out.

    Args:
        path: PNG file to write.
        runs: name -> lines, from :func:`read_metrics`.
        panels: of :data:`PANELS`.
        title: above the figure.

    Raises:
        ValueError: no run has anything to plot.
    """
    drawn = _panels_with_values(runs, panels)
    columns = min(3, len(drawn))
    rows = -(-len(drawn) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4 * columns, 3.4 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(drawn) :]:
        axis.set_visible(False)
    for axis, (name, curves) in zip(axes.flat, drawn.items(), strict=False):
        _draw_panel(axis, name, curves, list(runs))
    figure.suptitle(title)
    _save(figure, path, list(runs))


def plot_panels(folder: Path, runs: Mapping[str, Sequence[Line]]) -> dict[str, Path]:
    """The panels of :func:`plot_runs` as pictures of their own; title -> file."""
    files = {}
    for name, curves in _panels_with_values(runs, tuple(PANELS)).items():
        figure, axis = plt.subplots(figsize=(4.2, 3.6), layout="constrained")
        _draw_panel(axis, name, curves, list(runs))
        files[PANELS[name][0]] = folder / f"curves_{name}.png"
        _save(figure, files[PANELS[name][0]], list(runs))
    return files


Curves = dict[tuple[str, str], tuple[list[int], list[float]]]


def _curves(
    runs: Mapping[str, Sequence[Line]], values: Callable[[Line], dict[str, float]]
) -> Curves:
    """(run, label) -> iterations and values, of the curves that have any."""
    curves: Curves = {}
    for run, lines in runs.items():
        for line in lines:
            for label, value in values(line).items():
                iterations, points = curves.setdefault((run, label), ([], []))
                iterations.append(int(line["iteration"]))
                points.append(value)
    return curves


def _panels_with_values(
    runs: Mapping[str, Sequence[Line]], panels: Sequence[str]
) -> dict[str, Curves]:
    drawn = {name: _curves(runs, PANELS[name][1]) for name in panels}
    drawn = {name: curves for name, curves in drawn.items() if curves}
    if not drawn:
        raise ValueError(
            f"There is nothing to plot in {', '.join(runs) or 'no run'}: the first values are "
            "logged after 20 iterations."
        )
    return drawn


def _draw_panel(axis: plt.Axes, name: str, curves: Curves, runs: Sequence[str]) -> None:
    labels = list(dict.fromkeys(label for _, label in curves))
    alone = len(runs) == 1
    for (run, label), (iterations, points) in curves.items():
        number = labels.index(label)
        axis.plot(
            iterations,
            points,
            "-" if alone else _STYLES[number % len(_STYLES)],
            color=f"C{number}" if alone else _colors(runs)[run],
            marker="o" if name in _OF_EVALUATIONS else None,
            markersize=3,
            drawstyle="steps-post" if name == "coefficient" else "default",
        )
    axis.set_title(PANELS[name][0])
    axis.set_xlabel("iteration")
    axis.grid(alpha=0.3)
    if name not in _OF_EVALUATIONS:
        axis.set_ylim(bottom=0)
    if name == "share":
        axis.set_ylim(0, 100)
    if len(labels) > 1:
        handles = [
            Line2D([], [], color=f"C{i}" if alone else "gray", linestyle="-" if alone else style)
            for i, style in zip(range(len(labels)), itertools.cycle(_STYLES), strict=False)
        ]
        axis.legend(handles, labels, fontsize=8)


def _colors(runs: Sequence[str]) -> dict[str, Any]:
    """Run -> colour; matplotlib's own ten come again in the eleventh run."""
    many = plt.get_cmap("gist_rainbow")
    return {run: f"C{i}" if len(runs) <= 10 else many(i / len(runs)) for i, run in enumerate(runs)}


def _save(figure: plt.Figure, path: Path, runs: Sequence[str]) -> None:
    if len(runs) > 1:
        handles = [Line2D([], [], color=color) for color in _colors(runs).values()]
        figure.legend(handles, runs, loc="outside lower center", fontsize=8, ncols=3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
