"""Meta-architectures; importing this registers them with Detectron2."""

from .. import _detectron2  # noqa: F401

# isort: split
from .phases import Phases
from .self_distiller import SelfDistiller

__all__ = ["Phases", "SelfDistiller"]
