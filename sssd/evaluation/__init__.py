"""Evaluation: COCO average precision, also of the teacher (a diagnostic), and accuracy."""

from .. import _detectron2  # noqa: F401

# isort: split
from sssd.evaluation.coco import FastCOCOEvaluator
from sssd.evaluation.ensemble import NetworkEnsemble
from sssd.evaluation.teacher import evaluate_teacher, ground_truth_mapper
from sssd.evaluation.topk import ClassificationEvaluator

__all__ = [
    "ClassificationEvaluator",
    "FastCOCOEvaluator",
    "NetworkEnsemble",
    "evaluate_teacher",
    "ground_truth_mapper",
]
