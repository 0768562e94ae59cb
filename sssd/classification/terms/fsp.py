"""Flow of the solution procedure (Yim et al., CVPR 2017).

A first stage initialises the student with this term alone; a second one trains it by the labels.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from ...losses import fsp_loss, fsp_matrix
from ..layers import LayerPairs, PairedTerm
from ..surroundings import Surroundings
from ..term import register_term


@register_term("fsp")
class FlowOfSolutionProcedure(PairedTerm):
    """|| G_teacher - G_student ||^2 of the products of consecutive layers, summed over them."""

    def __init__(
        self,
        surroundings: Surroundings,
        layers: LayerPairs,
        pool: str = "max",
        norm: str = "frobenius",
    ) -> None:
        """
        Args:
            layers: L maps, from which L - 1 matrices are made, each of one and the next. Student
                and teacher must have equal widths.
            pool: "max" (paper) or "avg" (RepDistiller); see :func:`sssd.losses.fsp_matrix`.
            norm: "frobenius" (paper), "column_l2" (torchdistill) or "mean_square" (RepDistiller);
                see :func:`sssd.losses.fsp_loss`.
        """
        super().__init__(surroundings, layers)
        if len(self.pairs) < 2:
            raise ValueError(
                f"The term 'fsp' has {len(self.pairs)} layer: give it two or more, since it "
                "compares the flow from one to the next."
            )
        for s, t in self.pairs:
            student, teacher = surroundings.student_shape(s), surroundings.teacher_shape(t)
            if student[0] != teacher[0]:
                raise ValueError(
                    f"The term 'fsp' needs layers of equal width: the student's {s!r} has "
                    f"{student[0]} channels and the teacher's {t!r} has {teacher[0]}; choose "
                    "other layers, or networks of equal width and unequal depth."
                )
        self.pool, self.norm = pool, norm

    def loss(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        matrices = (
            [fsp_matrix(first, last, pool=self.pool) for first, last in pairwise(maps)]
            for maps in (student, teacher)
        )
        return sum(fsp_loss(s, t, norm=self.norm) for s, t in zip(*matrices, strict=True))
