"""Curves of one or more trainings, from what they have logged."""

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

__all__ = ["PANELS", "plot_panels", "plot_runs", "read_metrics"]

Line = Mapping[str, float]


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.json, or of what tools/compare.py keeps of one.

    An unfinished last line (a run in progress) is left out.

    Args:
        path: of a file ``metrics.json``, or of one whose name ends in ``_metrics.json.gz``.
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


def _sum_of(prefix: str) -> Callable[[Line], float | None]:
    def total(line: Line) -> float | None:
        parts = [v for k, v in line.items() if k.startswith(prefix) and "distill" not in k]
        return sum(parts) if parts else None

    return total


def _value(key: str, factor: float = 1.0) -> Callable[[Line], float | None]:
    return lambda line: factor * line[key] if key in line else None


def _average_precision(of: str) -> Callable[[Line], float | None]:
    """AP of the first dataset that was evaluated.

    Args:
        of: "averaged" or "teacher_with_ground_truth", as the keys have it; "" for the weights.
    """

    def first(line: Line) -> float | None:
        for key, value in line.items():
            parts = key.split("/")
            kinds = [part for part in parts if part in _KINDS]
            if parts[-2:] == ["bbox", "AP"] and kinds == ([of] if of else []):
                return value
        return None

    return first


# Name -> title, and the curves of a run: label -> its value in a line of metrics.json (None where
# the line has none).
PANELS: dict[str, tuple[str, dict[str, Callable[[Line], float | None]]]] = {
    "losses": (
        "losses",
        {
            "detection, student's pass": _sum_of("loss_"),
            "detection, teacher's pass": _sum_of("teacher_loss_"),
            "distillation, weighted": _value("loss_distill"),
        },
    ),
    "share": (
        "distillation, % of the total loss",
        {"": _value("loss_distill/share", 100)},
    ),
    "coefficient": ("coefficient", {"": _value("loss_distill/coefficient")}),
    "distance": ("distance, unweighted", {"": _value("loss_distill/distance")}),
    "lr": ("learning rate", {"": _value("lr")}),
    "ap": (
        "AP",
        {"": _average_precision(""), "averaged weights": _average_precision("averaged")},
    ),
    "teacher": (
        "AP of the teacher, with the ground truth",
        {"": _average_precision("teacher_with_ground_truth")},
    ),
}
_OF_EVALUATIONS = ("ap", "teacher")
_STYLES = ("-", "--", ":")


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
    runs: Mapping[str, Sequence[Line]], values: Mapping[str, Callable[[Line], float | None]]
) -> Curves:
    """(run, label) -> iterations and values, of the curves that have any."""
    curves: Curves = {}
    for run, lines in runs.items():
        for label, value in values.items():
            points = [(int(x["iteration"]), y) for x in lines if (y := value(x)) is not None]
            if points:
                curves[run, label] = tuple(map(list, zip(*points, strict=True)))
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
    title, values = PANELS[name]
    labels = [label for label in values if any(label == found for _, found in curves)]
    alone = len(runs) == 1
    for (run, label), (iterations, points) in curves.items():
        number = labels.index(label)
        axis.plot(
            iterations,
            points,
            "-" if alone else _STYLES[number],
            color=f"C{number if alone else runs.index(run)}",
            marker="o" if name in _OF_EVALUATIONS else None,
            markersize=3,
            drawstyle="steps-post" if name == "coefficient" else "default",
        )
    axis.set_title(title)
    axis.set_xlabel("iteration")
    axis.grid(alpha=0.3)
    if name not in _OF_EVALUATIONS:
        axis.set_ylim(bottom=0)
    if name == "share":
        axis.set_ylim(0, 100)
    if len(labels) > 1:
        handles = [
            Line2D([], [], color=f"C{i}" if alone else "gray", linestyle="-" if alone else style)
            for i, style in zip(range(len(labels)), _STYLES, strict=False)
        ]
        axis.legend(handles, [label or "last weights" for label in labels], fontsize=8)


def _save(figure: plt.Figure, path: Path, runs: Sequence[str]) -> None:
    if len(runs) > 1:
        handles = [Line2D([], [], color=f"C{i}") for i in range(len(runs))]
        figure.legend(handles, runs, loc="outside lower center", fontsize=8, ncols=3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
