"""Training: trainer, hooks, checkpoints, setup."""

from .. import _detectron2  # noqa: F401

# isort: split
from .checkpoint import Checkpointer, CheckpointError
from .classification import ClassificationTrainer
from .export import export_student
from .hooks import BestCheckpointer, DistillationMetrics
from .labelenc import initialise_second_step, labelenc_step
from .optimizer import build_optimizer, hold_frozen_parameters, optimizer_params
from .scripts import launch_script, user_errors
from .setup import describe_distillation, load_config, setup
from .stage_runs import run_stages
from .stages import last_stage, plan_stages
from .trainer import Trainer

__all__ = [
    "BestCheckpointer",
    "CheckpointError",
    "ClassificationTrainer",
    "Checkpointer",
    "DistillationMetrics",
    "Trainer",
    "build_optimizer",
    "describe_distillation",
    "export_student",
    "hold_frozen_parameters",
    "initialise_second_step",
    "labelenc_step",
    "last_stage",
    "launch_script",
    "load_config",
    "optimizer_params",
    "plan_stages",
    "run_stages",
    "setup",
    "user_errors",
]
