"""What a term of the loss sees of one training step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

__all__ = ["Batch"]


@dataclass
class Batch:
    """One batch, and what the networks made of it.

    B: images, C: channels, K: classes. "Student" is the network that learns in this step: with
    mutual learning each of the networks in turn.

    Attributes:
        images: (B, C, H, W), normalised.
        labels: (B,) int64; empty in evaluation.
        student: the network that learns.
        logits: its predictions (B, K), with their graph.
        features: its layers by name, those that the terms asked for, with their graph.
        teacher: the frozen network, where there is one.
        teacher_logits, teacher_features: of the teacher, without a graph.
        peers: predictions (B, K) of the networks that learn beside this one, without a graph.
        pair: (B, C, H, W), another image of each image's class, where a term asked for it.
        progress: of the training, from 0 to 1.
    """

    images: Tensor
    labels: Tensor
    student: nn.Module
    logits: Tensor | None = None
    features: Mapping[str, Tensor] = field(default_factory=dict)
    teacher: nn.Module | None = None
    teacher_logits: Tensor | None = None
    teacher_features: Mapping[str, Tensor] = field(default_factory=dict)
    peers: Sequence[Tensor] = ()
    pair: Tensor | None = None
    progress: float = 0.0
