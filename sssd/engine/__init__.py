"""Training: trainer, hooks, checkpoints, setup."""

from .. import _detectron2  # noqa: F401

# isort: split
from .checkpoint import Checkpointer, CheckpointError
from .export import export_student
from .hooks import BestCheckpointer, DistillationMetrics
from .labelenc import initialise_second_step, labelenc_step
from .optimizer import build_optimizer, hold_frozen_backbone, optimizer_params
from .scripts import launch_script, user_errors
from .setup import describe_distillation, load_config, setup
from .trainer import Trainer

__all__ = [
    "BestCheckpointer",
    "CheckpointError",
    "Checkpointer",
    "DistillationMetrics",
    "Trainer",
    "build_optimizer",
    "describe_distillation",
    "export_student",
    "hold_frozen_backbone",
    "initialise_second_step",
    "labelenc_step",
    "launch_script",
    "load_config",
    "optimizer_params",
    "setup",
    "user_errors",
]
