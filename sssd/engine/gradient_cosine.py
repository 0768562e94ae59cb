"""Whether distillation pulls the student where its detection losses pull it, or elsewhere."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from ..losses import ShareController
from ..meta_arch import SelfDistiller

__all__ = ["Agreement", "gradient_agreement"]

# N: batches.

_PIECE = 1 << 20  # elements that are multiplied at a time


@dataclass(frozen=True)
class Agreement:
    """Inner products of the two gradients of a part of the student, of every batch with every one.

    The gradient of a batch is a sample, and mostly noise: even the detection losses of two batches
    hardly agree. Products of two different batches have no noise in common, though, so that their
    means are those of the expected gradients, which are what a training follows in the end.

    Attributes:
        detection: (N, N), of the detection losses' gradients.
        distillation: (N, N), of the distillation term's.
        between: (N, N), of detection (rows) and distillation (columns).
    """

    detection: Tensor
    distillation: Tensor
    between: Tensor

    @property
    def cosine(self) -> Tensor:
        """(N,), of the two in the same batch: 1 where distillation pulls as the detection losses
        do, 0 where it has nothing to do with them, below 0 where it pulls against them."""
        product = self.detection.diagonal() * self.distillation.diagonal()
        return self.between.diagonal() / product.sqrt().clamp(min=1e-20)

    @property
    def ratio(self) -> Tensor:
        """(N,), norm of distillation's gradient to that of the detection losses'."""
        lengths = self.detection.diagonal().sqrt().clamp(min=1e-20)
        return self.distillation.diagonal().sqrt() / lengths

    @property
    def two_batches(self) -> Tensor:
        """(N (N - 1) / 2,), cosine between the detection losses' gradients of two batches."""
        lengths = self.detection.diagonal().sqrt()
        cosines = self.detection / torch.outer(lengths, lengths).clamp(min=1e-20)
        return cosines[tuple(torch.triu_indices(*cosines.shape, offset=1))]

    @property
    def expected(self) -> tuple[float, float]:
        """Cosine of the two expected gradients, and its standard error (the jackknife's).

        NaN where the batches do not suffice to tell an expected gradient from none.
        """
        count = len(self.detection)
        everything = list(range(count))
        if count < 3:  # without one of two there is no pair
            return math.nan, math.nan
        left_out = [self._expected(everything[:i] + everything[i + 1 :]) for i in everything]
        mean = math.fsum(left_out) / count
        squares = math.fsum((value - mean) ** 2 for value in left_out)
        return self._expected(everything), math.sqrt(squares * (count - 1) / count)

    def _expected(self, batches: Sequence[int]) -> float:
        # Each is the sum over pairs of different batches.
        detection, distillation, between = (
            float(p[batches][:, batches].sum() - p.diagonal()[batches].sum())
            for p in (self.detection, self.distillation, self.between)
        )
        if min(detection, distillation) <= 0:
            return math.nan
        return between / math.sqrt(detection * distillation)

    def summary(self) -> str:
        """Means and standard deviations; of the expected gradients, with the standard error."""
        named = {
            "cosine": self.cosine,
            "ratio of norms": self.ratio,
            "detection losses of two batches: cosine": self.two_batches,
        }
        texts = []
        for name, values in named.items():
            if len(values):
                spread = f" ± {values.std():.3f}" if len(values) > 1 else ""
                texts.append(f"{name} {values.mean():.3f}{spread}")
        cosine, error = self.expected
        told = "hidden by the noise of so few batches"
        if math.isfinite(error):
            told = f"cosine {cosine:.2f} ± {error:.2f}"
        texts.append(f"expected gradients: {told}")
        return ", ".join(texts)


def gradient_agreement(
    model: SelfDistiller,
    batches: Iterable[list[Mapping[str, Any]]],
    *,
    count: int,
    iteration: int,
) -> dict[str, Agreement]:
    """Compares the gradients of the student's own detection losses and of the distillation term.

    The model computes as in training, but nothing of it changes, running statistics apart: a share
    controller begins each batch with the averages that it has now. The
    gradients of all batches are kept in the memory of the host: eight bytes for each parameter of
    the backbone and batch.

    Args:
        model: whose teacher has been trained.
        batches: as in training.
        count: of batches to take.
        iteration: whose coefficient counts; the distance has to train the student in it.

    Returns:
        "bottom_up" (the backbone below the pyramid) and "pyramid" (what makes the maps of it).

    Raises:
        ValueError: in that iteration the distance does not train the student, or there are no
            batches to take.
    """
    if count < 1:
        raise ValueError(f"{count} batches have no gradients: take at least one.")
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
    detection: dict[str, list[Tensor]] = {name: [] for name in parts}
    distillation: dict[str, list[Tensor]] = {name: [] for name in parts}
    controllers = [m for m in model.modules() if isinstance(m, ShareController)]
    averages = [controller.averages.clone() for controller in controllers]
    was_training = model.training
    model.train()
    for batch in itertools.islice(batches, count):
        with EventStorage(iteration):
            losses = model(batch)
        for controller, values in zip(controllers, averages, strict=True):
            controller.averages.copy_(values)
        own = [x for name, x in losses.items() if not name.startswith(("teacher_", "loss_distill"))]
        for loss, kept in ((sum(own), detection), (losses["loss_distill"], distillation)):
            gradient = _gradient(loss, trained)
            for name, members in parts.items():
                kept[name].append(torch.cat([gradient[i] for i in members]))
    model.train(was_training)
    return {
        name: Agreement(
            _products(detection[name], detection[name]),
            _products(distillation[name], distillation[name]),
            _products(detection[name], distillation[name]),
        )
        for name in parts
    }


def _products(rows: Sequence[Tensor], columns: Sequence[Tensor]) -> Tensor:
    """Inner products of each with each; in float32, sums of millions are not exact enough."""
    total = torch.zeros(len(rows), len(columns), dtype=torch.float64)
    for parts in zip(*(v.split(_PIECE) for v in (*rows, *columns)), strict=True):
        piece = torch.stack(parts).double()
        total += piece[: len(rows)] @ piece[len(rows) :].T
    return total


def _gradient(loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Flat, float32, on the CPU; zeros where the loss does not reach."""
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return [
        torch.zeros(p.numel()) if g is None else g.flatten().float().cpu()
        for g, p in zip(found, parameters, strict=True)
    ]
