"""Terms that compare layers of the student with layers of the teacher, pair by pair."""

from collections.abc import Sequence

from torch import Tensor

from .batch import Batch
from .surroundings import Surroundings
from .term import Term

__all__ = ["LayerPairs", "PairedTerm", "check_layers"]

# A name means that layer of both networks; two names that of the student and that of the teacher.
LayerPairs = Sequence[str | Sequence[str]]


class PairedTerm(Term):
    """A term with the option ``layers``; subclasses define `compare`, or `loss` over all pairs."""

    needs_teacher = True

    def __init__(self, surroundings: Surroundings, layers: LayerPairs) -> None:
        """
        Args:
            layers: from shallow to deep; a name for both networks, or [student's, teacher's].

        Raises:
            ValueError: no layers, an entry of another kind, or a layer that a network lacks.
        """
        check_layers(type(self).__name__, layers)
        pairs = [_pair(entry) for entry in layers]
        super().__init__(student_layers=[s for s, _ in pairs], teacher_layers=[t for _, t in pairs])
        self.pairs = pairs
        for student, teacher in self.pairs:
            surroundings.student_shape(student)
            surroundings.teacher_shape(teacher)

    def forward(self, batch: Batch) -> Tensor:
        return self.loss(
            [batch.features[name] for name in self.student_layers],
            [batch.teacher_features[name] for name in self.teacher_layers],
        )

    def loss(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """The loss of the tensors of all pairs: the sum of `compare`, if nothing else."""
        return sum(self.compare(s, t) for s, t in zip(student, teacher, strict=True))

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of one pair."""
        raise NotImplementedError


def check_layers(term: str, layers: object) -> None:
    """Raises ValueError for layers that are no list, or an empty one.

    Args:
        term: its name, for the error.
        layers: of the config.
    """
    if not _is_list(layers):
        raise ValueError(
            f"The layers of the term {term} are {layers!r}: give a list, such as [layer1, layer2]."
        )
    if not layers:
        raise ValueError(f"The term {term} has no layers: name one or more.")


def _pair(entry: str | Sequence[str]) -> tuple[str, str]:
    names = list(entry) if _is_list(entry) else [entry, entry]
    if len(names) != 2 or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"The layers of a term hold {entry!r}: give a name that both networks have, or two, "
            "the student's and the teacher's."
        )
    return names[0], names[1]


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
