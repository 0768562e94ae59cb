"""Meta-architectures; importing this registers them with Detectron2."""

from .. import _detectron2  # noqa: F401

# isort: split
from . import fcos  # noqa: F401  (registers Detectron2FCOS)
from .classifier import ClassificationDistiller
from .phases import Phases
from .self_distiller import SelfDistiller
from .teachers import TEACHER_REGISTRY
from .wrap import distill

__all__ = ["TEACHER_REGISTRY", "ClassificationDistiller", "Phases", "SelfDistiller", "distill"]
