"""Be your own teacher (BYOT; Zhang et al., arXiv 1905.08094): the deepest head teaches all."""

from collections.abc import Sequence

from torch import Tensor, nn

from ...losses import mean_ensemble, own_teacher_loss, self_feature_loss
from ..batch import Batch
from ..layers import check_layers
from ..modules import SectionHead
from ..surroundings import Surroundings
from ..term import Term, register_term


@register_term("own_teacher")
class OwnTeacher(Term):
    """A head after each of some sections; holds all cross-entropies: list no other.

    The heads are named ``head1``, ... from shallow to deep, the last of which is the student, and
    the mean of all their probabilities is ``ensemble``.
    """

    def __init__(
        self,
        surroundings: Surroundings,
        layers: Sequence[str],
        deepest: str,
        alpha: float = 0.3,
        temperature: float = 3.0,
        t_square: bool = True,
        soft: str = "kl",
        deepest_weight: float = 1.0,
        feature_weight: float = 0.03,
        feature_reduction: str = "norm",
    ) -> None:
        """
        Args:
            layers: outputs of the sections that get a head, from shallow to deep.
            deepest: output of the last section, whose shape the bottlenecks take on.
            alpha, temperature, t_square, soft, deepest_weight: see
                :func:`sssd.losses.own_teacher_loss`, which says what the codes have.
            feature_weight, feature_reduction: of the distance of each section's pooled feature
                from the deepest one (:func:`sssd.losses.self_feature_loss`); 0.03 goes with "norm",
                1e-6 with "sum". The paper gives neither.
        """
        check_layers("'own_teacher'", layers)
        super().__init__(student_layers=[*layers, deepest])
        self.layers, self.deepest = tuple(layers), deepest
        self.options = {
            "alpha": alpha,
            "temperature": temperature,
            "t_square": t_square,
            "soft": soft,
            "deepest_weight": deepest_weight,
        }
        self.feature_weight, self.feature_reduction = feature_weight, feature_reduction
        shape = surroundings.student_shape(deepest)
        self.heads = nn.ModuleList(
            SectionHead(surroundings.student_shape(layer), shape, surroundings.num_classes, layer)
            for layer in layers
        )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        results = [
            head(batch.features[layer]) for head, layer in zip(self.heads, self.layers, strict=True)
        ]
        logits = [x for x, _ in results] + [batch.logits]
        deepest = batch.features[self.deepest].mean((2, 3))
        distances = [
            self_feature_loss(feature, deepest, reduction=self.feature_reduction)
            for _, feature in results
        ]
        return {
            **own_teacher_loss(logits, batch.labels, **self.options),
            "feature": self.feature_weight * sum(distances),
        }

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        logits = [
            head(batch.features[layer])[0]
            for head, layer in zip(self.heads, self.layers, strict=True)
        ]
        heads = {f"head{i + 1}": x for i, x in enumerate(logits)}
        return {**heads, "ensemble": mean_ensemble([*logits, batch.logits])}
