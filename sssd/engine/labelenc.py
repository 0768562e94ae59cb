"""LabelEnc (arXiv 2007.03282): two trainings from one config.

Step 1 trains a detector and, through its heads, the label map encoder; the distance sets in after
a warm-up. Step 2 trains a new detector, whose FPN and heads start from step 1, with the distance to
the frozen encoder's pyramid as auxiliary supervision, until that is cut off.
"""

import os

from detectron2.config import CfgNode

from ..meta_arch import SelfDistiller
from ..teacher.label_map_encoder import fpn_state
from ..weights_file import WeightsFileError, check_weights, read_checkpoint_file
from .checkpoint import CheckpointError
from .processes import file_of_main, from_main

__all__ = ["initialise_second_step", "labelenc_step"]


def labelenc_step(cfg: CfgNode, step: int) -> CfgNode:
    """The config of one of the two steps, in a folder of its own below OUTPUT_DIR.

    Args:
        cfg: a recipe of configs/LabelEnc; its schedule is that of step 2.
        step: 1 or 2.

    Raises:
        ValueError: when the config is not of this method.
    """
    keys = cfg.MODEL.SSSD
    if keys.TEACHER.NAME != "label_map" or cfg.MODEL.META_ARCHITECTURE != "SelfDistiller":
        raise ValueError(
            "LabelEnc needs MODEL.META_ARCHITECTURE 'SelfDistiller' and MODEL.SSSD.TEACHER.NAME "
            f"'label_map', and they are {cfg.MODEL.META_ARCHITECTURE!r} and "
            f"{keys.TEACHER.NAME!r}; use a config of configs/LabelEnc."
        )
    cfg = cfg.clone()
    cfg.defrost()
    keys = cfg.MODEL.SSSD
    coefficient, folder = keys.COEFFICIENT.VALUES[0], cfg.OUTPUT_DIR
    keys.LABELENC.STEP = step
    keys.COEFFICIENT.SCHEDULE = "step"
    if step == 1:
        warmup = keys.LABELENC.WARMUP_ITERS
        cfg.SOLVER.MAX_ITER += warmup
        cfg.SOLVER.STEPS = tuple(s + warmup for s in cfg.SOLVER.STEPS)
        keys.COEFFICIENT.VALUES, keys.COEFFICIENT.MILESTONES = [0.0, coefficient], [warmup]
        keys.LABEL_MAP.AUGMENT_SCALES = True
        cfg.merge_from_list(list(keys.LABELENC.STEP1_OPTS))
    else:
        last = keys.LABELENC.AUXILIARY_ITERS or (cfg.SOLVER.STEPS or [cfg.SOLVER.MAX_ITER])[-1]
        keys.COEFFICIENT.VALUES, keys.COEFFICIENT.MILESTONES = [coefficient, 0.0], [last]
        keys.TEACHER.FROZEN = True
        keys.TEACHER.WEIGHTS = keys.TEACHER.WEIGHTS or os.path.join(
            folder, "step1", "model_final.pth"
        )
    cfg.OUTPUT_DIR = os.path.join(folder, f"step{step}")
    return cfg


def initialise_second_step(model: SelfDistiller, path: str) -> None:
    """Takes the encoder, its FPN and the heads from a checkpoint of step 1.

    The bottom-up network stays as it is.

    Raises:
        CheckpointError: when the file is missing or damaged, is none of step 1, or belongs to
            another architecture.
    """
    if not from_main(os.path.isfile(path)):
        raise CheckpointError(
            f"The checkpoint of step 1, {path}, does not exist; run step 1 first, or name its file "
            "in MODEL.SSSD.TEACHER.WEIGHTS."
        )
    try:
        with file_of_main(path) as file:
            checkpoint = read_checkpoint_file(file)
        check_weights(checkpoint.get("model", {}))
        check_weights(checkpoint.get("sssd", {}))
    except WeightsFileError as error:
        raise CheckpointError(
            f"The checkpoint of step 1, {path}, cannot be read: {error}; run step 1 again."
        ) from error
    prefix = "teacher."
    teacher = {
        name.removeprefix(prefix): value
        for name, value in checkpoint.get("sssd", {}).items()
        if name.startswith(prefix)
    }
    heads = {k: v for k, v in checkpoint.get("model", {}).items() if not k.startswith("backbone.")}
    try:
        model.teacher.load_state_dict(teacher)
        fpn = {f"backbone.{name}": value for name, value in fpn_state(model.teacher).items()}
        missing, unexpected = model.student.load_state_dict({**heads, **fpn}, strict=False)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"The checkpoint {path} is none of step 1 for this detector ({reason[:300]}); both "
            "steps need the same classes, pyramid and heads."
        ) from error
    unexpected += [name for name in missing if not name.startswith("backbone.bottom_up.")]
    if unexpected:
        raise CheckpointError(
            f"The checkpoint {path} is of another detector: {unexpected[0]} and "
            f"{len(unexpected) - 1} more do not fit; both steps need the same heads."
        )
