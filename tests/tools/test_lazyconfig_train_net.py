"""LazyConfig: the recipes, and the command line."""

import json
import os
import subprocess
import sys

import detectron2.modeling
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch import GeneralizedRCNN, RetinaNet
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.utils.events import EventStorage

from sssd import SelfDistiller
from sssd.engine import labelenc_step, load_config
from tests.coco_files import write_coco
from tests.conftest import REPOSITORY
from tests.detectors import training_input

SWIN = REPOSITORY / "configs" / "lazy" / "SSSD" / "retinanet_Swin_T_FPN_3x.py"
EVERY = set((REPOSITORY / "configs" / "lazy").glob("[A-Z]*/*.py")) - {SWIN}
LABELENC = sorted(path for path in EVERY if path.parent.name == "LabelEnc")
CONFIGS = sorted(EVERY - set(LABELENC))
RCNN = dict.fromkeys(("faster", "mask", "cascade"), GeneralizedRCNN)
CLASSES = {**RCNN, "retinanet": RetinaNet, "fcos": FCOS}


def name(path):
    return f"{path.parent.name}/{path.stem}"


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_every_recipe_builds_and_says_what_its_yacs_twin_says(path):
    cfg = LazyConfig.load(str(path))
    yacs = load_config(str(REPOSITORY / "configs" / path.parent.name / f"{path.stem}.yaml"))
    with torch.device("meta"):
        model = instantiate(cfg.model)
    student = model
    if path.parent.name != "Plain":
        assert isinstance(model, SelfDistiller)
        student, keys = model.student, yacs.MODEL.SSSD
        distance = model.training_parts["distillation"]
        assert distance.options["distance"] == keys.DISTANCE.NAME
        assert distance.options["level_reduction"] == keys.DISTANCE.LEVEL_REDUCTION
        assert distance.mask_padding == keys.DISTANCE.MASK_PADDING
        step = yacs.SOLVER.STEPS[0]
        values = [model.schedule(0), model.schedule(step - 1), model.schedule(step)]
        first, *rest = keys.COEFFICIENT.VALUES
        assert values == pytest.approx([first, first, *(rest or [first])])
        assert model.teacher.add_context_box == keys.TEACHER.ADD_CONTEXT_BOX
        assert model.teacher.detach_appearance == keys.TEACHER.DETACH_APPEARANCE
        scale = yacs.SOLVER.MAX_ITER / 180000
        assert model.phases.no_distill_iters == 30000 * scale
        assert model.phases.freeze_backbone_iters == 20000 * scale
        assert model.teacher_precision == keys.TEACHER.PRECISION
        assert model.activation_checkpoint == keys.TEACHER.ACTIVATION_CHECKPOINT
        width = model.teacher.painter.refinement[-2].out_channels
        inner = model.teacher.painter.refinement[0].in_channels
        assert inner == (keys.TEACHER.REFINEMENT_DIM or width)
        assert distance.adapter[2].in_channels == (keys.DISTANCE.ADAPTER_DIM or width)
    assert type(student) is CLASSES[path.stem.split("_")[0]]
    assert (cfg.train.max_iter, cfg.optimizer.lr) == (yacs.SOLVER.MAX_ITER, yacs.SOLVER.BASE_LR)
    clip = yacs.SOLVER.CLIP_GRADIENTS
    assert cfg.train.get("clip_value") == (clip.CLIP_VALUE if clip.ENABLED else None)
    assert not clip.ENABLED or clip.CLIP_TYPE == "value"
    assert cfg.train.init_checkpoint == yacs.MODEL.WEIGHTS
    assert cfg.dataloader.train.mapper.use_instance_mask == yacs.MODEL.MASK_ON
    multiplier = instantiate(cfg.lr_multiplier)
    for iteration, factor in ((0, 0.001), (1000, 1.0), (yacs.SOLVER.STEPS[0], 0.1)):
        assert multiplier(iteration / cfg.train.max_iter) == pytest.approx(factor)


@pytest.mark.parametrize("path", LABELENC, ids=name)
def test_every_step_of_labelenc_says_what_its_yacs_twin_says(path):
    recipe, step = path.stem.split("_step")
    yacs = load_config(str(REPOSITORY / "configs" / "LabelEnc" / f"{recipe}.yaml"))
    yacs, cfg = labelenc_step(yacs, int(step)), LazyConfig.load(str(path))
    with torch.device("meta"):
        model, twin = instantiate(cfg.model), META_ARCH_REGISTRY.get("SelfDistiller")(yacs)
    assert (cfg.train.max_iter, cfg.optimizer.lr) == (yacs.SOLVER.MAX_ITER, yacs.SOLVER.BASE_LR)
    assert model.phases == twin.phases and model.teaches == twin.teaches == (step == "1")
    assert model.teacher.augment_scales == twin.teacher.augment_scales
    around = [0, 29_999, 30_000, 79_999, 80_000, 159_999, 160_000]
    assert [model.schedule(i) for i in around] == [twin.schedule(i) for i in around]
    options = [m.training_parts["distillation"] for m in (model, twin)]
    assert options[0].extra_repr() == options[1].extra_repr()
    assert ("first_step" in cfg.train) == (step == "2")
    multiplier = instantiate(cfg.lr_multiplier)
    steps = zip(yacs.SOLVER.STEPS, (0.1, 0.01), strict=True)
    for iteration, factor in ((0, 0.001), (1000, 1.0), *steps):
        assert multiplier(iteration / cfg.train.max_iter) == pytest.approx(factor)


@pytest.mark.parametrize("detector", CLASSES)
def test_the_student_is_the_one_of_the_yacs_recipe(detector):
    path = next(p for p in CONFIGS if p.parent.name == "Plain" and p.stem.startswith(detector))
    yacs = load_config(str(REPOSITORY / "configs" / "Plain" / f"{path.stem}.yaml"))
    with torch.device("meta"):
        lazy = instantiate(LazyConfig.load(str(path)).model)
        stock = META_ARCH_REGISTRY.get(yacs.MODEL.META_ARCHITECTURE)(yacs)
    shapes = {k: v.shape for k, v in lazy.state_dict().items()}
    assert shapes == {k: v.shape for k, v in stock.state_dict().items()}
    heads, twin = (getattr(model, "roi_heads", None) for model in (lazy, stock))
    if hasattr(heads, "proposal_matchers"):  # a cascade
        assert _stages(heads) == _stages(twin)
        assert lazy.proposal_generator.post_nms_topk == stock.proposal_generator.post_nms_topk


def _stages(heads):
    """IoU threshold and box weights of each stage of a cascade."""
    stages = zip(heads.proposal_matchers, heads.box_predictor, strict=True)
    return [(m.thresholds, tuple(p.box2box_transform.weights)) for m, p in stages]


def test_building_lazily_leaves_the_students_weights_and_stream_alone():
    cfg = LazyConfig.load(str(REPOSITORY / "configs/lazy/SSSD/faster_rcnn_R_50_FPN_1x.py"))
    torch.manual_seed(0)
    plain = instantiate(cfg.model.student)
    expected = torch.rand(2)
    torch.manual_seed(0)
    model = instantiate(cfg.model)
    assert torch.equal(torch.rand(2), expected)
    for key, value in plain.state_dict().items():
        assert torch.equal(model.student.state_dict()[key], value), key
    # and what is built works
    with EventStorage(0):
        losses = model.train()([training_input(2)])
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_swin_t_where_detectron2_has_it():
    if not hasattr(detectron2.modeling, "SwinTransformer"):
        pytest.skip("this Detectron2 has no SwinTransformer (v0.6)")
    pytest.importorskip("timm", reason="Detectron2's SwinTransformer needs timm")
    cfg = LazyConfig.load(str(SWIN))
    cfg.model.phases.freeze_backbone_iters = cfg.model.phases.no_distill_iters = 0
    model = instantiate(cfg.model).train()
    assert list(model.teacher.strides) == ["p3", "p4", "p5", "p6", "p7"]
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    decays = {g["weight_decay"] for g in optimizer.param_groups}
    assert isinstance(optimizer, torch.optim.AdamW) and decays == {0.0, 0.05}
    with EventStorage(0):
        losses = model([training_input(2)])
        sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        assert "instances" in model.eval()([{"image": training_input(1)["image"]}])[0]


def run(folder, *args):
    """The script on six pictures of 96x64 pixels, with random weights and nothing frozen."""
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    register = (
        "import sys, runpy, sssd\n"
        "from detectron2.data.datasets import register_coco_instances\n"
        f"register_coco_instances('own', {{}}, {str(folder / 'annotations.json')!r}, "
        f"{str(folder / 'images')!r})\n"
        "sys.argv[0] = 'tools/lazyconfig_train_net.py'\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    overrides = [
        "train.device=cpu", f"train.output_dir={folder / 'output'}", "train.log_period=2",
        "train.checkpointer.period=2", "dataloader.train.dataset.names=own",
        "dataloader.test.dataset.names=own", "dataloader.train.num_workers=0",
        "dataloader.test.num_workers=0", "dataloader.train.total_batch_size=2",
        "dataloader.train.mapper.augmentations.0.short_edge_length=64",
        "dataloader.test.mapper.augmentations.0.short_edge_length=64", "optimizer.lr=1e-4",
        "model.student.num_classes=3", "model.student.backbone.bottom_up.freeze_at=0",
        "model.student.backbone.bottom_up.stem.norm=BN",
        "model.student.backbone.bottom_up.stages.norm=BN", "model.phases.freeze_backbone_iters=0",
    ]  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", register, "--config-file",
         "configs/lazy/SSSD/retinanet_R_50_FPN_1x.py", *args[:1], *overrides, *args[1:]],
        cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.long
def test_train_resume_evaluate(tmp_path):
    write_coco(tmp_path)
    random = "train.init_checkpoint="
    first = run(tmp_path, f"--num-gpus={0}", random, "train.max_iter=2")
    assert first.returncode == 0, first.stderr[-3000:]
    assert "Self-distillation of RetinaNet: levels p3, p4, p5, p6, p7" in first.stdout

    second = run(tmp_path, "--resume", random, "train.max_iter=4")
    assert second.returncode == 0, second.stderr[-3000:]
    assert "Starting training from iteration 2" in second.stdout
    lines = [json.loads(x) for x in (tmp_path / "output/metrics.json").read_text().splitlines()]
    assert [x["iteration"] for x in lines if "loss_distill/share" in x] == [1, 3]
    final = torch.load(tmp_path / "output/model_final.pth", weights_only=True)
    assert not any(key.startswith("student") for key in final["model"])
    momentum = final.get("optimizer") or final["trainer"]["optimizer"]
    assert len(momentum["state"]) > 100 and "sssd" in final

    weights = f"train.init_checkpoint={tmp_path / 'output/model_final.pth'}"
    third = run(tmp_path, "--eval-only", weights)
    assert third.returncode == 0, third.stderr[-3000:]
    ap = next(x["bbox/AP"] for x in reversed(lines) if "bbox/AP" in x)
    assert f"copypaste: {ap:.4f}," in third.stdout

    nothing = run(tmp_path, "--eval-only", random)
    assert nothing.stderr.strip().splitlines()[-1].startswith("error: There is nothing to evaluate")
    missing = run(tmp_path, "--eval-only", "train.init_checkpoint=nowhere.pth")
    assert missing.returncode != 0
    assert missing.stderr.strip().splitlines()[-1].startswith("error: The checkpoint nowhere.pth")
