"""Class-wise self-knowledge distillation (CS-KD; Yun et al., arXiv 2003.13964)."""

import torch
from torch import Tensor

from ...losses import kd_loss
from ..batch import Batch
from ..statistics import statistics_held
from ..surroundings import Surroundings
from ..term import Term, register_term


@register_term("class_pairs")
class ClassPairs(Term):
    """T^2 KL(p(x') || p(x)): what the network itself says of another image x' of the class.

    x' is a constant. It passes through the network in training mode, on its own, as in the official
    code; unlike there, it does not move the running statistics a second time.
    """

    needs_pairs = True

    def __init__(self, surroundings: Surroundings, temperature: float = 4.0) -> None:
        """
        Args:
            temperature: 4 in the official code; the weight there is 1 (3 for CUB-200).
        """
        super().__init__()
        self.temperature = temperature

    def forward(self, batch: Batch) -> Tensor:
        with torch.no_grad(), statistics_held(batch.student):
            target = batch.student(batch.pair)
        return kd_loss(batch.logits, target, temperature=self.temperature)
