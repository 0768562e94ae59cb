"""Relational knowledge distillation (Park et al., arXiv 1904.05068)."""

from collections.abc import Callable

from torch import Tensor

from ...losses import rkd_angle_loss, rkd_distance_loss
from ..capture import EMBEDDING
from ..layers import LayerPairs, PairedTerm
from ..surroundings import Surroundings
from ..term import register_term


class _Relational(PairedTerm):
    function: Callable[..., Tensor]

    def __init__(
        self,
        surroundings: Surroundings,
        layers: LayerPairs = (EMBEDDING,),
        normalize: bool = False,
    ) -> None:
        """
        Args:
            layers: what is compared; the pooled features by default.
            normalize: divide each embedding by its L2 norm first (mmrazor's default).
        """
        super().__init__(surroundings, layers)
        self.normalize = normalize

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return type(self).function(student, teacher, normalize=self.normalize)


@register_term("rkd_distance")
class RelationalDistance(_Relational):
    """The distances of all pairs of images follow the teacher's (usual weight 25)."""

    function = staticmethod(rkd_distance_loss)


@register_term("rkd_angle")
class RelationalAngle(_Relational):
    """The angles of all triangles of images follow the teacher's (usual weight 50)."""

    function = staticmethod(rkd_angle_loss)
