"""Image classification: networks by name, and what they compute inside."""

from .capture import Capture
from .networks import build_network, classifier_of

__all__ = ["Capture", "build_network", "classifier_of"]
