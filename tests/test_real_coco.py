"""Training, resuming, evaluating and exporting on the real pictures of COCO, tiny sizes."""

import math
import os
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng

from sssd.engine import Checkpointer, Trainer, export_student, labelenc_step, load_config
from sssd.visualization import read_metrics
from tests.conftest import REPOSITORY
from tests.test_configs import SHRUNK

TINY = [
    *SHRUNK, "INPUT.MIN_SIZE_TEST", 128, "INPUT.MAX_SIZE_TEST", 192, "DATALOADER.NUM_WORKERS", 0,
    "SOLVER.WARMUP_ITERS", 10, "SOLVER.WARMUP_FACTOR", 0.01, "SOLVER.CLIP_GRADIENTS.ENABLED", True,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm", "SOLVER.STEPS", "(20,)", "SEED", 1,
    "MODEL.SSSD.PHASES.NO_DISTILL_ITERS", 10, "MODEL.SSSD.PHASES.FREEZE_BACKBONE_ITERS", 5,
    "MODEL.SSSD.LABELENC.WARMUP_ITERS", 5,
]  # fmt: skip


def train(cfg, max_iter, resume=False):
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.MAX_ITER = max_iter
    seed_all_rng(cfg.SEED)  # as Detectron2's default_setup does
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    with open(os.path.join(cfg.OUTPUT_DIR, "config.yaml"), "w") as f:
        f.write(cfg.dump())
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def build_exported(path):
    """The student as stock Detectron2 builds it from what the export wrote."""
    if path.endswith("lazy_config.yaml"):
        return instantiate(LazyConfig.load(path).model)
    cfg = get_cfg()
    cfg.merge_from_file(path)
    return build_model(cfg)


@pytest.mark.long
@pytest.mark.parametrize("detector", ["faster_rcnn", "retinanet", "fcos"])
@pytest.mark.parametrize("method", ["SSSD", "LGD", "LabelEnc"])
def test_train_resume_evaluate_export(method, detector, tmp_path, datasets_root):
    recipe = REPOSITORY / "configs" / method / f"{detector}_R_50_FPN_2x.yaml"
    cfg = load_config(str(recipe), [*map(str, TINY), "OUTPUT_DIR", str(tmp_path)])
    if method == "LabelEnc":
        train(labelenc_step(cfg, 1), 30)
        cfg = labelenc_step(cfg, 2)
    train(cfg, 30)
    trainer = train(cfg, 40, resume=True)
    assert trainer.start_iter == 30
    lines = read_metrics(Path(cfg.OUTPUT_DIR) / "metrics.json")
    losses = [x for x in lines if "loss_distill" in x]
    assert [x["iteration"] for x in losses] == [19, 29, 39]
    assert all(math.isfinite(v) for x in losses for k, v in x.items() if "loss" in k)

    # --eval-only: a fresh model from the file has the figures of the one that was trained.
    checkpoint = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    model = Trainer.build_model(cfg)
    Checkpointer(model).load(checkpoint, checkpointables=[], whole=True)
    results = Trainer.test(cfg, model)["bbox"]
    trained = next(x for x in reversed(lines) if "bbox/AP" in x)
    assert results["AP"] == pytest.approx(trained["bbox/AP"], nan_ok=True)

    path = export_student(
        checkpoint, os.path.join(cfg.OUTPUT_DIR, "config.yaml"), str(tmp_path / "student")
    )
    stock = build_exported(path).eval()
    weights = torch.load(tmp_path / "student" / "model.pth", weights_only=True)
    stock.load_state_dict(weights["model"], strict=True)
    image = torch.randint(256, (3, 128, 160), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, module in (*stock.named_modules(), *model.named_modules()):
            if "test_score_thresh" in vars(module):
                # So early there are hardly any detections above it.
                module.test_score_thresh = -1.0
            if detector == "fcos" and name.endswith("bbox_pred"):
                # FCOS's distances to the box's sides pass a ReLU. After so few iterations they are
                # all 0 for a seed in three, and Detectron2 drops boxes without an area.
                module.bias += 5.0
        a, b = (m.eval()([{"image": image}])[0]["instances"].get_fields() for m in (stock, model))
    assert len(a["scores"]) > 0
    assert torch.equal(a["scores"], b["scores"])
    assert torch.equal(a["pred_boxes"].tensor, b["pred_boxes"].tensor)
