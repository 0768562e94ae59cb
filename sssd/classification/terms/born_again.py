"""Born-Again networks (Furlanello et al., arXiv 1805.04770): what of distillation helps?

The network itself is the term ``kd`` at temperature 1 over generations
(MODEL.SSSD.CLASSIFIER.GENERATIONS). Here are the paper's two controls.
"""

from torch import Tensor

from ...losses import confidence_weighted_cross_entropy, kd_loss, permute_dark_knowledge
from ..batch import Batch
from ..surroundings import Surroundings
from ..term import Term, register_term


class _BornAgain(Term):
    needs_teacher = True

    def __init__(self, surroundings: Surroundings) -> None:
        super().__init__()


@register_term("cwtm")
class ConfidenceWeighted(_BornAgain):
    """CWTM: cross-entropy with the labels, each image weighted by how sure the teacher is."""

    def forward(self, batch: Batch) -> Tensor:
        return confidence_weighted_cross_entropy(batch.logits, batch.labels, batch.teacher_logits)


@register_term("dkpp")
class PermutedDarkKnowledge(_BornAgain):
    """DKPP: distillation (T = 1) of predictions whose classes but the best are permuted."""

    def forward(self, batch: Batch) -> Tensor:
        permuted = permute_dark_knowledge(batch.teacher_logits)
        return kd_loss(batch.logits, permuted, temperature=1.0)
