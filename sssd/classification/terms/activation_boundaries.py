"""Activation boundaries (Heo et al., arXiv 1811.03233): which neurons are active.

A first stage initialises the student with this term alone; a second one distils (``kd`` with
temperature 3 and without T^2 in the official code, plain cross-entropy in RepDistiller).
"""

from collections.abc import Sequence

from torch import Tensor, nn

from ...losses import activation_boundary_loss
from ..layers import LayerPairs, PairedTerm
from ..modules import build_connector
from ..surroundings import Surroundings
from ..term import register_term


@register_term("activation_boundaries")
class ActivationBoundaries(PairedTerm):
    """A squared hinge on the signs before the ReLU, through a 1x1 connector.

    Of L pairs, from shallow to deep, pair i has the factor 2^(i - L), i from 1.
    """

    def __init__(
        self,
        surroundings: Surroundings,
        layers: LayerPairs,
        margin: float = 1.0,
        reduction: str = "batch_mean",
    ) -> None:
        """
        Args:
            layers: maps before their ReLU (``layer1.0.act2:input``), from shallow to deep.
            margin, reduction: see :func:`sssd.losses.activation_boundary_loss`; the official weight
                with "batch_mean" is 0.003.
        """
        super().__init__(surroundings, layers)
        self.options = {"margin": margin, "reduction": reduction}
        self.connectors = nn.ModuleList(
            build_connector(surroundings.student_shape(s), surroundings.teacher_shape(t), (s, t))
            for s, t in self.pairs
        )

    def loss(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        connected = [connect(x) for connect, x in zip(self.connectors, student, strict=True)]
        return sum(
            activation_boundary_loss(s, t, **self.options) / 2**depth
            for depth, (s, t) in enumerate(zip(connected[::-1], teacher[::-1], strict=True))
        )
