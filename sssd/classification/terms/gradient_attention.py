"""Attention transfer by gradients (Zagoruyko and Komodakis, arXiv 1612.03928, section 3.2).

The attention is the slope of the loss by the image. The student's is differentiated again, which
makes these the dearest terms. The labels come into it, so a teacher is asked with them as well.
"""

from torch import Tensor

from ...losses import (
    gradient_attention_loss,
    gradient_symmetry_loss,
    input_gradient,
    input_gradient_of_logits,
)
from ..batch import Batch
from ..statistics import statistics_held
from ..surroundings import Surroundings
from ..term import Term, register_term


class _GradientTerm(Term):
    needs_input_gradient = True

    def __init__(self, surroundings: Surroundings) -> None:
        super().__init__()

    @staticmethod
    def student_gradient(batch: Batch) -> Tensor:
        return input_gradient_of_logits(batch.logits, batch.images, batch.labels, create_graph=True)


@register_term("gradient_attention")
class GradientAttention(_GradientTerm):
    """1/2 || J_student - J_teacher ||_2 with J = d CE / d image, each for its own loss."""

    needs_teacher = True
    runs_teacher = False

    def forward(self, batch: Batch) -> Tensor:
        _, teacher = input_gradient(batch.teacher, batch.images, batch.labels)
        return gradient_attention_loss(self.student_gradient(batch), teacher)


@register_term("gradient_symmetry")
class GradientSymmetry(_GradientTerm):
    """1/2 || J(x) - flip(J(flip x)) ||_2 of the student alone. Not for digits or letters."""

    def forward(self, batch: Batch) -> Tensor:
        # The mirror images are no further batch for the running statistics.
        with statistics_held(batch.student):
            _, of_flipped = input_gradient(
                batch.student, batch.images.flip(-1), batch.labels, create_graph=True
            )
        return gradient_symmetry_loss(self.student_gradient(batch), of_flipped)
