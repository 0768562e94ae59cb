"""Factor transfer (Kim et al., arXiv 1802.04977): the teacher's features in the teacher's words.

A first stage trains a paraphraser on the teacher's features, without labels. In the second the
student's translator has to say the same.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from ...losses import factor_loss, mse
from ..batch import Batch
from ..modules import FactorDecoder, FactorEncoder, check_map_shapes
from ..surroundings import Surroundings
from ..term import Term, register_term

PARAPHRASER = "paraphraser"
_ERRORS = {"mse": mse, "l1": F.l1_loss}


def _width(channels: int, rate: float) -> int:
    if not rate > 0 or round(rate * channels) < 1:
        raise ValueError(
            f"The rate of factor transfer is {rate}: the factors of {channels} channels would have "
            "no width; give a positive number such as 0.5."
        )
    return round(rate * channels)


@register_term(PARAPHRASER)
class Paraphraser(Term):
    """First stage: the reconstruction error of an autoencoder of the teacher's features."""

    needs_teacher = True
    needs_student = False

    def __init__(
        self,
        surroundings: Surroundings,
        teacher_layer: str,
        rate: float = 0.5,
        norm: bool = False,
        error: str = "mse",
    ) -> None:
        """
        Args:
            teacher_layer: the output of the last group, as a rule.
            rate: width of the factors, as a share of the teacher's channels.
            norm: BatchNorm after each convolution (torchdistill's default; commented out in the
                official code).
            error: "mse" (paper, from memory; RepDistiller and torchdistill) or "l1" (official
                code).
        """
        super().__init__(teacher_layers=[teacher_layer])
        if error not in _ERRORS:
            raise ValueError(f"The error of the term 'paraphraser' is {error!r}: use mse or l1.")
        self.layer, self.error = teacher_layer, _ERRORS[error]
        shape = surroundings.teacher_shape(teacher_layer)
        check_map_shapes("The term 'paraphraser'", shape)
        channels, width = shape[0], _width(shape[0], rate)
        self.encoder = FactorEncoder(channels, width, norm=norm)
        self.decoder = FactorDecoder(width, channels, norm=norm)

    def forward(self, batch: Batch) -> Tensor:
        features = batch.teacher_features[self.layer]
        return self.error(self.decoder(self.encoder(features)).float(), features.float())


@register_term("factor")
class Factor(Term):
    """Second stage: || F_T / ||F_T|| - F_S / ||F_S|| ||_p of paraphraser and translator."""

    needs_teacher = True

    def __init__(
        self,
        surroundings: Surroundings,
        student_layer: str,
        teacher_layer: str,
        rate: float = 0.5,
        norm: bool = False,
        p: int = 1,
    ) -> None:
        """
        Args:
            student_layer, teacher_layer: the outputs of the last groups; their maps must have equal
                sizes.
            rate, norm: as of the paraphraser's stage.
            p: 1 (official code, with a weight of 500) or 2; see :func:`sssd.losses.factor_loss`.
        """
        super().__init__(student_layers=[student_layer], teacher_layers=[teacher_layer])
        self.student_layer, self.teacher_layer, self.p = student_layer, teacher_layer, p
        student = surroundings.student_shape(student_layer)
        teacher = surroundings.teacher_shape(teacher_layer)
        check_map_shapes("The term 'factor'", student, teacher)
        if student[1:] != teacher[1:]:
            raise ValueError(
                f"Factor transfer compares the student's {student_layer!r}, a map of the shape "
                f"{student}, with the teacher's {teacher_layer!r}, {teacher}: their heights and "
                "widths must be equal; choose other layers."
            )
        width = _width(teacher[0], rate)
        self.paraphraser = FactorEncoder(teacher[0], width, norm=norm).requires_grad_(False)
        self.translator = FactorEncoder(student[0], width, norm=norm)

    def train(self, mode: bool = True) -> "Factor":
        super().train(mode)
        self.paraphraser.eval()
        return self

    def take_over(self, earlier: Mapping[str, Mapping[str, Tensor]]) -> None:
        if PARAPHRASER not in earlier:
            raise ValueError(
                "The term 'factor' needs a trained paraphraser: put a stage with the term "
                "'paraphraser' before it in MODEL.SSSD.CLASSIFIER.STAGES."
            )
        encoder = {
            name.removeprefix("encoder."): value
            for name, value in earlier[PARAPHRASER].items()
            if name.startswith("encoder.")
        }
        try:
            self.paraphraser.load_state_dict(encoder)
        except RuntimeError as error:
            raise ValueError(
                "The paraphraser of the stage before does not fit the term 'factor': give both the "
                "same teacher_layer, rate and norm."
            ) from error

    def forward(self, batch: Batch) -> Tensor:
        factor = self.translator(batch.features[self.student_layer])
        target = self.paraphraser(batch.teacher_features[self.teacher_layer])
        return factor_loss(factor, target, p=self.p)
