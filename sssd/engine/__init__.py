"""Training: trainer, hooks, checkpoints, setup."""

from .. import _detectron2  # noqa: F401

# isort: split
from .checkpoint import Checkpointer, CheckpointError
from .export import export_student
from .hooks import BestCheckpointer, DistillationMetrics
from .setup import load_config, setup
from .trainer import Trainer, hold_frozen_backbone

__all__ = [
    "BestCheckpointer",
    "CheckpointError",
    "Checkpointer",
    "DistillationMetrics",
    "Trainer",
    "export_student",
    "hold_frozen_backbone",
    "load_config",
    "setup",
]
