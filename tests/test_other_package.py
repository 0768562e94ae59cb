"""A detector that sssd has never seen, from a package of its own (tests/packages/spotnet)."""

import os
import subprocess
import sys

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model

import sssd
from sssd.visualization import read_metrics
from tests.conftest import REPOSITORY
from tests.detectors import losses_at

PACKAGES = REPOSITORY / "tests" / "packages"

# What its users add to their training script, after the import lines and after their own config.
THREE_LINES = (
    "import sssd\n",
    "    sssd.add_sssd_config(cfg)\n",
    "    cfg.merge_from_file('distill.yaml')\n",
)
DISTILL = """
MODEL:
  META_ARCHITECTURE: "SelfDistiller"
  SSSD:
    STUDENT: "SpotNet"
    NUM_CLASSES: 2
    COEFFICIENT: {SCHEDULE: "constant", VALUES: [20.0]}
    PHASES: {NO_DISTILL_ITERS: 10, FREEZE_BACKBONE_ITERS: 0}
"""

LOAD = """
import sys, torch
sys.path.insert(0, sys.argv[1])
{preamble}
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from spotnet import add_spotnet_config
from spotnet.train import squares
torch.set_num_threads(1)
cfg = get_cfg()
add_spotnet_config(cfg)
cfg.MODEL.DEVICE, cfg.MODEL.META_ARCHITECTURE = "cpu", "SpotNet"
cfg.MODEL.BACKBONE.NAME = "LateralBackbone"
model = build_model(cfg).eval()
model.load_state_dict(torch.load(sys.argv[2], weights_only=True)["model"], strict=True)
batch = next(squares(1, seed=9))
with torch.no_grad():
    found = [x["instances"].get_fields() for x in model(batch)]
torch.save([(f["pred_boxes"].tensor, f["scores"], f["pred_classes"]) for f in found], sys.argv[3])
assert "sssd" not in sys.modules
"""


def spotnet_config(*opts):
    sys.path.insert(0, str(PACKAGES))
    try:
        import spotnet
    finally:
        sys.path.remove(str(PACKAGES))
    cfg = get_cfg()
    spotnet.add_spotnet_config(cfg)
    sssd.add_sssd_config(cfg)
    cfg.MODEL.DEVICE, cfg.MODEL.META_ARCHITECTURE = "cpu", "SelfDistiller"
    cfg.MODEL.SSSD.STUDENT, cfg.MODEL.BACKBONE.NAME = "SpotNet", "LateralBackbone"
    cfg.MODEL.SSSD.PHASES.NO_DISTILL_ITERS = cfg.MODEL.SSSD.PHASES.FREEZE_BACKBONE_ITERS = 0
    cfg.merge_from_list(list(opts))
    return cfg


def batch():
    from spotnet.train import squares

    return next(squares(1, seed=3))


def test_its_class_count_is_asked_for_by_name():
    with pytest.raises(ValueError, match=r"SpotNet does not say.*set MODEL\.SSSD\.NUM_CLASSES"):
        build_model(spotnet_config())


def test_its_levels_and_widths_are_taken_as_they_are():
    model = build_model(spotnet_config("MODEL.SSSD.NUM_CLASSES", 2)).train()
    assert model.teacher.strides == {"lateral0": 6, "lateral1": 12, "lateral2": 24}
    losses, storage = losses_at(model, batch=batch())
    own = {"loss_kind", "loss_size"}
    assert set(losses) == own | {f"teacher_{name}" for name in own} | {"loss_distill"}
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    # its own averages have moved once
    assert model.student.mean_spots.item() == pytest.approx(0.1 * 2) and model.student.seen == 1
    assert model.student.tower[1].num_batches_tracked == 3  # three levels, one pass
    assert {"spots", "teacher/spots"} <= set(storage.latest())


def test_three_added_lines_train_it_and_what_they_save_is_its_own(tmp_path):
    script = (PACKAGES / "spotnet" / "train.py").read_text()
    first, second, third = THREE_LINES
    script = script.replace("import torch\n", first + "import torch\n", 1)
    script = script.replace("    model = build", second + third + "    model = build", 1)
    (tmp_path / "train.py").write_text(script)
    (tmp_path / "distill.yaml").write_text(DISTILL)
    path = os.pathsep.join([str(PACKAGES), str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}

    def run(*command):
        result = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr

    run("train.py", str(tmp_path))
    metrics = read_metrics(tmp_path / "metrics.json")
    assert metrics[-1]["loss_kind"] < 0.5 * metrics[0]["loss_kind"]
    assert metrics[-1]["teacher_loss_kind"] < 0.7 * metrics[0]["teacher_loss_kind"]

    preamble = "import sssd_compat; sssd_compat.apply()"
    out = tmp_path / "out.pth"
    checkpoint = str(tmp_path / "model_final.pth")
    run("-c", LOAD.format(preamble=preamble), str(PACKAGES), checkpoint, str(out))
    model = build_model(spotnet_config("MODEL.SSSD.NUM_CLASSES", 2)).eval()
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    from spotnet.train import squares

    with torch.no_grad():
        detections = [x["instances"] for x in model(next(squares(1, seed=9)))]
    for (boxes, scores, classes), found in zip(torch.load(out), detections, strict=True):
        assert torch.equal(boxes, found.pred_boxes.tensor) and torch.equal(scores, found.scores)
        assert torch.equal(classes, found.pred_classes)
