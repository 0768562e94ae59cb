"""Every config file builds what its name says."""

import pytest
import torch
import yaml
from detectron2.config import get_cfg
from detectron2.modeling import META_ARCH_REGISTRY

from sssd.engine import load_config
from sssd.engine.export import stock_config
from sssd.meta_arch.build import build_phases
from tests.conftest import REPOSITORY

CONFIGS = sorted((REPOSITORY / "configs").glob("*/*.yaml"))
PLAIN = [path for path in CONFIGS if not path.stem.endswith("_sssd")]
DISTILLED = [path for path in CONFIGS if path.stem.endswith("_sssd")]


def name(path):
    return f"{path.parent.name}/{path.stem}"


@pytest.mark.parametrize("path", PLAIN, ids=name)
def test_plain_configs_are_stock_detectron2(path):
    cfg = get_cfg()
    cfg.merge_from_file(str(path), allow_unsafe=False)
    assert cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"


@pytest.mark.parametrize("path", DISTILLED, ids=name)
def test_distilled_configs_differ_from_the_plain_one_beside_them_in_the_method_only(path):
    cfg = load_config(str(path))
    plain = load_config(str(path.with_name(path.name.replace("_sssd", ""))))
    assert cfg.MODEL.META_ARCHITECTURE == "SelfDistiller"
    a, b = stock_config(cfg), stock_config(plain)
    for c in (a, b):
        c.OUTPUT_DIR = ""
        c.SOLVER.CLIP_GRADIENTS.ENABLED = True  # part of LGD's recipe
    assert yaml.safe_load(a.dump()) == yaml.safe_load(b.dump())


@pytest.mark.parametrize("path", DISTILLED, ids=name)
def test_distillation_is_active_for_more_than_half_of_the_run(path):
    cfg = load_config(str(path))
    phases = build_phases(cfg)
    active = sum(phases.distills(i) for i in range(0, cfg.SOLVER.MAX_ITER, 10)) * 10
    assert active > cfg.SOLVER.MAX_ITER / 2


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_every_config_builds(path):
    cfg = load_config(str(path))
    with torch.device("meta"):
        assert META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg).state_dict()


def test_the_2x_recipe_is_the_published_one():
    cfg = load_config(str(REPOSITORY / "configs/COCO/faster_rcnn_R_50_FPN_2x_sssd.yaml"))
    solver, sssd = cfg.SOLVER, cfg.MODEL.SSSD
    assert (solver.MAX_ITER, solver.STEPS, solver.IMS_PER_BATCH) == (180000, (120000, 160000), 16)
    assert (solver.BASE_LR, solver.MOMENTUM, solver.WEIGHT_DECAY) == (0.02, 0.9, 1e-4)
    assert (solver.WARMUP_ITERS, solver.WARMUP_FACTOR) == (1000, 1e-3)
    assert (solver.CLIP_GRADIENTS.CLIP_TYPE, solver.CLIP_GRADIENTS.CLIP_VALUE) == ("value", 1.0)
    assert cfg.INPUT.MIN_SIZE_TRAIN == (640, 672, 704, 736, 768, 800)
    phases = build_phases(cfg)
    assert (phases.no_distill_iters, phases.freeze_backbone_iters) == (30000, 20000)
    assert sssd.COEFFICIENT.VALUES[0] == 75.0 and sssd.DISTANCE.NAME == "js"
