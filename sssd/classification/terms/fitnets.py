"""FitNets (Romero et al., arXiv 1412.6550): a hint from the middle of the teacher.

In the paper a first stage trains the student up to its guided layer with this term alone, and a
second one distils (``kd`` with temperature 3 and a weight that falls from 4 to 1).
"""

from torch import Tensor

from ...losses import hint_loss
from ..batch import Batch
from ..modules import build_regressor
from ..surroundings import Surroundings
from ..term import Term, register_term


@register_term("hint")
class Hint(Term):
    """1/2 || r(student's map) - teacher's map ||^2, with a regressor r that trains along."""

    needs_teacher = True

    def __init__(
        self,
        surroundings: Surroundings,
        student_layer: str,
        teacher_layer: str,
        regressor: str = "valid",
        reduction: str = "half_channel_sum",
    ) -> None:
        """
        Args:
            student_layer: the guided layer.
            teacher_layer: the hint layer.
            regressor: "valid" (official code) or "strided" (RepDistiller, mdistiller); see
                :func:`sssd.classification.modules.build_regressor`.
            reduction: see :func:`sssd.losses.hint_loss`; its constants differ.
        """
        super().__init__(student_layers=[student_layer], teacher_layers=[teacher_layer])
        self.student_layer, self.teacher_layer = student_layer, teacher_layer
        self.reduction = reduction
        self.regressor = build_regressor(
            surroundings.student_shape(student_layer),
            surroundings.teacher_shape(teacher_layer),
            kind=regressor,
        )

    def forward(self, batch: Batch) -> Tensor:
        regressed = self.regressor(batch.features[self.student_layer])
        hint = batch.teacher_features[self.teacher_layer]
        return hint_loss(regressed, hint, reduction=self.reduction)
