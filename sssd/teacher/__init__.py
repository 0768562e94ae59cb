"""The training-only branch of the detectors: labels and maps in, a pyramid out. Torch only."""

from .objects import ObjectBatch, image_cells, object_cells, pad_objects
from .teacher import LabelEncodingTeacher

__all__ = ["LabelEncodingTeacher", "ObjectBatch", "image_cells", "object_cells", "pad_objects"]
