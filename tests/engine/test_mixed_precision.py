"""Detectors and classifiers learn in mixed precision as they do in float32."""

import os

import pytest
import torch

from sssd.engine import ClassificationTrainer, Trainer
from tests.coco_files import register_coco
from tests.detectors import tiny_config

LENGTH = 8


def losses_of(trainer):
    """Total loss of each iteration, and the values that the last one has logged."""
    torch.manual_seed(0)
    totals = []
    trainer.build_writers = lambda: []
    run_step = trainer._trainer.run_step

    def watched():
        run_step()
        latest = trainer.storage.latest()
        totals.append(latest["total_loss"][0])

    trainer._trainer.run_step = watched
    trainer.train()
    return totals, {name: value for name, (value, _) in trainer.storage.latest().items()}


def assert_close(totals, expected):
    assert totals == pytest.approx(expected, rel=0.1)
    assert totals[0] == pytest.approx(expected[0], rel=0.02)


@pytest.mark.parametrize("detector", ["faster_rcnn", "retinanet", "fcos"])
@pytest.mark.parametrize("precision", ["bfloat16", pytest.param("float16", marks=pytest.mark.long)])
def test_a_distilled_detector_learns_as_in_float32(tmp_path, detector, precision):
    name = register_coco("amp_coco", tmp_path / "data")

    def train(*opts):
        cfg = tiny_config(
            "DATASETS.TRAIN", (name,), "DATASETS.TEST", (), "DATALOADER.NUM_WORKERS", 0,
            "INPUT.MIN_SIZE_TRAIN", (64,), "SOLVER.MAX_ITER", LENGTH, "SEED", 3,
            "OUTPUT_DIR", str(tmp_path / "output"), "SOLVER.BASE_LR", 0.002, *opts,
            detector=detector,
        )  # fmt: skip
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
        torch.manual_seed(0)
        return losses_of(Trainer(cfg))

    expected, values = train()
    totals, mixed = train("SOLVER.AMP.ENABLED", True, "MODEL.SSSD.SOLVER.AMP_PRECISION", precision)
    assert_close(totals, expected)
    distance = "loss_distill/distance"
    assert mixed[distance] == pytest.approx(values[distance], rel=0.05)
    assert ("loss_scale" in mixed) == (precision == "float16")


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("recipe", ["at_gradient", "cs_kd", "dml"])
def test_a_classifier_learns_as_in_float32(tmp_path, recipe, precision):
    pytest.importorskip("timm", reason="timm is not installed")
    from tests.classifiers import KEYS
    from tests.classifiers import tiny_config as tiny_classifier

    def train(*opts):
        cfg = tiny_classifier(recipe, tmp_path, "SOLVER.MAX_ITER", LENGTH, *opts)
        if cfg.MODEL.SSSD.CLASSIFIER.TEACHER.NETWORK:
            cfg.MODEL.SSSD.CLASSIFIER.TEACHER.WEIGHTS = teacher
        torch.manual_seed(0)
        return losses_of(ClassificationTrainer(cfg))

    teacher = str(tmp_path / "teacher.pth")
    if recipe == "at_gradient":
        from sssd.classification import build_network

        torch.manual_seed(1)
        network = build_network("cifar_resnet20", num_classes=10, in_chans=1)
        torch.save(network.state_dict(), teacher)
    expected, _ = train(KEYS + "CHANNELS_LAST", False)
    totals, _ = train("SOLVER.AMP.ENABLED", True, "MODEL.SSSD.SOLVER.AMP_PRECISION", precision)
    assert_close(totals, expected)
