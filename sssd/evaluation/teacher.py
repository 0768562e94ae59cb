"""A diagnostic: what the student's heads detect on the teacher's pyramid.

The teacher has the ground truth of the picture, so this is no result of a detector but a bound on
what its pyramid can teach (LGD evaluates the same).
"""

from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, detection_utils
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset, print_csv_format
from torch import nn

from ..data import CheckedDatasetMapper
from ..meta_arch import SelfDistiller

__all__ = ["PREFIX", "evaluate_teacher", "ground_truth_mapper"]

PREFIX = "teacher_with_ground_truth"


class _TeacherDetector(nn.Module):
    def __init__(self, model: SelfDistiller) -> None:
        super().__init__()
        self.model = model

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        return self.model.detect_from_teacher(batched_inputs)


def ground_truth_mapper(cfg: CfgNode) -> CheckedDatasetMapper:
    """Test-time resizing, with the annotations that Detectron2 drops at test time."""
    options = CheckedDatasetMapper.from_config(cfg, is_train=True)
    options["augmentations"] = detection_utils.build_augmentation(cfg, is_train=False)
    return CheckedDatasetMapper(**options)


def evaluate_teacher(
    cfg: CfgNode, model: SelfDistiller, build_evaluator: Callable[[str], DatasetEvaluator]
) -> dict[str, dict[str, dict[str, float]]]:
    """Evaluates the teacher's pyramid on every dataset of DATASETS.TEST.

    Args:
        cfg: the config of the training.
        model: the SelfDistiller, without DistributedDataParallel around it.
        build_evaluator: dataset name -> evaluator.

    Returns:
        dataset name -> "teacher_with_ground_truth/<task>" -> figures; never under a name that the
        student's figures have. Empty dicts on other processes than the main one.
    """
    results = {}
    for name in cfg.DATASETS.TEST:
        loader = build_detection_test_loader(cfg, name, mapper=ground_truth_mapper(cfg))
        found = inference_on_dataset(_TeacherDetector(model), loader, build_evaluator(name)) or {}
        results[name] = {f"{PREFIX}/{task}": figures for task, figures in found.items()}
        print_csv_format(results[name])
    return results
