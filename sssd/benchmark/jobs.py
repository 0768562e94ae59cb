"""What a comparison runs: configs and variants, with what the command line sets in all of them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

import torch
from detectron2.config import CfgNode

from ..engine.config_file import load_config
from ..engine.labelenc import labelenc_step
from ..engine.stages import plan_stages
from .data import GeneratedData
from .weights import without_download

__all__ = ["BenchmarkError", "Job", "Setting", "Variant", "chosen_device", "plan_jobs"]

LABELENC_STEPS = ("step1", "step2")
CLASS_COUNTS = (
    "MODEL.ROI_HEADS.NUM_CLASSES",
    "MODEL.RETINANET.NUM_CLASSES",
    "MODEL.SSSD.FCOS.NUM_CLASSES",
)
CLASSIFIER = "ClassificationDistiller"


class BenchmarkError(RuntimeError):
    """A comparison that cannot be made, said in one sentence."""


@dataclass(frozen=True)
class Setting:
    """What all trainings of a comparison have in common; None leaves what the config says.

    Attributes:
        data: generated batches instead of the dataset, for detectors.
        batch: images of a step.
        classes: of the detectors.
        precision: "float32", "float16" or "bfloat16".
        compiled: compile what can be compiled.
        threads: of each process.
    """

    data: GeneratedData | None = None
    batch: int | None = None
    classes: int | None = None
    precision: str | None = None
    compiled: bool = False
    threads: int | None = None


@dataclass(frozen=True)
class Variant:
    """A config with overrides of its own.

    Attributes:
        name: of its row.
        opts: alternating keys and values.
    """

    name: str
    opts: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """One training of a comparison.

    Attributes:
        name: what tells it from the others: file name of the config without its suffix, with as
            many folders as that takes, or name of the variant; with the stage if it is not the
            last one.
        config_file: path, as it was given.
        stage: name of the stage; "" where there is only one training.
        cfg: of that training.
        setting: of the comparison.
        download: MODEL.WEIGHTS of the config, if random weights take the place of a download.
    """

    name: str
    config_file: str
    stage: str
    cfg: CfgNode
    setting: Setting = Setting()
    download: str = ""


def chosen_device(name: str) -> str:
    """The device of that name; of an empty one, a GPU if there is one.

    Raises:
        BenchmarkError: it is a GPU, and there is none.
    """
    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise BenchmarkError(f"There is no device {device} here: use --device cpu.")
    return device


def plan_jobs(
    config_files: Sequence[str],
    opts: Sequence[str] = (),
    *,
    variants: Sequence[Variant] = (),
    device: str = "cpu",
    stage: str = "",
    setting: Setting = Setting(),
) -> list[Job]:
    """Reads the configs.

    Args:
        config_files: paths.
        opts: alternating keys and values, for all of them.
        variants: of the last config, which follow the configs.
        device: for MODEL.DEVICE.
        stage: of a training of several stages, time this one, in the configs that have it. The
            others, and all if it is empty, give their last.
        setting: of the comparison.

    Raises:
        BenchmarkError: a file or the value of an override is missing, there is no such stage or
            device, or a config cannot have the setting.
        ConfigError: there is no such key, or a value is of another type.
        ValueError: a config does not describe its stages as it should.
    """
    device = chosen_device(device)
    for given in (opts, *(variant.opts for variant in variants)):
        if len(given) % 2:
            raise BenchmarkError(
                f"The overrides {' '.join(given)} are no pairs: give a value after each key."
            )
    rows = [
        *((name, path, ()) for name, path in zip(_names(config_files), config_files, strict=True)),
        *((variant.name, config_files[-1], variant.opts) for variant in variants),
    ]
    jobs, known = [], {}
    for name, path, own_opts in rows:
        if not os.path.isfile(path):
            raise BenchmarkError(f"The config {path} does not exist: correct --config-file.")
        cfg = load_config(path, [*opts, *own_opts, "MODEL.DEVICE", device])
        _apply(setting, cfg, path)
        stages = _stages_of(cfg)
        known.update(dict.fromkeys(stages))
        own = stage if stage in stages else list(stages)[-1]
        if own != list(stages)[-1]:
            name = f"{name} ({own})"
        cfg = stages[own]
        download = without_download(cfg) if setting.data is not None else ""
        jobs.append(Job(name, path, own, cfg, setting, download))
    if stage and stage not in known:
        there_are = ", ".join(filter(None, known)) or "none"
        raise BenchmarkError(f"No config has the stage {stage!r}: the stages are {there_are}.")
    return jobs


def _names(paths: Sequence[str]) -> list[str]:
    """The ends of the paths that tell them apart; a path that comes twice gets a number."""
    names = []
    for i, path in enumerate(paths):
        parts = PurePath(path).with_suffix("").parts
        others = [PurePath(x).with_suffix("").parts for x in paths if x != path]
        length = 1
        while length < len(parts) and any(x[-length:] == parts[-length:] for x in others):
            length += 1
        name = "/".join(parts[-length:])
        count = paths[: i + 1].count(path)
        names.append(name if count == 1 else f"{name} ({count})")
    return names


def _apply(setting: Setting, cfg: CfgNode, path: str) -> None:
    """Sets the config's keys.

    Raises:
        BenchmarkError: it cannot have the setting.
    """
    _check(setting, cfg, path)
    if setting.batch is not None:
        cfg.SOLVER.IMS_PER_BATCH = setting.batch
    if setting.classes is not None:
        cfg.MODEL.SSSD.NUM_CLASSES = 0  # those of the student
        cfg.merge_from_list([x for key in CLASS_COUNTS for x in (key, setting.classes)])
    if setting.precision is not None:
        cfg.SOLVER.AMP.ENABLED = setting.precision != "float32"
        if cfg.SOLVER.AMP.ENABLED:
            cfg.MODEL.SSSD.SOLVER.AMP_PRECISION = setting.precision


def _check(setting: Setting, cfg: CfgNode, path: str) -> None:
    if cfg.MODEL.META_ARCHITECTURE == CLASSIFIER:
        if setting.data is not None or setting.classes is not None:
            raise BenchmarkError(
                f"The config {path} trains a classifier, and --image-size, --objects and --classes "
                "are for detectors: leave them out."
            )
        if setting.compiled:
            raise BenchmarkError(
                f"The config {path} trains a classifier, whose layers are hooked into in every "
                "step, and --compile is for detectors: leave it out."
            )
        return
    if setting.data is None:
        if setting.compiled:
            raise BenchmarkError(
                f"The images of the config {path} differ in size, and --compile would compile for "
                "each: give --image-size for generated ones."
            )
        if not cfg.DATASETS.TRAIN:
            raise BenchmarkError(
                f"The config {path} names no dataset: set DATASETS.TRAIN, or give --image-size for "
                "generated batches."
            )
        return
    detector = cfg.MODEL.META_ARCHITECTURE
    if detector == "SelfDistiller":
        detector = cfg.MODEL.SSSD.STUDENT
    lacking = {
        "keypoints": cfg.MODEL.KEYPOINT_ON,
        "proposals": cfg.MODEL.LOAD_PROPOSALS,
        "semantic masks": detector in ("PanopticFPN", "SemanticSegmentor"),
    }
    for what, is_needed in lacking.items():
        if is_needed:
            raise BenchmarkError(
                f"Generated batches have no {what}, which the config {path} trains with: leave out "
                "--image-size and --objects to take its dataset."
            )


def _stages_of(cfg: CfgNode) -> dict[str, CfgNode]:
    """The trainings that tools/train_net.py or tools/train_labelenc.py make of a config."""
    if cfg.MODEL.META_ARCHITECTURE == CLASSIFIER:
        return {stage.name: stage.cfg for stage in plan_stages(cfg)}
    if cfg.MODEL.SSSD.TEACHER.NAME == "label_map" and not cfg.MODEL.SSSD.LABELENC.STEP:
        return {name: labelenc_step(cfg, i + 1) for i, name in enumerate(LABELENC_STEPS)}
    return {"": cfg}
