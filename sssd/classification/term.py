"""Terms: the weighted parts of which a distillation loss is made, by name.

A method of distillation is one term or a few. Each lives in a file of
:mod:`sssd.classification.terms`, and a config lists those that train together::

    TERMS:
      - {name: cross_entropy}
      - {name: kd, weight: 0.9, temperature: 4.0}
      - {name: attention, weight: 1000.0, layers: [layer1, layer2, layer3]}
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..losses import coefficient_schedule
from .batch import Batch
from .options import explained_options
from .surroundings import Surroundings

__all__ = [
    "TERMS",
    "Term",
    "Terms",
    "build_terms",
    "register_term",
    "term_class",
]

TERMS: dict[str, type["Term"]] = {}
"""The terms by the names that configs use; add to it with `register_term`."""

TermSpec = Mapping[str, Any]


class Term(nn.Module):
    """One part of the loss. Subclasses set what they need and compute their loss in `forward`.

    Parameters that a term has train with the student and are no part of it: they lie beside it in
    checkpoints.
    """

    needs_teacher = False  # a trained network to learn from
    runs_teacher = True  # False: not its predictions and layers, but a pass that the term makes
    needs_student = True  # False: the student does not run for it
    needs_pairs = False  # `Batch.pair`
    needs_peers = False  # `Batch.peers`
    needs_input_gradient = False  # the student's pass is differentiated twice, by the images too

    def __init__(
        self, *, student_layers: Sequence[str] = (), teacher_layers: Sequence[str] = ()
    ) -> None:
        """
        Args:
            student_layers, teacher_layers: names (:class:`Capture`) of what `forward` and `predict`
                read in ``batch.features`` and ``batch.teacher_features``.
        """
        super().__init__()
        self.student_layers = tuple(student_layers)
        self.teacher_layers = tuple(teacher_layers)

    def forward(self, batch: Batch) -> Tensor | dict[str, Tensor]:
        """The loss, a scalar without its weight, or several by name, whose sum is the loss."""
        raise NotImplementedError

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """Logits (B, K) of further classifiers that it trains, by name, for evaluation."""
        return {}

    def take_over(self, earlier: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Takes weights from the stage before, once, before training.

        Args:
            earlier: name of each term of that stage -> its state dict; empty for a first stage.
        """


class Terms(nn.ModuleDict):
    """Terms that train together, and the weights of each."""

    def __init__(
        self, terms: Mapping[str, Term], weights: Mapping[str, Callable[[int], float]]
    ) -> None:
        """
        Args:
            terms: name -> term.
            weights: name -> iteration -> weight.
        """
        super().__init__(terms)
        self.weights = dict(weights)

    def needs(self, what: str) -> bool:
        """Whether any term has ``needs_<what>``."""
        return any(getattr(term, f"needs_{what}") for term in self.values())

    @property
    def runs_teacher(self) -> bool:
        """Whether any term reads the teacher's predictions or layers."""
        return any(term.needs_teacher and term.runs_teacher for term in self.values())

    def layers(self, of: str) -> list[str]:
        """Names of the layers of the "student" or the "teacher" that the terms read."""
        return [name for term in self.values() for name in getattr(term, f"{of}_layers")]

    def forward(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        """Weighted losses: ``loss_<term>``, or ``loss_<term>_<part>`` for a term of several."""
        losses = {}
        for name, term in self.items():
            weight, value = self.weights[name](iteration), term(batch)
            parts = value if isinstance(value, dict) else {"": value}
            for part, loss in parts.items():
                losses[f"loss_{name}_{part}".rstrip("_")] = weight * loss
        return losses

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """Logits of all further classifiers, by name."""
        return {key: x for term in self.values() for key, x in term.predict(batch).items()}


def register_term(name: str) -> Callable[[type[Term]], type[Term]]:
    """A decorator that gives a class derived from `Term` the name by which configs ask for it.

    The class is built with a `Surroundings` and the options of the config as keywords.

    Raises:
        ValueError: the name is taken.
    """

    def register(cls: type[Term]) -> type[Term]:
        if name in TERMS:
            raise ValueError(
                f"The name {name!r} of a term is taken by {TERMS[name].__qualname__}: choose "
                "another."
            )
        TERMS[name] = cls
        return cls

    return register


def term_class(spec: TermSpec) -> type[Term]:
    """The class of a term of the config.

    Raises:
        ValueError: when it has no name, or nothing is registered under it.
    """
    from . import terms  # noqa: F401  (registers them)

    name = spec.get("name") if isinstance(spec, Mapping) else None
    if not isinstance(name, str) or name not in TERMS:
        raise ValueError(
            f"MODEL.SSSD.CLASSIFIER has the term {spec!r}: give it a name that is registered, as "
            f"in {{name: kd, weight: 0.9}}; there are {', '.join(sorted(TERMS))}."
        )
    return TERMS[name]


def build_terms(specs: Sequence[TermSpec], surroundings: Surroundings, max_iter: int) -> Terms:
    """Builds the terms of a config.

    Args:
        specs: a dict for each: ``name``; ``weight``, a number (default 1) or a schedule by the
            iteration, such as ``{name: linear, values: [4.0, 1.0]}``
            (:func:`sssd.losses.coefficient_schedule`); and the options of that term.
        surroundings: networks and shapes.
        max_iter: iterations of the training.

    Returns:
        The terms; of several with one name, the second is called ``<name>2``.

    Raises:
        ValueError: for an unknown term or option, or a term that does not fit the networks.
    """
    if not specs:
        raise ValueError(
            "MODEL.SSSD.CLASSIFIER has no terms, so there is nothing to learn: list some, for "
            "instance TERMS: [{name: cross_entropy}]."
        )
    terms, weights = {}, {}
    for spec in specs:
        cls = term_class(spec)
        options = dict(spec)
        name, weight = options.pop("name"), options.pop("weight", 1.0)
        _check_options(name, cls, options)
        if cls.needs_teacher and surroundings.teacher is None:
            raise ValueError(
                f"The term {name!r} needs a teacher: name its network in "
                "MODEL.SSSD.CLASSIFIER.TEACHER.NETWORK (and its checkpoint in TEACHER.WEIGHTS, or "
                "it is trained first)."
            )
        if cls.needs_peers and not surroundings.num_peers:
            raise ValueError(
                f"The term {name!r} needs networks that learn beside the student: list their "
                "names in MODEL.SSSD.CLASSIFIER.PEERS."
            )
        key, count = name, 1
        while key in terms:
            count += 1
            key = f"{name}{count}"
        fix = "correct the types of its options"
        with explained_options(f"The term {name!r}", options, fix):
            terms[key] = cls(surroundings, **options)
        weights[key] = _weight(name, weight, max_iter)
    return Terms(terms, weights)


def _check_options(name: str, cls: type[Term], options: Mapping[str, Any]) -> None:
    """Says which options a term has, where a TypeError would name a Python function."""
    known = list(inspect.signature(cls.__init__).parameters)[2:]
    unknown = [option for option in options if option not in known]
    if unknown:
        has = ", ".join(["weight", *known])
        raise ValueError(f"The term {name!r} has no option {unknown[0]!r}: it has {has}.")
    required = [
        option
        for option, parameter in list(inspect.signature(cls.__init__).parameters.items())[2:]
        if parameter.default is parameter.empty and option not in options
    ]
    if required:
        raise ValueError(f"The term {name!r} lacks its option {required[0]!r}.")


def _weight(name: str, weight: Any, max_iter: int) -> Callable[[int], float]:
    try:
        if isinstance(weight, Mapping):
            return coefficient_schedule(**{"max_iter": max_iter, **weight})
        return coefficient_schedule("constant", values=[float(weight)])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The weight of the term {name!r} is {weight!r}: give a number, or a schedule such as "
            f"{{name: linear, values: [4.0, 1.0]}} ({error})."
        ) from error
