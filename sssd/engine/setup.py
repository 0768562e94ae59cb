"""From a command line to a checked config."""

import logging
import os
from collections.abc import Callable
from glob import escape, glob
from typing import Any

from detectron2.config import CfgNode
from torch import nn

from ..data import check_dataset, is_coco_style
from ..meta_arch import SelfDistiller
from ..meta_arch.build import student_num_classes
from .checkpoint import CheckpointError
from .config_check import check_values
from .config_file import changed_keys, load_config
from .output import begin_output
from .processes import on_main

__all__ = ["check_datasets", "describe_distillation", "setup"]

logger = logging.getLogger("sssd")

# Keys of MODEL in which a resumed run may differ from the run that it continues.
_FREE_ON_RESUME = (
    "MODEL.WEIGHTS",
    "MODEL.DEVICE",
    "MODEL.SSSD.TEST.TEACHER_WITH_GROUND_TRUTH",
    "MODEL.SSSD.SOLVER.MAX_SKIPPED",
    "MODEL.SSSD.SOLVER.BATCH_PARTS",
    "MODEL.SSSD.COCO_DATASETS",
    "MODEL.SSSD.COEFFICIENT.MILESTONES",  # of the schedule, which may change
)


def setup(args: Any, change: Callable[[CfgNode], CfgNode] | None = None) -> CfgNode:
    """Config and logging for a training or evaluation, from Detectron2's own flags.

    Args:
        args: parsed flags.
        change: what a script makes of the config.

    Raises:
        ConfigError: the config file or a value in it cannot be used.
        CheckpointError: when ``--resume`` would continue a run with another config.
        ValueError: when test-time augmentation is asked of the SelfDistiller, or a recipe of two
            steps is to be trained as one.
        OSError: the config cannot be read, or OUTPUT_DIR not be written.
    """
    cfg = load_config(args.config_file, args.opts)
    cfg = cfg if change is None else change(cfg)
    check_values(cfg)
    if cfg.MODEL.SSSD.TEACHER.NAME == "label_map" and not cfg.MODEL.SSSD.LABELENC.STEP:
        raise ValueError(
            f"{args.config_file or 'The config'} is a recipe of two steps (MODEL.SSSD.TEACHER.NAME "
            "'label_map'); train it with tools/train_labelenc.py."
        )
    if cfg.TEST.AUG.ENABLED and cfg.MODEL.META_ARCHITECTURE == "SelfDistiller":
        raise ValueError(
            "Test-time augmentation works on the stock detector: write it with "
            "tools/export_student.py and evaluate that with Detectron2's own tools "
            "(TEST.AUG.ENABLED must be False here)."
        )
    if getattr(args, "resume", False):
        on_main(lambda: check_resumed_config(cfg))
    cfg.freeze()
    begin_output(cfg, args)
    return cfg


def check_resumed_config(cfg: CfgNode) -> None:
    """Refuses to continue a run of OUTPUT_DIR whose model or training data were others.

    The schedule may change (to train longer). Does nothing where there is no run to continue.
    """
    folder = escape(cfg.OUTPUT_DIR)
    path = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
    # Of a run of several stages, each leaves its checkpoints in a folder of its own.
    begun = [name for name in ("", "*") if glob(os.path.join(folder, name, "last_checkpoint"))]
    if not begun or not os.path.isfile(path):
        return
    changed = {
        key: values
        for key, values in changed_keys(path, cfg).items()
        if (key.startswith("MODEL.") or key == "DATASETS.TRAIN") and key not in _FREE_ON_RESUME
    }
    if changed:
        differences = ", ".join(
            f"{key} was {before} and is {now}" for key, (before, now) in sorted(changed.items())
        )
        raise CheckpointError(
            f"{cfg.OUTPUT_DIR} holds a run with another config ({differences}); resume it with the "
            "config that it was started with, or choose another OUTPUT_DIR."
        )


def check_datasets(cfg: CfgNode, model: nn.Module) -> None:
    """Checks every COCO-format dataset of the config against its files and the class count."""
    if isinstance(model, SelfDistiller):
        num_classes = model.teacher.num_classes
    else:
        num_classes = student_num_classes(model)
    for name in dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]):
        if is_coco_style(name):
            report = check_dataset(name, num_classes, training=name in cfg.DATASETS.TRAIN)
            logger.info(report.summary())


def describe_distillation(model: SelfDistiller) -> str:
    """One line: what is distilled, from which iteration on, with which coefficient."""
    phases = model.phases
    options = model.training_parts["distillation"].options
    first, last = phases.no_distill_iters, phases.max_iter - phases.distill_off_iters
    if model.schedule is None:
        share = model.training_parts["coefficient"].share
        coefficient = f"held at {share:.0%} of the total loss"
    else:
        coefficient = ", ".join(
            f"{model.schedule(i):g} from iteration {i}" for i in _changes(model.schedule, phases)
        )
    frozen = phases.freeze_backbone_iters
    return (
        f"Self-distillation of {type(model.student).__name__}: levels "
        f"{', '.join(model.teacher.strides)}, distance {options['distance']} "
        f"({options['axis']}, {options['reduction']}), gradient to the student in "
        f"iterations {min(first, last)} to {last} of {phases.max_iter}, coefficient {coefficient}, "
        + (f"backbone frozen until iteration {frozen}." if frozen else "backbone never frozen.")
    )


def _changes(schedule: Any, phases: Any) -> list[int]:
    """First iteration, then those at which a step schedule changes; first and last for others."""
    settings = getattr(schedule, "keywords", {})  # of the schedules of sssd.losses
    if "milestones" in settings:
        return [0, *(m for m in settings["milestones"] if m < phases.max_iter)]
    if "max_iter" in settings:
        return [0, phases.max_iter - 1]
    return [0]
