"""Pictures of what a training did."""

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from detectron2.structures import Instances

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

__all__ = ["draw_detections", "plot_training", "read_metrics"]

_COLORS = plt.get_cmap("tab10").colors


def draw_detections(
    path: Path,
    images: Sequence[np.ndarray],
    columns: dict[str, Sequence[Instances]],
    class_names: Sequence[str],
) -> None:
    """Draws boxes side by side: a row for each image, a column for each source.

    Args:
        path: PNG file to write.
        images: (H, W, 3) uint8, RGB.
        columns: title -> one Instances for each image, with ``gt_boxes`` and ``gt_classes`` or
            with ``pred_boxes``, ``pred_classes`` and ``scores``, in pixels of the image.
        class_names: names by class index.
    """
    figure, axes = plt.subplots(
        len(images),
        len(columns),
        figsize=(3.2 * len(columns), 2.8 * len(images)),
        squeeze=False,
        layout="constrained",
    )
    for column, (title, results) in enumerate(columns.items()):
        axes[0, column].set_title(title, fontsize=11)
        for row, (image, instances) in enumerate(zip(images, results, strict=True)):
            axis = axes[row, column]
            axis.imshow(image)
            axis.set_axis_off()
            if instances.has("scores"):
                boxes, classes = instances.pred_boxes, instances.pred_classes
                labels = [
                    f"{class_names[c]} {s:.2f}"
                    for c, s in zip(classes, instances.scores, strict=True)
                ]
            else:
                boxes, classes = instances.gt_boxes, instances.gt_classes
                labels = [class_names[c] for c in classes]
            for box, index, label in zip(boxes, classes, labels, strict=True):
                _draw_box(axis, box.tolist(), _COLORS[int(index) % len(_COLORS)], label)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_box(axis: plt.Axes, box: list[float], color: tuple, label: str) -> None:
    x1, y1, x2, y2 = box
    axis.add_patch(
        Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=1.8)
    )
    axis.text(
        x1,
        max(y1 - 1, 6),
        label,
        fontsize=7,
        color="white",
        verticalalignment="bottom",
        clip_on=True,
        bbox={"facecolor": color, "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
    )


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.json; an unfinished last line (a run in progress) is left out."""
    lines = []
    for line in Path(path).read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def plot_training(path: Path, metrics: Sequence[dict[str, float]], title: str = "") -> None:
    """Plots losses, share of the distillation term and coefficient over the iterations.

    Args:
        path: PNG file to write.
        metrics: from :func:`read_metrics` of a self-distilled run.
        title: above the figure.
    """
    lines = [line for line in metrics if "loss_distill" in line]
    iterations = [line["iteration"] for line in lines]

    def total(prefix: str) -> list[float]:
        return [
            sum(v for k, v in line.items() if k.startswith(prefix) and "distill" not in k)
            for line in lines
        ]

    figure, (losses, share, coefficient) = plt.subplots(
        1, 3, figsize=(12, 3.4), layout="constrained"
    )
    losses.plot(iterations, total("loss_"), label="detection, student's pass")
    losses.plot(iterations, total("teacher_loss_"), label="detection, teacher's pass")
    losses.plot(iterations, [x["loss_distill"] for x in lines], label="distillation, weighted")
    losses.set_title("losses")
    losses.set_ylim(bottom=0)
    losses.legend(fontsize=8)
    share.plot(iterations, [100 * x["loss_distill/share"] for x in lines], color="tab:green")
    share.set_title("distillation, % of the total loss")
    share.set_ylim(0, 100)
    coefficient.plot(
        iterations,
        [x["loss_distill/coefficient"] for x in lines],
        color="tab:red",
        drawstyle="steps-post",
    )
    coefficient.set_title("coefficient")
    coefficient.set_ylim(bottom=0)
    for axis in (losses, share, coefficient):
        axis.set_xlabel("iteration")
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)
