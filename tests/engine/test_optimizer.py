import pytest
import torch
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from detectron2.solver import build_optimizer as build_stock_optimizer
from detectron2.utils.events import EventStorage

from sssd.engine import (
    build_optimizer,
    clip_gradients,
    hold_frozen_parameters,
    optimizer_params,
)
from tests.detectors import build, losses_at, tiny_config

OWN = ["MODEL.SSSD.SOLVER.TEACHER_BASE_LR", 0.5, "MODEL.SSSD.SOLVER.TEACHER_WEIGHT_DECAY", 0.25]


def settings(groups):
    """Parameter -> learning rate and weight decay; a parameter in two groups would be lost."""
    found = [(p, (g["lr"], g["weight_decay"])) for g in groups for p in g["params"]]
    assert len({id(p) for p, _ in found}) == len(found)
    return {id(p): values for p, values in found}


def trained_parameters(module):
    return {id(p) for p in module.parameters() if p.requires_grad}


def test_every_parameter_sits_in_one_group_with_its_own_settings():
    cfg = tiny_config(
        *OWN, "MODEL.BACKBONE.FREEZE_AT", 2, "SOLVER.WEIGHT_DECAY_NORM", 0.0,
        "SOLVER.BASE_LR", 0.1, "SOLVER.WEIGHT_DECAY", 0.01,
    )  # fmt: skip
    model = build_model(cfg)
    found = settings(build_optimizer(cfg, model).param_groups)
    teacher, adapter = model.teacher, model.training_parts["distillation"]
    assert found.keys() == trained_parameters(model)
    assert {found[i] for i in trained_parameters(teacher)} == {(0.5, 0.25)}
    assert {found[i] for i in trained_parameters(adapter)} == {(0.1, 0.01)}
    stock = settings(build_stock_optimizer(cfg, model.student).param_groups)
    assert {i: found[i] for i in stock} == stock
    assert (0.1, 0.0) in stock.values()  # BatchNorm of the student

    lazily = optimizer_params(
        model, base_lr=0.1, weight_decay=0.01, weight_decay_norm=0.0,
        teacher={"base_lr": 0.5, "weight_decay": 0.25},
    )  # fmt: skip
    optimizer = torch.optim.SGD(lazily, lr=0.1, weight_decay=0.01)
    assert settings(optimizer.param_groups) == found


def test_the_teacher_follows_the_students_schedule_from_its_own_learning_rate():
    cfg = tiny_config(*OWN, "SOLVER.STEPS", (1,), "SOLVER.MAX_ITER", 4, "SOLVER.BASE_LR", 0.1)
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    for factor in (1.0, 0.1):
        found = settings(optimizer.param_groups)
        for part, rate in ((model.teacher, 0.5), (model.student, 0.1)):
            rates = [found[i][0] for i in trained_parameters(part)]
            assert rates == pytest.approx([rate * factor] * len(rates))
        with EventStorage(0):
            optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("clipping", ["value", "norm"])
def test_the_teachers_gradients_have_no_part_in_clipping_the_students(clipping):
    cfg = tiny_config(
        "SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", clipping,
        "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.5, "SOLVER.MOMENTUM", 0.0,
    )  # fmt: skip
    steps = []
    for scale in (1.0, 1e6):
        model = build(cfg)
        optimizer = build_optimizer(cfg, model)
        torch.manual_seed(0)
        losses, _ = losses_at(model)
        sum(losses.values()).backward()
        for p in model.teacher.parameters():
            p.grad.mul_(scale)
        with EventStorage(0):
            optimizer.step()
        steps.append(model)
    for a, b in zip(steps[0].student.parameters(), steps[1].student.parameters(), strict=True):
        assert torch.equal(a, b)
    moved = [
        torch.equal(a, b)
        for a, b in zip(steps[0].teacher.parameters(), steps[1].teacher.parameters(), strict=True)
    ]
    assert not all(moved)


def test_gradients_are_clipped_as_the_yacs_optimizer_clips_them():
    cfg = tiny_config(
        "SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "value",
        "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.5, "SOLVER.BASE_LR", 0.1,
    )  # fmt: skip
    model, twin = build(cfg), build(cfg)
    for ours in (model, twin):
        torch.manual_seed(0)
        for parameter in ours.parameters():
            torch.nn.init.normal_(parameter)
    by_yacs = build_optimizer(cfg, model)
    by_hand = torch.optim.SGD(
        optimizer_params(twin, base_lr=0.1, weight_decay_norm=0.0),
        lr=0.1, momentum=cfg.SOLVER.MOMENTUM, weight_decay=cfg.SOLVER.WEIGHT_DECAY,
    )  # fmt: skip
    clip_gradients(by_hand, 0.5)
    hold_frozen_parameters(by_hand, twin)
    for iteration in range(2):
        for ours, optimizer in ((model, by_yacs), (twin, by_hand)):
            torch.manual_seed(iteration)
            for parameter in ours.parameters():
                parameter.grad = torch.randn_like(parameter)
            with EventStorage(iteration):
                optimizer.step()
    weights = [p for _, p in sorted(model.named_parameters())]
    assert all(map(torch.equal, weights, [p for _, p in sorted(twin.named_parameters())]))
    with pytest.raises(ValueError, match="clipped at 0: give a positive value"):
        clip_gradients(by_hand, 0)
