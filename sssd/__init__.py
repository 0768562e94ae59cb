"""sssd: self-distillation for Detectron2's object detectors (arXiv 2303.05015), and distillation of
image classifiers on the same losses and trainer.

``import sssd`` registers the meta-architectures "SelfDistiller" and "ClassificationDistiller" and
the datasets. Without Detectron2, ``sssd.losses``, ``sssd.teacher`` and ``sssd.classification``
still work.
"""

from importlib.util import find_spec

import sssd_compat

__version__ = "0.1.0"

# What needs Detectron2.
__all__ = [
    "ClassificationDistiller",
    "Phases",
    "SelfDistiller",
    "TEACHER_REGISTRY",
    "add_sssd_config",
    "distill",
]

if find_spec("detectron2") is not None:
    sssd_compat.apply()  # before anything of Detectron2's layers or data is imported
    from . import data  # noqa: F401  (registers the datasets)
    from .config import add_sssd_config
    from .meta_arch import (
        TEACHER_REGISTRY,
        ClassificationDistiller,
        Phases,
        SelfDistiller,
        distill,
    )
else:

    def __getattr__(name: str):
        if name in __all__:
            sssd_compat.require_detectron2()
        raise AttributeError(f"module 'sssd' has no attribute {name!r}")
