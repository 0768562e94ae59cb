"""Neuron selectivity transfer (Huang and Wang, arXiv 1707.01219)."""

from torch import Tensor

from ...losses import mmd_loss
from ..layers import LayerPairs, PairedTerm
from ..surroundings import Surroundings
from ..term import register_term


@register_term("nst")
class NeuronSelectivity(PairedTerm):
    """MMD^2 between the channels of student and teacher, summed over pairs of layers."""

    def __init__(
        self,
        surroundings: Surroundings,
        layers: LayerPairs,
        kernel: str = "poly",
        degree: int = 2,
        offset: float = 0.0,
    ) -> None:
        """
        Args:
            layers: maps; their channels may differ, unequal sizes are pooled.
            kernel, degree, offset: see :func:`sssd.losses.mmd_loss`. The weight is the paper's
                lambda / 2.
        """
        super().__init__(surroundings, layers)
        self.options = {"kernel": kernel, "degree": degree, "offset": offset}

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return mmd_loss(student, teacher, **self.options)
