"""One optimizer for two: student (with the adapter) and teacher, each with its own settings."""

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_optimizer as build_stock_optimizer
from detectron2.solver import get_default_optimizer_params
from detectron2.utils.events import get_event_storage
from torch import nn

from ..meta_arch import SelfDistiller

__all__ = ["build_optimizer", "clip_gradients", "hold_frozen_parameters", "optimizer_params"]


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Detectron2's optimizer; the teacher has the learning rate and weight decay of
    MODEL.SSSD.SOLVER, and a backbone that the phases freeze stays where it is.

    Detectron2's gradient clipping looks at one parameter at a time, so the teacher's gradients
    never have a part in how the student's are clipped.
    """
    if not isinstance(model, SelfDistiller):
        return build_stock_optimizer(cfg, model)
    keys = cfg.MODEL.SSSD.SOLVER
    teacher = cfg.clone()
    teacher.defrost()
    if keys.TEACHER_BASE_LR >= 0:
        teacher.SOLVER.BASE_LR = keys.TEACHER_BASE_LR
    if keys.TEACHER_WEIGHT_DECAY >= 0:
        teacher.SOLVER.WEIGHT_DECAY = keys.TEACHER_WEIGHT_DECAY
    optimizer = build_stock_optimizer(cfg, _student_side(model))
    if model.teaches:
        for group in build_stock_optimizer(teacher, model.teacher).param_groups:
            optimizer.add_param_group(group)
    hold_frozen_parameters(optimizer, model)
    return optimizer


def optimizer_params(
    model: nn.Module, teacher: dict[str, Any] | None = None, **kwargs: Any
) -> list[dict[str, Any]]:
    """Parameter groups for a LazyConfig or a training loop of one's own.

    Args:
        model: a SelfDistiller, or a plain detector, for which it is Detectron2's
            ``get_default_optimizer_params``.
        teacher: settings in which the teacher differs, such as ``{"base_lr": 0.02}``.
        kwargs: of ``get_default_optimizer_params``.
    """
    if not isinstance(model, SelfDistiller):
        return get_default_optimizer_params(model, **kwargs)
    return [
        *get_default_optimizer_params(_student_side(model), **kwargs),
        *get_default_optimizer_params(model.teacher, **{**kwargs, **(teacher or {})}),
    ]


def clip_gradients(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Clips each element of the gradients before a step, as SOLVER.CLIP_GRADIENTS by value does.

    Args:
        optimizer: of a LazyConfig or a training loop of one's own.
        value: the largest absolute value that stays.

    Raises:
        ValueError: the value is not positive.
    """
    if value <= 0:
        raise ValueError(f"Gradients are clipped at {value}: give a positive value, or none.")

    def clip(optimizer: torch.optim.Optimizer, *args: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_value_(parameters, value)

    optimizer.register_step_pre_hook(clip)


def _student_side(model: SelfDistiller) -> nn.Module:
    """Everything but the teacher: the adapter goes with the student (as in LGD)."""
    others = [part for part in model.training_parts.values() if part is not model.teacher]
    return nn.ModuleList([model.student, *others])


def hold_frozen_parameters(optimizer: torch.optim.Optimizer, model: SelfDistiller) -> None:
    """Makes ``optimizer`` leave the backbone alone while it is frozen.

    A frozen parameter has a gradient of zero (DistributedDataParallel wants one), and with that,
    weight decay and momentum would move it. So for the length of a step it is no parameter of
    the optimizer.
    """
    held: list[tuple[dict[str, Any], list[nn.Parameter]]] = []

    def take_out(optimizer: torch.optim.Optimizer, *args: Any) -> None:
        frozen = {id(p) for p in model.frozen_parameters(get_event_storage().iter)}
        # Detectron2's clipping optimizers step inside a step: only the outer one counts.
        if held or not frozen:
            return
        for group in optimizer.param_groups:
            held.append((group, group["params"]))
            group["params"] = [p for p in group["params"] if id(p) not in frozen]

    def put_back(*args: Any) -> None:
        for group, parameters in held:
            group["params"] = parameters
        held.clear()

    optimizer.register_step_pre_hook(take_out)
    optimizer.register_step_post_hook(put_back)
