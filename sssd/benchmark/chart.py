"""A picture of a comparison: bars for time, memory and inference, each a ratio to the first."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .breakdown import BACKWARD, PARTS

__all__ = ["FORMATS", "draw_chart", "stacked_parts"]

FORMATS = (".pdf", ".png", ".svg")

# Okabe and Ito's colours, which the colour-blind tell apart.
COLOURS = {
    "student forward": "#0072B2",
    "teacher": "#E69F00",
    "replayed pass": "#D55E00",
    "distance": "#CC79A7",
    "optimizer": "#009E73",
    "rest": "#777777",
}
WHOLE = "#7F8FA6"  # of a bar without parts
LIGHT = 0.55  # share of white in the colour of a backward pass
ROW, BESIDES = 0.45, 2.0  # inches: of a bar, and of titles, axis and legend


def draw_chart(
    path: Path,
    configs: Sequence[dict[str, Any]],
    inference: Sequence[dict[str, Any]] = (),
    caption: str = "",
) -> None:
    """Writes the picture; the suffix of the path says in which format.

    Args:
        path: of the file.
        configs: of `sssd.benchmark.compare.measure`; steps with a breakdown are stacked by part.
        inference: of `sssd.benchmark.compare.measure_inference`, of the same configs.
        caption: a line above, such as the device.

    Raises:
        OSError: the file cannot be written.
        ValueError: there is no such format.
    """
    titles = ["Training step: time", "Training step: memory"]
    titles += ["Inference: time"] if inference else []
    figure = Figure(
        figsize=(1 + 3.7 * len(titles), BESIDES + ROW * len(configs)), layout="constrained"
    )
    axes = figure.subplots(
        1, len(titles), sharey=True, width_ratios=[1.6, 1, 1][: len(titles)], squeeze=False
    )[0]
    for axis, title in zip(axes, titles, strict=True):
        _style(axis, title)
    names = [config["name"] for config in configs]
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.4, -0.6)  # the first on top

    shown = [part for part in COLOURS if _any_has(configs, part)]
    for row, config in enumerate(configs):
        _time_bar(axes[0], row, config)
        if config["memory_ratio"] is not None:
            text = f"{config['memory_ratio']:.2f}, {config['memory']['above'] / 2**20:,.0f} MiB"
            _bar(axes[1], row, config["memory_ratio"], text)
    for row, config in enumerate(inference):
        ratio = config["ratio"]
        text = f"{ratio['median']:.2f}, {config['step_seconds'] * 1e3:,.0f} ms"
        _bar(axes[2], row, ratio["median"], text, ratio)
    if shown:
        handles = [
            Patch(color=COLOURS[part], label=part.removesuffix(" forward")) for part in shown
        ]
        lighter = _lighter(COLOURS["student forward"])
        handles.append(Patch(color=lighter, label="lighter: their backward passes"))
        figure.legend(
            handles=handles, loc="outside lower center", ncols=7, frameon=False, fontsize=9
        )
    _leave_room_for_texts(axes)
    if caption:
        figure.suptitle(caption, fontsize=8.5, color="0.35")
    figure.savefig(path, dpi=150)


def stacked_parts(config: dict[str, Any]) -> list[tuple[str, bool, float]]:
    """The step of a config as a stack.

    Args:
        config: with a breakdown.

    Returns:
        Parts, from left to right, with whether it is their backward pass and their height; the
        heights add up to the ratio of the step time.
    """
    breakdown = config["breakdown"]
    scale = config["ratio"]["median"] / breakdown["step_seconds"]
    stack = []
    for part in PARTS:
        if part != BACKWARD and part in breakdown["parts"]:
            stack.append((part, False, breakdown["parts"][part] * scale))
        if part in breakdown["backward_of"]:
            stack.append((part, True, breakdown["backward_of"][part] * scale))
    return stack


def _lighter(color: str) -> tuple[float, ...]:
    return tuple(x + (1 - x) * LIGHT for x in to_rgb(color))


def _any_has(configs: Sequence[dict[str, Any]], part: str) -> bool:
    return any(part in config.get("breakdown", {"parts": ()})["parts"] for config in configs)


def _style(axis: Axes, title: str) -> None:
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel("ratio to the first row", fontsize=9)
    axis.axvline(1, color="0.2", linewidth=1, linestyle="--", zorder=3)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(labelsize=9)
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)


def _time_bar(axis: Axes, row: int, config: dict[str, Any]) -> None:
    ratio = config["ratio"]
    text = f"{ratio['median']:.2f}, {config['step_seconds'] * 1e3:,.0f} ms"
    if "breakdown" not in config:
        _bar(axis, row, ratio["median"], text, ratio)
        return
    left = 0.0
    for part, is_backward, width in stacked_parts(config):
        color = _lighter(COLOURS[part]) if is_backward else COLOURS[part]
        axis.barh(row, width, 0.62, left=left, color=color, linewidth=0)
        left += width
    _bar(axis, row, ratio["median"], text, ratio, color="none")


def _bar(
    axis: Axes,
    row: int,
    value: float,
    text: str,
    quartiles: dict[str, float] | None = None,
    color: str = WHOLE,
) -> None:
    """A bar with its value behind it and, if given, whiskers from quartile to quartile."""
    axis.barh(row, value, 0.62, color=color, linewidth=0)
    end = value
    if quartiles is not None:
        low, end = quartiles["q1"], max(value, quartiles["q3"])
        axis.plot([low, quartiles["q3"]], [row, row], color="black", linewidth=1.2, zorder=4)
        for x in (low, quartiles["q3"]):
            axis.plot([x, x], [row - 0.12, row + 0.12], color="black", linewidth=1.2, zorder=4)
    axis.annotate(
        text,
        (end, row),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8.5,
        bbox={"facecolor": "white", "linewidth": 0, "pad": 1},
        zorder=5,
    )


def _leave_room_for_texts(axes: Sequence[Axes]) -> None:
    for axis in axes:
        axis.set_xlim(0, max(axis.get_xlim()[1], 1.05) * 1.4)
