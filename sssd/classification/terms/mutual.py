"""Deep mutual learning (DML; Zhang et al., arXiv 1706.00384).

The networks of MODEL.SSSD.CLASSIFIER.PEERS learn beside the student, each with all the terms of the
config, and are updated in turn: one that learns sees what the others, just updated, predict.
"""

from torch import Tensor

from ...losses import mutual_learning_loss
from ..batch import Batch
from ..surroundings import Surroundings
from ..term import Term, register_term


@register_term("mutual")
class MutualLearning(Term):
    """KL(p_peer || p) at temperature 1, over the peers."""

    needs_peers = True

    def __init__(
        self, surroundings: Surroundings, reduction: str = "mean", target: str = "peer"
    ) -> None:
        """
        Args:
            reduction: over the peers, "mean" (paper) or "sum" (official code).
            target: "peer" for KL(p_peer || p) (paper and codes), "own" for KL(p || p_peer).
        """
        super().__init__()
        self.options = {"reduction": reduction, "target": target}

    def forward(self, batch: Batch) -> Tensor:
        return mutual_learning_loss(batch.logits, batch.peers, **self.options)
