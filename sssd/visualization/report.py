"""A report in HTML: one file, without scripts and without a server, and its pictures beside it."""

import base64
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import matplotlib
import numpy as np
from detectron2.structures import Instances
from detectron2.utils.visualizer import ColorMode, Visualizer
from PIL import Image

from .pyramids import PyramidView

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import hsv_to_rgb, to_hex
from matplotlib.patches import Patch, Rectangle

__all__ = [
    "ColoredBoxes",
    "Picture",
    "PictureReport",
    "draw_boxes",
    "draw_levels",
    "draw_overview",
    "write_report",
]

# Pixels of a picture in the report: a small one is enlarged to this width, one with a longer side
# than that made smaller. A page of originals would open on no phone.
_WIDTH, _LONGEST = 480, 960


@dataclass(frozen=True)
class ColoredBoxes:
    """What is drawn on an image, for a picture too small for words.

    Attributes:
        image: (H, W, 3) uint8, RGB, without anything on it.
        corners: (N, 4), x0, y0, x1, y1 in its pixels.
        classes: their names.
        colors: of matplotlib, one for each class.
    """

    image: np.ndarray
    corners: np.ndarray
    classes: Sequence[str]
    colors: Sequence[str]


@dataclass(frozen=True)
class Picture:
    """
    Attributes:
        title: below it.
        pixels: (H, W, 3) uint8, RGB.
        boxes: that are drawn on it; None for a map.
    """

    title: str
    pixels: np.ndarray
    boxes: ColoredBoxes | None = None


@dataclass(frozen=True)
class PictureReport:
    """What the report shows of one image.

    Attributes:
        name: of the image.
        detections: side by side.
        levels: level -> student's map, teacher's map, distance; empty without a teacher.
    """

    name: str
    detections: Sequence[Picture]
    levels: Mapping[str, Sequence[Picture]] = field(default_factory=dict)


def draw_boxes(
    title: str, image: np.ndarray, instances: Instances, class_names: Sequence[str]
) -> Picture:
    """Boxes with their classes, and scores where there are any, on a picture.

    Args:
        title: of the picture.
        image: (H, W, 3) uint8, RGB; a large one is drawn smaller.
        instances: with ``gt_boxes`` and ``gt_classes``, or ``pred_boxes``, ``pred_classes`` and
            ``scores``, in pixels of the image.
        class_names: names by class index.
    """
    scored = instances.has("scores")
    boxes = (instances.pred_boxes if scored else instances.gt_boxes).tensor.cpu()
    classes = (instances.pred_classes if scored else instances.gt_classes).tolist()
    names = [class_names[c] for c in classes]
    labels = names
    if scored:
        labels = [f"{n} {s:.2f}" for n, s in zip(names, instances.scores.tolist(), strict=True)]
    shrunk = min(1.0, _LONGEST / max(image.shape[:2]))
    if shrunk < 1:
        height, width = (max(1, round(shrunk * side)) for side in image.shape[:2])
        boxes = boxes * boxes.new_tensor([width / image.shape[1], height / image.shape[0]] * 2)
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX))
    scale = max(1.0, _WIDTH / image.shape[1])  # legible on small pictures
    visualizer = Visualizer(image, scale=scale, instance_mode=ColorMode.IMAGE)
    colors = [_color(c) for c in classes]
    drawn = visualizer.overlay_instances(boxes=boxes, labels=labels, assigned_colors=colors)
    return Picture(title, drawn.get_image(), ColoredBoxes(image, boxes.numpy(), names, colors))


def _color(number: int) -> str:
    """Of a class; matplotlib's own ten, then hues that stay apart."""
    if number < 10:
        return f"C{number}"
    golden = 0.618034
    return to_hex(hsv_to_rgb((number * golden % 1, 0.9, 0.9 if number % 2 else 0.6)))


def draw_levels(view: PyramidView, highest: float) -> dict[str, list[Picture]]:
    """Three pictures of each level: both maps, from 0 to the larger one's highest value, and the
    distance.

    Args:
        view: of a picture.
        highest: distance that has the brightest colour, the same in all of a report.
    """
    levels = {}
    for name, level in view.levels.items():
        most = max(level.student.max(), level.teacher.max(), 1e-12)
        levels[name] = [
            Picture(f"{name}, student", _colored(level.student / most, "viridis")),
            Picture(f"{name}, teacher", _colored(level.teacher / most, "viridis")),
            Picture(f"{name}, distance", _colored(level.distance / max(highest, 1e-12), "magma")),
        ]
    return levels


def draw_overview(path: Path, reports: Sequence[PictureReport]) -> None:
    """A row for each image: its detections, and the maps and the distance of the finest level.

    Its pictures are small: classes are told apart by colour, and named below.

    Args:
        path: PNG file to write.
        reports: of the images; one or more, with the same titles.
    """
    rows = [[*r.detections, *next(iter(r.levels.values()), ())] for r in reports]
    boxes = [picture.boxes for row in rows for picture in row if picture.boxes is not None]
    named = {name: c for b in boxes for name, c in zip(b.classes, b.colors, strict=True)}
    height, width = rows[0][0].pixels.shape[:2]
    figure, axes = plt.subplots(
        len(rows),
        len(rows[0]),
        figsize=(2.4 * len(rows[0]), 2.4 * height / width * len(rows) + (1.0 if named else 0.6)),
        squeeze=False,
        layout="constrained",
    )
    for axis, picture in zip(axes[0], rows[0], strict=True):
        axis.set_title("\n".join(textwrap.wrap(picture.title, 20)), fontsize=13)
    for line, pictures in zip(axes, rows, strict=True):
        for axis, picture in zip(line, pictures, strict=True):
            _show(axis, picture)
            axis.set_axis_off()
    if named:
        handles = [Patch(fill=False, edgecolor=c, linewidth=2, label=n) for n, c in named.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=8, fontsize=13)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _show(axis: plt.Axes, picture: Picture) -> None:
    if picture.boxes is None:
        axis.imshow(picture.pixels, interpolation="none")
        return
    axis.imshow(picture.boxes.image)
    for (x0, y0, x1, y1), color in zip(picture.boxes.corners, picture.boxes.colors, strict=True):
        axis.add_patch(
            Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=color, linewidth=1.8)
        )


def write_report(
    folder: Path,
    title: str,
    reports: Sequence[PictureReport],
    *,
    summary: Sequence[str] = (),
    scale: str = "",
    curves: Mapping[str, Path] | None = None,
) -> Path:
    """Writes ``index.html``, which holds all pictures, and each of them as a PNG.

    Args:
        folder: of both; it is made.
        title: of the page.
        reports: of the images.
        summary: lines below the title.
        scale: what the colours of the distance mean.
        curves: title -> PNG, shown first.

    Returns:
        The path of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.globals["source"] = lambda picture, *names: _saved(folder, picture, names)
    page = environment.get_template("report.html.jinja").render(
        title=title,
        summary=summary,
        scale=scale,
        reports=reports,
        curves={name: _inline(path.read_bytes()) for name, path in (curves or {}).items()},
    )
    path = folder / "index.html"
    path.write_text(page)
    return path


def _colored(values: np.ndarray, name: str) -> np.ndarray:
    """(H, W) between 0 and 1 -> (H, W, 3) uint8."""
    return (255 * matplotlib.colormaps[name](np.clip(values, 0, 1))[..., :3]).astype(np.uint8)


def _saved(folder: Path, picture: Picture, names: Sequence[str]) -> str:
    """Writes a picture; returns the address that holds it."""
    words = "_".join([*names, picture.title])
    name = "".join(c if c.isalnum() or c in "-." else "_" for c in words)
    path = folder / f"{name}.png"
    Image.fromarray(picture.pixels).save(path, optimize=True)
    return _inline(path.read_bytes())


def _inline(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
