#!/usr/bin/env python
"""Shows what self-distillation does: detections, both pyramids and their distance, and curves.

    tools/visualize.py report --config-file configs/BCCD/faster_rcnn_R_18_FPN_sssd.yaml \\
        --weights output/bccd/R_18_sssd/model_final.pth \\
        --baseline-config configs/BCCD/faster_rcnn_R_18_FPN.yaml \\
        --baseline-weights output/bccd/R_18_plain/model_final.pth --output output/report
    tools/visualize.py curves output/bccd/R_18_plain output/bccd/R_18_sssd --output output/report

`report` writes index.html, one file that opens without a server, its pictures as PNGs, and
overview.png, a row for each image. The weights have to be those of the training, with its teacher.
`curves` takes folders of runs, or *_metrics.json.gz as tools/compare.py keeps them, and writes
curves.png.
"""

import sssd  # noqa: F401  (before Detectron2: it applies the compatibility layer)

# isort: split
import argparse
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, detection_utils
from detectron2.structures import Instances
from torch import nn

from sssd.engine import Trainer, load_config, user_errors
from sssd.evaluation import ground_truth_mapper
from sssd.visualization import plot_panels, plot_runs, read_metrics, view_pyramids
from sssd.visualization.report import (
    PictureReport,
    draw_boxes,
    draw_levels,
    draw_overview,
    write_report,
)

_NAME = "metrics.json"


def main() -> None:
    args = parser().parse_args()
    with user_errors():
        args.run(args)


def curves(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "curves.png"
    plot_runs(path, runs_of(args.runs))
    print(path)


def runs_of(paths: list[Path]) -> dict[str, list[dict[str, float]]]:
    """Name -> lines; the names are the last parts of the paths in which they differ."""
    files = [path / _NAME if path.is_dir() else path for path in paths]
    parts = [Path(str(path).removesuffix(f"/{_NAME}").removesuffix("_metrics.json.gz")).parts
             for path in files]  # fmt: skip
    depth = 1
    while len({p[-depth:] for p in parts}) < len(set(parts)):
        depth += 1
    runs: dict[str, list[dict[str, float]]] = {}
    for part, file in zip(parts, files, strict=True):
        name, lines = "/".join(part[-depth:]), read_metrics(file)
        # A comparison of classifiers keeps the stages of a run apart.
        stages = lines if isinstance(lines, dict) else {"": lines}
        runs |= {f"{name}/{stage}".rstrip("/"): logged for stage, logged in stages.items()}
    return runs


def report(args: argparse.Namespace) -> None:
    if bool(args.baseline_config) != bool(args.baseline_weights):
        raise ValueError("A baseline needs both --baseline-config and --baseline-weights.")
    cfg = config_of(args.config_file, args.weights, args.opts)
    if cfg.MODEL.META_ARCHITECTURE != "SelfDistiller":
        raise ValueError(
            f"{args.config_file} trains no teacher (MODEL.META_ARCHITECTURE is "
            f"{cfg.MODEL.META_ARCHITECTURE!r}): name the config of a self-distilled training."
        )
    cfg.MODEL.SSSD.TEST.TEACHER_WITH_GROUND_TRUTH = True  # so that its teacher is loaded
    dataset = args.dataset or next(iter(cfg.DATASETS.TEST), "")
    records = chosen_records(dataset, args.images, args.ids)
    cfg.DATASETS.TEST = (dataset,)
    model = load(cfg)
    baseline = None
    if args.baseline_config:
        plain = config_of(args.baseline_config, args.baseline_weights, [])
        plain.MODEL.DEVICE = cfg.MODEL.DEVICE
        plain.DATASETS.TEST = (dataset,)
        baseline = load(plain)

    mapper = ground_truth_mapper(cfg)
    classes = MetadataCatalog.get(dataset).thing_classes
    inputs = [mapper(record) for record in records]
    views = [view_pyramids(model, image) for image in inputs]
    highest = max(level.distance.max() for view in views for level in view.levels.values())
    reports, stems = [], [Path(record["file_name"]).stem for record in records]
    for name, record, mapped, view in zip(stems, records, inputs, views, strict=True):
        image = detection_utils.read_image(record["file_name"], "RGB")
        found = {"student": view.student, "teacher, with the ground truth": view.teacher}
        if baseline is not None:
            with torch.no_grad():
                found = {"baseline": baseline([mapped])[0]["instances"], **found}
        pictures = [draw_boxes("ground truth", image, truth(view, image), classes)]
        for title, instances in found.items():
            kept = instances[instances.scores >= args.threshold].to("cpu")
            pictures.append(draw_boxes(title, image, kept, classes))
        if stems.count(name) > 1:  # of other folders
            name += f"_{record['image_id']}"
        reports.append(PictureReport(name, pictures, draw_levels(view, highest)))
    args.output.mkdir(parents=True, exist_ok=True)
    draw_overview(args.output / "overview.png", reports)
    drawn = plot_panels(args.output, runs_of(args.runs)) if args.runs else None
    summary = [
        f"Detections with a score of {args.threshold:g} or more on {len(records)} pictures of "
        f"{dataset}. Student: {args.weights}."
        + (f" Baseline: {args.baseline_weights}." if baseline is not None else ""),
        "The teacher has the ground truth of the picture in hand: what it detects is no result, "
        "but what its pyramid can teach.",
    ]
    scale = (
        "Maps: root mean square over the channels, student and teacher of a level on one scale "
        f"(dark is 0). Distance at each position ({cfg.MODEL.SSSD.DISTANCE.NAME}, over the "
        f"channels): black is 0, the brightest {highest:.3g}, in all of the report."
    )
    print(write_report(args.output, args.title, reports, summary=summary, scale=scale,
                       curves=drawn))  # fmt: skip


def config_of(file: str, weights: str, opts: list[str]) -> CfgNode:
    cfg = load_config(file, opts)
    cfg.MODEL.WEIGHTS = weights
    cfg.DATASETS.TRAIN = ()  # which nobody needs here
    return cfg


def load(cfg: CfgNode) -> nn.Module:
    return Trainer.load_for_evaluation(cfg).eval()


def chosen_records(dataset: str, count: int, ids: list[str]) -> list[dict]:
    """The records of some images, or the first ones.

    Raises:
        ValueError: there is no such dataset or image, or nothing to show.
    """
    if dataset not in DatasetCatalog.list():
        raise ValueError(
            f"There is no dataset {dataset!r}: give --dataset, or DATASETS.TEST of the config, the "
            "name of one that is registered."
        )
    records = DatasetCatalog.get(dataset)
    if not ids:
        if count < 1 or not records:
            raise ValueError(
                f"{count} images of {dataset}, which has {len(records)}, show nothing."
            )
        return records[:count]
    by_id = {str(record["image_id"]): record for record in records}
    unknown = [i for i in ids if i not in by_id]
    if unknown:
        raise ValueError(f"{dataset} has no image with the id {unknown[0]}.")
    return [by_id[i] for i in ids]


def truth(view, image) -> Instances:
    """The annotated objects in pixels of the picture as it is on disk."""
    scaled = Instances(image.shape[:2])
    height, width = view.truth.image_size
    boxes = view.truth.gt_boxes.clone()
    boxes.scale(image.shape[1] / width, image.shape[0] / height)
    scaled.gt_boxes, scaled.gt_classes = boxes, view.truth.gt_classes
    return scaled


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="report | curves")
    of_curves = commands.add_parser("curves", help="losses, share, coefficient, rate and AP")
    of_curves.add_argument("runs", nargs="+", type=Path, help="folders, or *_metrics.json.gz")
    of_curves.add_argument("--output", type=Path, required=True, help="folder")
    of_curves.set_defaults(run=curves)
    of_images = commands.add_parser("report", help="detections and pyramids of some images")
    of_images.add_argument("--config-file", required=True, help="of the self-distilled training")
    of_images.add_argument("--weights", required=True, help="its checkpoint")
    of_images.add_argument("--baseline-config", help="of a plain detector")
    of_images.add_argument("--baseline-weights", help="its checkpoint")
    of_images.add_argument("--runs", nargs="+", type=Path, help="whose curves are shown as well")
    of_images.add_argument("--dataset", help="registered name (the first of DATASETS.TEST)")
    of_images.add_argument("--images", type=int, default=6, help="the first so many (6)")
    of_images.add_argument("--ids", nargs="+", default=[], help="these images instead")
    of_images.add_argument("--threshold", type=float, default=0.5, help="least score (0.5)")
    of_images.add_argument("--title", default="Self-distillation", help="of the page")
    of_images.add_argument("--output", type=Path, required=True, help="folder")
    of_images.add_argument("opts", nargs="*", help="keys and values of the config")
    of_images.set_defaults(run=report)
    return parser


if __name__ == "__main__":
    main()
