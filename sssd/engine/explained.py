"""Errors of other code, where a config is what they are about, as sentences."""

import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from detectron2.utils import comm

from ..data.errors import in_words
from .checkpoint import CheckpointError
from .config_file import ConfigError

__all__ = ["explained"]

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Part of a path -> the keys that the code there reads; of the innermost call that has any.
_KEYS = {
    r"/sssd/losses/": "MODEL.SSSD.DISTANCE and MODEL.SSSD.COEFFICIENT",
    r"/sssd/teacher/": "MODEL.SSSD.TEACHER",
    r"/fcos\.py": "MODEL.SSSD.FCOS",
    r"/(retinanet|dense_detector)\.py": "MODEL.RETINANET",
    r"/anchor_generator\.py": "MODEL.ANCHOR_GENERATOR",
    r"/(rpn|proposal_utils)\.py": "MODEL.RPN",
    r"/(box_head|fast_rcnn|cascade_rcnn)\.py": "MODEL.ROI_BOX_HEAD",
    r"/mask_head\.py": "MODEL.ROI_MASK_HEAD",
    r"/keypoint_head\.py": "MODEL.ROI_KEYPOINT_HEAD",
    r"/semantic_seg\.py": "MODEL.SEM_SEG_HEAD",
    r"/roi_heads/": "MODEL.ROI_HEADS",
    r"/fpn\.py": "MODEL.FPN",
    r"/resnet\.py": "MODEL.RESNETS",
    r"/solver/": "SOLVER",
    r"/(transforms|detection_utils|dataset_mapper)\b": "INPUT",
    r"/detectron2/data/": "DATALOADER and DATASETS",
    r"/meta_arch/": "MODEL",
}

# torch's, on a GPU and on the CPU.
_NO_MEMORY = re.compile("out of memory|not enough memory|can't allocate memory", re.IGNORECASE)


@contextmanager
def explained(what: str, folder: str) -> Iterator[None]:
    """Turns what Detectron2 and torch raise inside into a sentence; ours pass as they are.

    Args:
        what: has failed, the beginning of a sentence.
        folder: that the traceback is written to, as ``traceback.txt``.

    Raises:
        ConfigError: says where in the code the error came from, and which part of the config is
            read there.
    """
    try:
        yield
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        if _is_said(error, frames):
            raise
        path = os.path.join(folder, "traceback.txt")
        if comm.is_main_process():
            with suppress(OSError), open(path, "w") as file:
                traceback.print_exception(error, file=file)
        raise ConfigError(
            f"{what} ({in_words(error)}): {_advice(error, frames)}; {path} has the traceback."
        ) from error


def _is_said(error: Exception, frames: traceback.StackSummary) -> bool:
    """Whether the error is a sentence for people already."""
    ours = isinstance(error, ValueError) and frames[-1].filename.startswith(_PACKAGE)
    return ours or isinstance(error, CheckpointError | FloatingPointError | OSError)


def _advice(error: Exception, frames: traceback.StackSummary) -> str:
    if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
        return "set MODEL.SSSD.SOLVER.BATCH_PARTS, or lower SOLVER.IMS_PER_BATCH or sizes in INPUT"
    for frame in reversed(frames):
        for pattern, keys in _KEYS.items():
            if re.search(pattern, frame.filename):
                return f"check {keys} in the config"
    return "compare the config with one that runs"
