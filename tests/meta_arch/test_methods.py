"""The recipes of each method, against its formula written down anew."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import jensenshannon

from sssd.engine import load_config
from tests.conftest import REPOSITORY
from tests.detectors import build, losses_at, tiny_config, training_input

DETECTORS = ("faster_rcnn", "retinanet", "fcos")


def recipe(method, detector):
    """The tiny detector with the method of configs/<method>/<detector>_R_50_FPN_2x.yaml."""
    cfg = tiny_config(detector=detector)
    keys = load_config(str(REPOSITORY / "configs" / method / f"{detector}_R_50_FPN_2x.yaml"))
    for name in ("TEACHER", "DISTANCE", "COEFFICIENT", "PHASES"):
        cfg.MODEL.SSSD[name] = keys.MODEL.SSSD[name]
    for name in ("STEPS", "MAX_ITER"):
        cfg.SOLVER[name] = keys.SOLVER[name]
    return cfg


def instance_normalised(maps):
    return [F.instance_norm(x) for x in maps]


def lgd(student, teacher):
    student, teacher = instance_normalised(student), instance_normalised(teacher)
    return F.mse_loss(
        torch.cat([x.flatten() for x in student]), torch.cat([x.flatten() for x in teacher])
    ).item()


def sssd(student, teacher):
    levels = []
    for a, b in zip(instance_normalised(student), instance_normalised(teacher), strict=True):
        p, q = (x.double().softmax(1).transpose(0, 1).flatten(1).numpy() for x in (a, b))
        divergence = jensenshannon(p, q, base=2, axis=0) ** 2  # one for each position
        levels.append(np.sqrt(divergence.sum() / a.numel()))
    return np.mean(levels)


COEFFICIENTS = {  # before and after iteration 120000
    "LGD": (lgd, 1.0, 1.0),
    "LGD_stepwise": (lgd, 1.0, 4 / 3),
    "SSSD": (sssd, 75.0, 100.0),
    "SSSD_fixed": (sssd, 75.0, 75.0),
}


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("method", COEFFICIENTS)
def test_the_distillation_term_is_the_methods_formula(method, detector):
    formula, *coefficients = COEFFICIENTS[method]
    model = build(recipe(method, detector))
    # Whole cells on every level, p7 included: nothing is padded.
    batch = [training_input(3, 256, 256, seed=0), training_input(1, 256, 256, seed=1)]
    for iteration, coefficient in zip((119_999, 120_000), coefficients, strict=True):
        seen = {}
        hooks = [
            # The first call of the backbone: in the second it answers with the teacher's maps.
            model.student.backbone.register_forward_hook(
                lambda m, x, y, seen=seen: seen.setdefault("student", y) and None
            ),
            model.teacher.register_forward_hook(lambda m, x, y, seen=seen: seen.update(teacher=y)),
        ]
        losses, _ = losses_at(model, iteration, batch)
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            adapter = model.training_parts["distillation"].adapter
            student = [adapter(seen["student"][level]) for level in seen["teacher"]]
            expected = coefficient * formula(
                student, [x.detach() for x in seen["teacher"].values()]
            )
        assert losses["loss_distill"].item() == pytest.approx(expected, rel=1e-4)


def gradients(loss, model):
    """Which parts of the model a loss reaches."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    reached = {id(p) for p, g in zip(parameters, found, strict=True) if g is not None and g.any()}
    backbone = set(map(id, model.student.backbone.parameters()))
    bottom_up = set(map(id, model.bottom_up.parameters()))
    parts = {
        "bottom_up": bottom_up,
        "fpn": backbone - bottom_up,
        "heads": set(map(id, model.student.parameters())) - backbone,
        "teacher": set(map(id, model.teacher.parameters())),
        "adapter": set(map(id, model.training_parts["distillation"].parameters())),
    }
    return {name for name, ids in parts.items() if ids & reached}


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("method", ["LGD", "SSSD"])
def test_which_part_learns_from_which_loss_in_which_phase(method, detector):
    cfg = recipe(method, detector)
    # LGD: for Faster R-CNN alone the teacher's loss is kept from the student's pyramid.
    assert (detector == "faster_rcnn") == cfg.MODEL.SSSD.TEACHER.DETACH_APPEARANCE
    through_appearance = set() if detector == "faster_rcnn" else {"bottom_up", "fpn"}
    model = build(cfg)
    for iteration, frozen, distilled in (
        (0, True, False),
        (19_999, True, False),
        (20_000, False, False),
        (29_999, False, False),
        (30_000, False, True),
        (179_999, False, True),
    ):
        losses, _ = losses_at(model, iteration)
        own = sum(v for k, v in losses.items() if k.startswith("loss") and "distill" not in k)
        teacher = sum(v for k, v in losses.items() if k.startswith("teacher"))
        still = {"bottom_up"} if frozen else set()
        assert gradients(own, model) == {"bottom_up", "fpn", "heads"} - still
        assert gradients(teacher, model) == ({"heads", "teacher"} | through_appearance) - still
        reached = {"adapter", "bottom_up", "fpn"} if distilled else {"adapter"}
        assert gradients(losses["loss_distill"], model) == reached
