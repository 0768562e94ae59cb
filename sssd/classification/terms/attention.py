"""Attention transfer by activations (Zagoruyko and Komodakis, arXiv 1612.03928, section 3.1)."""

from torch import Tensor

from ...losses import attention_loss
from ..layers import LayerPairs, PairedTerm
from ..surroundings import Surroundings
from ..term import register_term


@register_term("attention")
class Attention(PairedTerm):
    """Where in the image a layer is active, as the teacher's is; summed over pairs of layers."""

    def __init__(
        self,
        surroundings: Surroundings,
        layers: LayerPairs,
        p: float = 2,
        mode: str = "code",
        resize: bool = True,
    ) -> None:
        """
        Args:
            layers: the outputs of the residual groups, as a rule.
            p, mode, resize: see :func:`sssd.losses.attention_loss`. The usual weight 1000 is for
                "code"; for "paper" it is beta / 2.
        """
        super().__init__(surroundings, layers)
        self.options = {"p": p, "mode": mode, "resize": resize}

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return attention_loss(student, teacher, **self.options)
