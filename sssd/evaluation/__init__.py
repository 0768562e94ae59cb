"""Evaluation: COCO average precision, and the teacher with ground truth as a diagnostic."""

from .. import _detectron2  # noqa: F401

# isort: split
from sssd.evaluation.coco import FastCOCOEvaluator
from sssd.evaluation.teacher import evaluate_teacher, ground_truth_mapper

__all__ = ["FastCOCOEvaluator", "evaluate_teacher", "ground_truth_mapper"]
