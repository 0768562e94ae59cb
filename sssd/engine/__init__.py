"""Training: trainer, hooks, checkpoints, setup."""

from .. import _detectron2  # noqa: F401

# isort: split
from .averaging import AveragedWeights, evaluate_with_average
from .checkpoint import Checkpointer, CheckpointError, set_earlier_run_aside
from .classification import ClassificationTrainer
from .config_file import ConfigError, load_config, load_lazy_config
from .export import export_student
from .hooks import BestCheckpointer, DistillationMetrics
from .labelenc import initialise_second_step, labelenc_step
from .optimizer import (
    build_optimizer,
    clip_gradients,
    hold_frozen_parameters,
    optimizer_params,
)
from .output import begin_output
from .processes import distributed
from .scripts import argument_parser, launch_script, user_errors
from .setup import describe_distillation, setup
from .signals import signals_passed_on
from .stage_runs import run_stages
from .stages import last_stage, plan_stages
from .trainer import Trainer
from .training_hooks import save_last_good, training_hooks
from .training_step import TrainingStep

__all__ = [
    "AveragedWeights",
    "BestCheckpointer",
    "CheckpointError",
    "ClassificationTrainer",
    "Checkpointer",
    "ConfigError",
    "DistillationMetrics",
    "Trainer",
    "TrainingStep",
    "argument_parser",
    "begin_output",
    "build_optimizer",
    "clip_gradients",
    "describe_distillation",
    "distributed",
    "evaluate_with_average",
    "export_student",
    "hold_frozen_parameters",
    "initialise_second_step",
    "labelenc_step",
    "last_stage",
    "launch_script",
    "load_config",
    "load_lazy_config",
    "optimizer_params",
    "plan_stages",
    "run_stages",
    "save_last_good",
    "set_earlier_run_aside",
    "setup",
    "signals_passed_on",
    "training_hooks",
    "user_errors",
]
