"""Every config file of a detector builds what its name says."""

import copy

import pytest
import torch
import yaml
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.utils.events import EventStorage

from sssd import add_sssd_config
from sssd.data import CheckedDatasetMapper
from sssd.engine import build_optimizer, load_config
from sssd.engine.export import stock_config
from sssd.meta_arch.build import build_coefficient, build_phases
from tests.conftest import REPOSITORY

CONFIGS = sorted(
    path
    for path in (REPOSITORY / "configs").glob("*/*.yaml")
    if path.parent.name != "Classification"  # tests/test_classification_configs.py
)
BY_DATASET = ("BCCD", "Demo")  # plain and distilled side by side; the others are by method


def is_plain(path):
    return path.parent.name == "Plain" or (
        path.parent.name in BY_DATASET and "_sssd" not in path.stem
    )


PLAIN = [path for path in CONFIGS if is_plain(path)]
DISTILLED = [path for path in CONFIGS if not is_plain(path)]


def plain_twin(path):
    if path.parent.name in BY_DATASET:
        return path.with_name(path.name.partition("_sssd")[0].removesuffix(".yaml") + ".yaml")
    return path.parent.parent / "Plain" / path.name


def name(path):
    return f"{path.parent.name}/{path.stem}"


@pytest.mark.parametrize("path", PLAIN, ids=name)
def test_plain_configs_are_stock_detectron2(path):
    cfg = get_cfg()
    if path.stem.startswith("fcos"):  # which stock yacs has no keys for
        add_sssd_config(cfg)
    cfg.merge_from_file(str(path), allow_unsafe=False)
    stock = {"faster": "GeneralizedRCNN", "mask": "GeneralizedRCNN", "cascade": "GeneralizedRCNN"}
    of_name = {**stock, "retinanet": "RetinaNet", "fcos": "Detectron2FCOS"}
    assert of_name[path.stem.split("_")[0]] == cfg.MODEL.META_ARCHITECTURE


@pytest.mark.parametrize("path", DISTILLED, ids=name)
def test_distilled_configs_differ_from_their_plain_twin_in_the_method_only(path):
    cfg, plain = load_config(str(path)), load_config(str(plain_twin(path)))
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


@pytest.mark.parametrize("path", [p for p in CONFIGS if "efficient" in name(p)], ids=name)
def test_the_efficient_preset_is_sssd_with_cheaper_training_parts(path):
    cfg = load_config(str(path))
    if path.parent.name in BY_DATASET:
        faithful = load_config(str(path.with_name(path.name.replace("_efficient", ""))))
    else:
        faithful = load_config(str(path.parent.parent / "SSSD" / path.name))
    with torch.device("meta"):
        model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
    refinement = model.teacher.painter.refinement
    width = refinement[-2].out_channels
    assert refinement[0].in_channels == width // 2
    assert model.training_parts["distillation"].adapter[2].in_channels == width // 2
    assert model.teacher_precision == "bfloat16"
    # Those of regions are short of memory.
    assert model.activation_checkpoint == hasattr(model.student, "roi_heads")
    # And nothing else.
    for x in (cfg, faithful):
        keys = x.MODEL.SSSD
        keys.TEACHER.REFINEMENT_DIM = keys.DISTANCE.ADAPTER_DIM = 0
        keys.TEACHER.PRECISION, keys.TEACHER.ACTIVATION_CHECKPOINT = "float32", False
        x.OUTPUT_DIR = ""
    assert cfg.dump() == faithful.dump()


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_every_config_builds(path):
    cfg = load_config(str(path))
    with torch.device("meta"):
        assert META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg).state_dict()


def test_every_method_has_every_detector_backbone_and_schedule():
    for method in ("Plain", "LGD", "LGD_stepwise", "SSSD", "SSSD_fixed", "SSSD_efficient"):
        for detector in ("faster_rcnn", "retinanet", "fcos"):
            for rest in ("R_50_FPN_1x", "R_50_FPN_2x", "R_101_FPN_1x", "R_101_FPN_2x"):
                assert REPOSITORY / "configs" / method / f"{detector}_{rest}.yaml" in CONFIGS


# The switches of LGD's published configs: context box, detached appearance, last iterations
# without distillation.
LGD = {
    "faster_rcnn_R_50_FPN_2x": (False, True, 0),
    "faster_rcnn_R_101_FPN_2x": (False, True, 0),
    "faster_rcnn_R_101_DCN_FPN_2x": (False, True, 0),
    "faster_rcnn_X_101_DCN_FPN_2x": (False, True, 50000),
    "retinanet_R_50_FPN_2x": (True, False, 0),
    "retinanet_R_101_FPN_2x": (True, False, 0),
    "retinanet_R_101_DCN_FPN_2x": (True, False, 0),
    "retinanet_X_101_DCN_FPN_2x": (True, False, 50000),
    "fcos_R_50_FPN_2x": (False, False, 0),
    "fcos_R_101_FPN_2x": (True, False, 0),
    "fcos_R_101_DCN_FPN_2x": (True, False, 50000),
    "fcos_X_101_DCN_FPN_2x": (True, False, 50000),
}


@pytest.mark.parametrize("recipe", LGD)
@pytest.mark.parametrize("method", ["LGD", "LGD_stepwise", "SSSD", "SSSD_fixed"])
def test_the_2x_recipes_are_the_published_ones(method, recipe):
    path = REPOSITORY / "configs" / method / f"{recipe}.yaml"
    if not path.exists():
        assert "DCN" in recipe and method != "SSSD"
        return
    cfg = load_config(str(path))
    solver, sssd = cfg.SOLVER, cfg.MODEL.SSSD
    base_lr = 0.02 if "faster" in recipe else 0.01
    assert (solver.MAX_ITER, solver.STEPS, solver.IMS_PER_BATCH) == (180000, (120000, 160000), 16)
    assert base_lr == solver.BASE_LR
    assert (solver.MOMENTUM, solver.WEIGHT_DECAY) == (0.9, 1e-4)
    assert (solver.WARMUP_ITERS, solver.WARMUP_FACTOR) == (1000, 1e-3)
    assert (solver.CLIP_GRADIENTS.CLIP_TYPE, solver.CLIP_GRADIENTS.CLIP_VALUE) == ("value", 1.0)
    assert cfg.INPUT.MIN_SIZE_TRAIN == (640, 672, 704, 736, 768, 800)
    phases, coefficient = build_phases(cfg), build_coefficient(cfg)
    assert (phases.no_distill_iters, phases.freeze_backbone_iters) == (30000, 20000)
    assert (
        sssd.TEACHER.ADD_CONTEXT_BOX,
        sssd.TEACHER.DETACH_APPEARANCE,
        phases.distill_off_iters,
    ) == LGD[recipe]
    around_step = (coefficient(119_999), coefficient(120_000))
    if method.startswith("LGD"):
        assert sssd.DISTANCE.NAME == "mse" and sssd.DISTANCE.LEVEL_REDUCTION == "elements"
        assert not sssd.DISTANCE.MASK_PADDING
        assert around_step == pytest.approx((1.0, 1.0 if method == "LGD" else 4 / 3))
    else:
        assert sssd.DISTANCE.NAME == "js" and sssd.DISTANCE.MASK_PADDING
        assert around_step == ((75.0, 75.0) if method == "SSSD_fixed" else (75.0, 100.0))


# ---- One iteration and one detection on a real picture ----

SHRUNK = [
    "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", 0,
    "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64,
    "MODEL.RESNETS.NORM", "BN", "MODEL.RESNETS.STRIDE_IN_1X1", False,
    "MODEL.FPN.OUT_CHANNELS", 64, "MODEL.FPN.NORM", "BN", "MODEL.ROI_BOX_HEAD.FC_DIM", 64,
    "INPUT.MIN_SIZE_TRAIN", (128,), "INPUT.MAX_SIZE_TRAIN", 192, "SOLVER.IMS_PER_BATCH", 2,
    "SOLVER.BASE_LR", 0.01, "SOLVER.WARMUP_ITERS", 0, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 100,
]  # fmt: skip
DEFORMABLE = [*SHRUNK, "MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
COMBINATIONS = [p for p in CONFIGS if p.stem.endswith("R_50_FPN_2x")] + [
    p for p in CONFIGS if p.parent.name == "SSSD" and "101_DCN" in p.stem
]


@pytest.fixture(scope="module")
def real_pictures(datasets_root):
    records = DatasetCatalog.get("coco_2017_train")
    return [r for r in records if 2 <= len(r["annotations"]) <= 8][:2]


@pytest.mark.parametrize("path", COMBINATIONS, ids=name)
def test_every_method_trains_and_detects_with_every_detector(path, real_pictures):
    cfg = load_config(str(path), DEFORMABLE if "DCN" in path.stem else SHRUNK)
    torch.manual_seed(0)
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    mapper = CheckedDatasetMapper(cfg, is_train=True)
    batch = [mapper(copy.deepcopy(record)) for record in real_pictures]
    before = {k: v.clone() for k, v in model.named_parameters() if v.dim() == 4}
    # after the phases, so that the distance trains the student and nothing is frozen
    with EventStorage(cfg.SOLVER.MAX_ITER // 2):
        losses = model(batch)
        sum(losses.values()).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    assert all(loss.isfinite() for loss in losses.values())
    assert ("loss_distill" in losses) is not is_plain(path)
    after = dict(model.named_parameters())
    assert [k for k, v in before.items() if torch.equal(v, after[k])] == []
    with torch.no_grad():
        (found,) = model.eval()([{k: v for k, v in batch[0].items() if k != "instances"}])
    assert found["instances"].image_size == (real_pictures[0]["height"], real_pictures[0]["width"])
