"""A more tolerant teacher (TSD; Yang et al., arXiv 1805.05551).

The first generation learns with this term, the following ones with ``cross_entropy`` and ``kd`` at
temperature 1.
"""

from torch import Tensor

from ...losses import eta_from_target_confidence, tolerant_teacher_loss
from ..batch import Batch
from ..surroundings import Surroundings
from ..term import Term, register_term


@register_term("tolerant_teacher")
class TolerantTeacher(Term):
    """eta CE + (1 - eta) (best score - mean of the K - 1 that follow); holds its cross-entropy."""

    def __init__(self, surroundings: Surroundings, confidence: float = 0.6, k: int = 5) -> None:
        """
        Args:
            confidence: what the best class shall keep, from 1/K to 1 (1: plain cross-entropy); 0.6
                is the paper's best. That its u(eta) is this number is our interpretation:
                :func:`sssd.losses.eta_from_target_confidence`.
            k: classes that count, the best among them: 2 to the number of classes.
        """
        super().__init__()
        if not 2 <= k <= surroundings.num_classes:
            raise ValueError(
                f"The k of the term 'tolerant_teacher' is {k}; it must be from 2 to the number of "
                f"classes, {surroundings.num_classes}."
            )
        self.k, self.eta = k, eta_from_target_confidence(confidence, k)

    def forward(self, batch: Batch) -> Tensor:
        return tolerant_teacher_loss(batch.logits, batch.labels, k=self.k, eta=self.eta)
