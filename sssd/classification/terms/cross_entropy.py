"""Learning from the labels, and the two classic ways of keeping a network from being too sure."""

from torch import Tensor

from ...losses import confidence_penalty, cross_entropy
from ...losses.logits import check_label_smoothing
from ..batch import Batch
from ..surroundings import Surroundings
from ..term import Term, register_term


@register_term("cross_entropy")
class CrossEntropy(Term):
    """CE(z, y), the mean over the batch."""

    def __init__(self, surroundings: Surroundings, label_smoothing: float = 0.0) -> None:
        """
        Args:
            label_smoothing: share of the target that is spread over all classes (Szegedy et al.,
                arXiv 1512.00567); from 0 to below 1.
        """
        super().__init__()
        check_label_smoothing(label_smoothing)
        self.label_smoothing = label_smoothing

    def forward(self, batch: Batch) -> Tensor:
        return cross_entropy(batch.logits, batch.labels, label_smoothing=self.label_smoothing)


@register_term("confidence_penalty")
class ConfidencePenalty(Term):
    """The negative entropy of the predictions (Pereyra et al., arXiv 1701.06548)."""

    def __init__(self, surroundings: Surroundings) -> None:
        super().__init__()

    def forward(self, batch: Batch) -> Tensor:
        return confidence_penalty(batch.logits)
