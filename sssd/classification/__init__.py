"""Image classification: networks by name, what they compute inside, and the terms of their loss."""

from .batch import Batch
from .capture import Capture
from .networks import build_network, classifier_of, load_network_weights
from .surroundings import Surroundings
from .term import TERMS, Term, Terms, build_terms, register_term

__all__ = [
    "Batch",
    "Capture",
    "Surroundings",
    "TERMS",
    "Term",
    "Terms",
    "build_network",
    "build_terms",
    "classifier_of",
    "load_network_weights",
    "register_term",
]
