"""Boxes drawn on pictures."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from detectron2.structures import Instances

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

__all__ = ["draw_detections"]


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
                _draw_box(axis, box.tolist(), f"C{int(index)}", label)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_box(axis: plt.Axes, box: list[float], color: str, label: str) -> None:
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
