"""LabelEnc's two steps against its description: schedule, gradients, initialisation."""

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.utils.events import EventStorage

from sssd.engine import (
    Checkpointer,
    CheckpointError,
    Trainer,
    build_optimizer,
    labelenc_step,
    load_config,
)
from sssd.engine.labelenc import initialise_second_step
from tests.coco_files import register_coco
from tests.conftest import REPOSITORY
from tests.detectors import build, losses_at, tiny_config, training_batch

METHOD = [
    "MODEL.SSSD.TEACHER.NAME", "label_map", "MODEL.SSSD.DISTANCE.NAME", "mse",
    "MODEL.SSSD.DISTANCE.NORM", "layer", "MODEL.SSSD.DISTANCE.LEVEL_REDUCTION", "elements",
    "MODEL.SSSD.DISTANCE.MASK_PADDING", False, "MODEL.SSSD.COEFFICIENT.VALUES", [1.0],
    "MODEL.SSSD.LABELENC.WARMUP_ITERS", 2, "SOLVER.STEPS", (3, 4), "SOLVER.MAX_ITER", 5,
]  # fmt: skip


def recipe(*opts, detector="faster_rcnn"):
    return tiny_config(*METHOD, *opts, detector=detector)


def step(number, *opts, detector="faster_rcnn"):
    return labelenc_step(recipe(*opts, detector=detector), number)


def has_gradient(module):
    return any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_the_published_schedule():
    cfg = load_config(str(REPOSITORY / "configs/LabelEnc/retinanet_R_101_FPN_1x.yaml"))
    one, two = labelenc_step(cfg, 1), labelenc_step(cfg, 2)
    assert (one.SOLVER.MAX_ITER, one.SOLVER.STEPS) == (120000, (90000, 110000))
    assert (two.SOLVER.MAX_ITER, two.SOLVER.STEPS) == (90000, (60000, 80000))
    with torch.device("meta"):
        first, second = (META_ARCH_REGISTRY.get("SelfDistiller")(c) for c in (one, two))
    assert [first.schedule(i) for i in (0, 29_999, 30_000, 119_999)] == [0, 0, 1, 1]
    assert [second.schedule(i) for i in (0, 79_999, 80_000, 89_999)] == [1, 1, 0, 0]
    assert first.teaches and first.teacher.augment_scales
    assert not second.teaches and not second.teacher.augment_scales
    depths = [len(m.student.backbone.bottom_up.res4) for m in (first, second)]
    assert depths == [6, 23]  # ResNet-50 in step 1, ResNet-101 in step 2
    assert two.MODEL.SSSD.TEACHER.WEIGHTS == "./output/step1/model_final.pth"
    assert (one.OUTPUT_DIR, two.OUTPUT_DIR) == ("./output/step1", "./output/step2")


def test_other_configs_are_refused():
    with pytest.raises(ValueError, match=r"LabelEnc needs.*'label_encoding'.*configs/LabelEnc"):
        labelenc_step(tiny_config(), 1)
    with pytest.raises(ValueError, match=r"backbone is a .*ResNet.*FPN"):
        build(
            step(
                1, "MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.OUT_FEATURES",
                ["res3", "res4"], "MODEL.RPN.IN_FEATURES", ["res4"], "MODEL.SSSD.LEVELS", ["res4"],
                "MODEL.ROI_HEADS.IN_FEATURES", ["res4"], "MODEL.ANCHOR_GENERATOR.SIZES", [[32]],
            )
        )  # fmt: skip


@pytest.mark.parametrize("detector", ["faster_rcnn", "retinanet", "fcos"])
def test_the_distance_is_the_mean_squared_error_of_normalised_pyramids(detector):
    model = build(step(1, detector=detector))
    seen = {}
    # The first call of the backbone: in the second it answers with the teacher's maps.
    model.student.backbone.register_forward_hook(
        lambda m, x, y: seen.setdefault("student", y) and None
    )
    model.teacher.register_forward_hook(lambda m, x, y: seen.update(teacher=y))
    losses, _ = losses_at(model, iteration=2)
    adapter = model.training_parts["distillation"].adapter

    def flat(maps):
        return torch.cat([F.group_norm(x, 1).flatten() for x in maps])

    adapted = flat(adapter(x) for x in seen["student"].values())
    expected = F.mse_loss(adapted, flat(seen["teacher"].values()))
    assert losses["loss_distill"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_step_1_trains_the_encoder_through_the_heads_alone():
    model = build(step(1))
    losses, _ = losses_at(model, iteration=2)
    losses["loss_distill"].backward(retain_graph=True)
    assert has_gradient(model.student.backbone)
    assert has_gradient(model.training_parts["distillation"])
    assert not has_gradient(model.teacher) and not has_gradient(model.student.roi_heads)
    model.zero_grad()
    sum(v for k, v in losses.items() if k.startswith("teacher_")).backward()
    assert has_gradient(model.teacher) and has_gradient(model.student.roi_heads)
    assert not has_gradient(model.student.backbone)  # the encoder sees no image


def test_the_warm_up_leaves_the_adapter_where_it_is_and_everything_in_the_graph():
    cfg = step(1, "SOLVER.WEIGHT_DECAY", 0.1, "SOLVER.BASE_LR", 0.1)
    model = build(cfg)
    optimizer = build_optimizer(cfg, model)
    adapter = model.training_parts["distillation"].adapter[0].weight
    moved = []
    for iteration in range(4):
        before = adapter.clone()
        with EventStorage(iteration):
            optimizer.zero_grad()
            losses = model(training_batch(iteration))
            sum(losses.values()).backward()
            assert all(p.grad is not None for p in model.parameters())
            optimizer.step()
        moved.append(not torch.equal(adapter, before))
    assert moved == [False, False, True, True]


@pytest.fixture
def first_step(tmp_path):
    """A checkpoint of step 1 with random weights, and the model that it holds."""
    model = build(step(1), seed=5)
    Checkpointer(model, str(tmp_path)).save("model_final")
    return model, str(tmp_path / "model_final.pth")


def test_step_2_starts_from_encoder_fpn_and_heads(first_step):
    first, path = first_step
    second = build(step(2), seed=6)
    bottom_up = {k: v.clone() for k, v in second.student.backbone.bottom_up.state_dict().items()}
    initialise_second_step(second, path)
    for name, value in first.teacher.state_dict().items():
        assert torch.equal(second.teacher.state_dict()[name], value), name
    for name, value in second.student.state_dict().items():
        if name.startswith("backbone.bottom_up."):
            expected = bottom_up[name.removeprefix("backbone.bottom_up.")]
        elif name.startswith("backbone."):  # the encoder's FPN, not that of step 1's detector
            expected = first.teacher.fpn.state_dict()[name.removeprefix("backbone.")]
            if "weight" in name and "norm" not in name:
                assert not torch.equal(value, first.student.state_dict()[name]), name
        else:
            expected = first.student.state_dict()[name]
        assert torch.equal(value, expected), name


def test_step_2_is_supervised_by_the_still_encoder_until_the_cut_off(first_step):
    cfg = step(2)  # cut off at iteration 4, the last step of the learning rate
    model = build(cfg)
    initialise_second_step(model, first_step[1])
    encoder = {k: v.clone() for k, v in model.teacher.state_dict().items()}
    calls = []
    model.teacher.register_forward_hook(lambda *args: calls.append(model.teacher.training))
    optimizer = build_optimizer(cfg, model)
    adapter = model.training_parts["distillation"].adapter[0].weight
    for iteration in (0, 3, 4):
        before = adapter.clone()
        with EventStorage(iteration):
            optimizer.zero_grad()
            losses = model(training_batch(iteration))
            sum(losses.values()).backward()
            optimizer.step()
        assert not any(name.startswith("teacher_") for name in losses)
        assert (losses["loss_distill"].item() > 0) == (iteration < 4)
        assert torch.equal(adapter, before) == (iteration == 4)
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(p.grad is not None for p in trained)
    assert len(calls) == 2  # not called after the cut-off
    assert all(not p.requires_grad for p in model.teacher.parameters())
    for name, value in encoder.items():
        if not name.endswith("_extra_state"):
            assert torch.equal(model.teacher.state_dict()[name], value), name


def test_what_is_no_first_step_is_refused(first_step, tmp_path):
    model = build(step(2))
    with pytest.raises(CheckpointError, match=r"nowhere\.pth, does not exist; run step 1 first"):
        initialise_second_step(model, str(tmp_path / "nowhere.pth"))
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(Path(first_step[1]).read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="truncated"):
        initialise_second_step(model, str(damaged))
    torch.save({"model": model.state_dict()}, tmp_path / "plain.pth")
    with pytest.raises(CheckpointError, match="none of step 1 for this detector"):
        initialise_second_step(model, str(tmp_path / "plain.pth"))
    other = build(step(2, "MODEL.FPN.OUT_CHANNELS", 32))
    with pytest.raises(CheckpointError, match="none of step 1 for this detector.*size mismatch"):
        initialise_second_step(other, first_step[1])


def test_both_steps_with_the_trainer_and_a_resume(tmp_path):
    name = register_coco("labelenc_coco", tmp_path / "data")
    opts = [
        "DATASETS.TRAIN", (name,), "DATASETS.TEST", (), "DATALOADER.NUM_WORKERS", 0,
        "INPUT.MIN_SIZE_TRAIN", (64,), "SOLVER.CHECKPOINT_PERIOD", 2, "SEED", 3,
        "OUTPUT_DIR", str(tmp_path / "output"),
    ]  # fmt: skip

    def run(number, *more, resume=False):
        cfg = step(number, *opts, *more)
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
        torch.manual_seed(0)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=resume)
        trainer.train()
        return trainer

    first = run(1)
    assert first.max_iter == 7
    second = run(2)
    model = second.checkpointer.model
    assert torch.equal(
        model.teacher.fpn.bottom_up.stem.weight,
        first.checkpointer.model.teacher.fpn.bottom_up.stem.weight,
    )
    # A resumed step 2 goes on from its own checkpoint and needs step 1 no more.
    os.remove(tmp_path / "output" / "step1" / "model_final.pth")
    longer = run(2, "SOLVER.MAX_ITER", 7, resume=True)
    assert longer.start_iter == 5
    saved = torch.load(tmp_path / "output/step2/model_final.pth", weights_only=True)
    plain = build_model(tiny_config(distilled=False))
    plain.load_state_dict(saved["model"], strict=True)


def test_a_teacher_that_draws_is_not_computed_twice():
    with pytest.raises(ValueError, match=r"ACTIVATION_CHECKPOINT .*draws at random: set it to Fal"):
        build(step(1, "MODEL.SSSD.TEACHER.ACTIVATION_CHECKPOINT", True))
    with pytest.raises(ValueError, match=r"TEACHER\.WEIGHTS is 'x.pth', .* 'label_encoding'"):
        build(tiny_config("MODEL.SSSD.TEACHER.WEIGHTS", "x.pth"))


def test_what_is_drawn_goes_on_after_a_resume_without_a_seed():
    first, second = (build(step(1), seed=seed).teacher for seed in (0, 1))
    first._next_generator()
    second.load_state_dict(first.state_dict())
    draws = [teacher._next_generator().initial_seed() for teacher in (first, second)]
    assert draws[0] == draws[1]
