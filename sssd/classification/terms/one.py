"""On-the-fly native ensemble (ONE; Lan et al., arXiv 1806.04606)."""

import torch
from torch import Tensor, nn

from ...losses import gated_ensemble, gaussian_rampup, one_loss
from ..batch import Batch
from ..branches import NetworkTail
from ..surroundings import Surroundings
from ..term import Term, register_term


class Gate(nn.Sequential):
    """The trunk's map (B, C, H, W) to a weight for each branch, (B, M), that sum to 1.

    The ReLU before the softmax is the official code's: no branch can be gated away.
    """

    def __init__(self, channels: int, branches: int) -> None:
        super().__init__(
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, branches),
            nn.BatchNorm1d(branches),
            nn.ReLU(),
            nn.Softmax(dim=1),
        )


@register_term("one")
class NativeEnsemble(Term):
    """Branches from one trunk learn from the labels and from their gated ensemble.

    The student is the first branch. It holds the cross-entropies of all: list no other.
    """

    def __init__(
        self,
        surroundings: Surroundings,
        layer: str,
        branches: int = 3,
        temperature: float = 3.0,
        ramp_up: float = 0.25,
    ) -> None:
        """
        Args:
            layer: where the branches begin, such as "layer3": what comes before is shared.
            branches: how many there are, the student's own among them; at least 2.
            temperature: 3 in the official code.
            ramp_up: share of the training over which the distillation sets in (official code: 80
                of 300 epochs; not in the paper's equation); 0 for none.
        """
        super().__init__(student_layers=[f"{layer}:input"])
        if branches < 2:
            raise ValueError(f"The term 'one' has {branches} branch(es): give it 2 or more.")
        self.trunk, self.temperature, self.ramp_up = f"{layer}:input", temperature, ramp_up
        shape = surroundings.student_shape(self.trunk)
        if len(shape) != 3:
            raise ValueError(
                f"The term 'one' branches off before {layer!r}, whose input for an image has the "
                f"shape {shape}: it needs a map (channels, height, width)."
            )
        self.gate = Gate(shape[0], branches)
        self.branches = nn.ModuleList(
            NetworkTail(surroundings.new_network(), layer, surroundings.image_shape)
            for _ in range(branches - 1)
        )

    def _all(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (B, M, K) of all branches and the gates (B, M)."""
        trunk = batch.features[self.trunk]
        logits = [batch.logits, *(branch(trunk) for branch in self.branches)]
        return torch.stack(logits, 1), self.gate(trunk)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        logits, gates = self._all(batch)
        weight = gaussian_rampup(batch.progress / self.ramp_up) if self.ramp_up else 1.0
        return one_loss(
            logits, gates, batch.labels, temperature=self.temperature, distill_weight=weight
        )

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        logits, gates = self._all(batch)
        others = {f"branch{i + 1}": x for i, x in enumerate(logits.unbind(1)) if i}
        return {**others, "ensemble": gated_ensemble(logits, gates)}
