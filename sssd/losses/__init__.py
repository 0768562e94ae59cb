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
from .features import (
    activation_boundary_loss,
    attention_loss,
    attention_map,
    factor_loss,
    hint_loss,
    self_feature_loss,
)
from .fused import normalised_js_divergence
from .gradients import (
    gradient_attention_loss,
    gradient_symmetry_loss,
    input_gradient,
    input_gradient_of_logits,
    twice_differentiable,
)
from .logits import (
    confidence_penalty,
    confidence_weighted_cross_entropy,
    cross_entropy,
    eta_from_target_confidence,
    kd_loss,
    permute_dark_knowledge,
    soft_cross_entropy,
    target_confidence,
    tolerant_teacher_loss,
    top_score_difference,
)
from .normalisation import instance_norm, layer_norm
from .online import (
    gated_ensemble,
    gaussian_rampup,
    mean_ensemble,
    mutual_learning_loss,
    one_loss,
    own_teacher_loss,
)
from .pyramid import DISTANCES, Distance, pyramid_distance
from .relations import rkd_angle_loss, rkd_distance_loss
from .statistics import fsp_loss, fsp_matrix, mmd_loss

__all__ = [
    "DISTANCES",
    "Distance",
    "PyramidAdapter",
    "PyramidDistillation",
    "ShareController",
    "activation_boundary_loss",
    "attention_loss",
    "attention_map",
    "coefficient_schedule",
    "confidence_penalty",
    "confidence_weighted_cross_entropy",
    "constant_coefficient",
    "cosine_coefficient",
    "cross_entropy",
    "eta_from_target_confidence",
    "factor_loss",
    "fsp_loss",
    "fsp_matrix",
    "gated_ensemble",
    "gaussian_rampup",
    "gradient_attention_loss",
    "gradient_symmetry_loss",
    "hint_loss",
    "input_gradient",
    "input_gradient_of_logits",
    "instance_norm",
    "js_distance",
    "js_divergence",
    "kd_loss",
    "kl_divergence",
    "layer_norm",
    "linear_coefficient",
    "log_probabilities",
    "mean_ensemble",
    "mmd_loss",
    "mse",
    "mutual_learning_loss",
    "normalised_js_divergence",
    "one_loss",
    "own_teacher_loss",
    "permute_dark_knowledge",
    "pyramid_distance",
    "rkd_angle_loss",
    "rkd_distance_loss",
    "self_feature_loss",
    "soft_cross_entropy",
    "step_coefficient",
    "target_confidence",
    "tolerant_teacher_loss",
    "top_score_difference",
    "twice_differentiable",
]
