"""Datasets: the demo set, registration, checks, and the mapper.

Importing this package registers the datasets with Detectron2.
"""

from .. import _detectron2  # noqa: F401

# isort: split
from . import classification  # noqa: F401  (registers its datasets)
from .annotations import AnnotationError, AnnotationReport, check_annotation_file, check_dataset
from .classification import register_image_folder, register_npz
from .classification_check import ClassificationReport, check_classification_dataset
from .classification_sources import DatasetError
from .datasets import dataset_files, is_coco_style, register_coco_datasets, register_datasets
from .demo import make_demo_dataset
from .errors import DataError
from .mapper import CheckedDatasetMapper, ImageError
from .train_loader import build_resumable_train_loader, train_loader_from_config

__all__ = [
    "AnnotationError",
    "AnnotationReport",
    "CheckedDatasetMapper",
    "ClassificationReport",
    "DataError",
    "DatasetError",
    "ImageError",
    "build_resumable_train_loader",
    "check_annotation_file",
    "check_classification_dataset",
    "check_dataset",
    "dataset_files",
    "is_coco_style",
    "make_demo_dataset",
    "register_coco_datasets",
    "register_datasets",
    "register_image_folder",
    "register_npz",
    "train_loader_from_config",
]
