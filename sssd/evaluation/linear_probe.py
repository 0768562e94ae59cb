"""How well the features of a classifier transfer: a linear classifier on another dataset."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from ..data.classification_sources import hold_out
from .embeddings import Embeddings

__all__ = ["Probe", "linear_probe"]

STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
VAL_FRACTION = 0.2
_MAX_ITER = 5000


@dataclass(frozen=True)
class Probe:
    """What a linear probe found.

    Attributes:
        accuracy: in percent, on the test part.
        strength: the C that was chosen: the inverse of the regularisation.
        val_accuracy: in percent, on the part of the training data by which it was chosen.
    """

    accuracy: float
    strength: float
    val_accuracy: float


def linear_probe(
    train: Embeddings, test: Embeddings, strengths: Sequence[float] = STRENGTHS
) -> Probe:
    """Fits logistic regression on frozen embeddings, and tests it.

    The embeddings are standardised by the data that is fitted. C is chosen on a fifth of each class
    of the training part (the smallest of equally good ones), then all of it is fitted. The test
    part decides nothing.

    Args:
        train, test: embeddings by one network of the two parts of the target dataset.
        strengths: values of C to choose from.

    Raises:
        ValueError: the parts have different classes or widths, or there is a single class.
    """
    if train.classes != test.classes or train.features.shape[1] != test.features.shape[1]:
        raise ValueError(
            f"The training part has {len(train.classes)} classes and embeddings of "
            f"{train.features.shape[1]} numbers, the test part {len(test.classes)} and "
            f"{test.features.shape[1]}: give two parts of one dataset by one network."
        )
    if len(np.unique(train.labels)) < 2:
        raise ValueError(
            f"All {len(train.labels)} images to learn from have one label: give two classes or "
            "more."
        )
    fit, val = hold_out(train.labels, VAL_FRACTION)

    def val_accuracy(strength: float) -> float:
        probe = _fitted(train.features[fit], train.labels[fit], strength)
        return 100.0 * probe.score(train.features[val], train.labels[val])

    accuracies = {strength: val_accuracy(strength) for strength in sorted(strengths)}
    chosen = max(accuracies, key=accuracies.__getitem__)  # the first of equal ones
    probe = _fitted(train.features, train.labels, chosen)
    accuracy = 100.0 * probe.score(test.features, test.labels)
    return Probe(accuracy, chosen, accuracies[chosen])


def _fitted(features: np.ndarray, labels: np.ndarray, strength: float) -> Pipeline:
    # float64: the solver's stopping rule is finer than float32's digits.
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=_MAX_ITER))
    return probe.fit(features.astype(np.float64), labels)
