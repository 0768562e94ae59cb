"""The loss core: tensors in, scalars out. It needs torch and nothing else."""

from .coefficient import (
    ShareController,
    coefficient_schedule,
    constant_coefficient,
    cosine_coefficient,
    linear_coefficient,
    step_coefficient,
)
from .distillation import PyramidAdapter, PyramidDistillation
from .divergence import js_distance, js_divergence, kl_divergence, log_probabilities, mse
from .normalisation import instance_norm, layer_norm
from .pyramid import DISTANCES, Distance, pyramid_distance

__all__ = [
    "DISTANCES",
    "Distance",
    "PyramidAdapter",
    "PyramidDistillation",
    "ShareController",
    "coefficient_schedule",
    "constant_coefficient",
    "cosine_coefficient",
    "instance_norm",
    "js_distance",
    "js_divergence",
    "kl_divergence",
    "layer_norm",
    "linear_coefficient",
    "log_probabilities",
    "mse",
    "pyramid_distance",
    "step_coefficient",
]
