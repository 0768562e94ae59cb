"""Knowledge distillation (Hinton et al., arXiv 1503.02531): the softened predictions of a teacher.

With temperature 1 it is also what Born-Again networks and the students of a tolerant teacher learn.
"""

from torch import Tensor

from ...losses import kd_loss, soft_cross_entropy
from ..batch import Batch
from ..surroundings import Surroundings
from ..term import Term, register_term

SOFT_LOSSES = {"kl": kd_loss, "ce": soft_cross_entropy}


@register_term("kd")
class Distillation(Term):
    """T^2 KL(p_teacher || p_student), both softened by T."""

    needs_teacher = True

    def __init__(
        self,
        surroundings: Surroundings,
        temperature: float = 4.0,
        t_square: bool = True,
        soft: str = "kl",
    ) -> None:
        """
        Args:
            temperature: 4 in the CIFAR recipes of RepDistiller and mdistiller; 3 in those of
                FitNets and AB; 1 for Born-Again networks.
            t_square: multiply by T^2, so that the gradients keep their size when T changes. AB's
                and FitNets' official code do not.
            soft: "kl", or "ce" for the cross-entropy with the teacher's predictions (FitNets): the
                same gradient, and a value that is greater by the teacher's entropy.
        """
        super().__init__()
        if soft not in SOFT_LOSSES:
            raise ValueError(f"The soft of the term 'kd' is {soft!r}: use 'kl' or 'ce'.")
        self.loss = SOFT_LOSSES[soft]
        self.options = {"temperature": temperature, "t_square": t_square}

    def forward(self, batch: Batch) -> Tensor:
        return self.loss(batch.logits, batch.teacher_logits, **self.options)
