"""Whether distillation pulls the student where its detection losses pull it, or elsewhere."""

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from ..meta_arch import SelfDistiller

__all__ = ["Agreement", "gradient_agreement"]


@dataclass(frozen=True)
class Agreement:
    """Of the two gradients of a part of the student, by batch.

    The gradient of a batch is a sample: even the detection losses agree with themselves no further
    than from one batch to the next.

    Attributes:
        cosine: between them: 1 where distillation pulls as the detection losses do, 0 where it
            has nothing to do with them, below 0 where it pulls against them.
        ratio: norm of distillation's gradient to that of the detection losses'.
        next_batch: cosine between the detection losses' gradients of a batch and of the one before
            it; one value fewer.
    """

    cosine: list[float]
    ratio: list[float]
    next_batch: list[float]

    def summary(self) -> str:
        """Means and, over several batches, standard deviations."""
        named = {
            "cosine": self.cosine,
            "ratio of norms": self.ratio,
            "detection losses of two batches: cosine": self.next_batch,
        }
        texts = []
        for name, values in named.items():
            if values:
                spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
                texts.append(f"{name} {statistics.mean(values):.3f}{spread}")
        return ", ".join(texts)


def gradient_agreement(
    model: SelfDistiller,
    batches: Iterable[list[Mapping[str, Any]]],
    *,
    count: int,
    iteration: int,
) -> dict[str, Agreement]:
    """Compares the gradients of the student's own detection losses and of the distillation term.

    The model computes as in training, but nothing of it changes, running statistics apart.

    Args:
        model: whose teacher has been trained.
        batches: as in training.
        count: of batches to take.
        iteration: whose coefficient counts; the distance has to train the student in it.

    Returns:
        "bottom_up" (the backbone below the pyramid) and "pyramid" (what makes the maps of it).

    Raises:
        ValueError: in that iteration the distance does not train the student.
    """
    if not model.phases.distills(iteration):
        raise ValueError(
            f"In iteration {iteration} the distance does not train the student "
            "(MODEL.SSSD.PHASES): there is no gradient to compare."
        )
    below = {id(p) for p in model.bottom_up.parameters()}
    trained = [p for p in model.student.backbone.parameters() if p.requires_grad]
    parts = {
        "bottom_up": [i for i, p in enumerate(trained) if id(p) in below],
        "pyramid": [i for i, p in enumerate(trained) if id(p) not in below],
    }
    parts = {name: members for name, members in parts.items() if members}
    found = {name: Agreement([], [], []) for name in parts}
    before: dict[str, Tensor] = {}
    was_training = model.training
    model.train()
    for batch in itertools.islice(batches, count):
        with EventStorage(iteration):
            losses = model(batch)
        own = [x for name, x in losses.items() if not name.startswith(("teacher_", "loss_distill"))]
        detection = _gradient(sum(own), trained)
        distillation = _gradient(losses["loss_distill"], trained)
        for name, members in parts.items():
            ours, theirs = (torch.cat([g[i] for i in members]) for g in (detection, distillation))
            found[name].cosine.append(_cosine(ours, theirs))
            found[name].ratio.append(float(theirs.norm() / ours.norm().clamp(min=1e-20)))
            if name in before:
                found[name].next_batch.append(_cosine(ours, before[name]))
            before[name] = ours
    model.train(was_training)
    return found


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()).clamp(min=1e-20))


def _gradient(loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Flat, float64, zeros where the loss does not reach."""
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return [
        torch.zeros(p.numel(), dtype=torch.float64, device=p.device)
        if g is None
        else g.flatten().double()
        for g, p in zip(found, parameters, strict=True)
    ]
