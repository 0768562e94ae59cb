"""Evaluators: COCO average precision, with the fast implementation where it is installed."""

from .. import _detectron2  # noqa: F401

# isort: split
from sssd.evaluation.coco import FastCOCOEvaluator

__all__ = ["FastCOCOEvaluator"]
