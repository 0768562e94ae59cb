"""The classification datasets sssd adds to Detectron2's catalog, and the registration of others.

Importing this module registers ``digits``, ``cifar10_small``, ``cifar10`` and ``cifar100``, each as
``_train``, ``_val``, ``_trainval`` and ``_test``, and ``imagenet_train`` and ``imagenet_val``.
Nothing is read before a dataset, or the ``classes`` of its metadata, is asked for.
``DETECTRON2_DATASETS`` is read then as well, so setting it after the import is not too late.

A dataset is a list of dicts: ``image``, a uint8 array (H, W, C) with 1 or 3 channels (RGB), or
``file_name``; ``label``, an int from 0; and ``image_id``, an int, the position of the image in the
part of the source that it is from.
"""

import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata

from .classification_sources import (
    DatasetError,
    LabelledImages,
    Reader,
    read_cifar10,
    read_cifar100,
    read_digits,
    read_image_folder,
    read_npz,
    read_split,
)

SPLITS = ("train", "val", "trainval", "test")
VAL_FRACTION = 0.1  # of the training part of a source with a test part
_DIGITS_VAL_FRACTION = 0.25  # of the 80 % that are not its test split: 60, 20 and 20 %

logger = logging.getLogger(__name__)


class LateClasses(Metadata):
    """Metadata with a field ``classes``, a list of names that is filled when the data is read.

    Asking for it before reads the dataset.
    """

    def __getattr__(self, key: str) -> Any:
        if key == "classes":
            DatasetCatalog.get(self.name)
            return vars(MetadataCatalog.get(self.name))["classes"]
        return super().__getattr__(key)


def _load(name: str, read: Callable[[], LabelledImages]) -> list[dict[str, Any]]:
    """The dataset as a list of dicts; also fills in the classes of its metadata."""
    labelled = read()
    # not by setattr, which compares with the value before, and so would read the dataset for it
    vars(MetadataCatalog.get(name))["classes"] = list(labelled.classes)
    key = "file_name" if isinstance(labelled.images[0], str) else "image"
    return [
        {key: image, "label": label, "image_id": image_id}
        for image, label, image_id in zip(
            labelled.images, labelled.labels.tolist(), labelled.ids.tolist(), strict=True
        )
    ]


def _under_root(read: Callable[..., LabelledImages], relative: str, *args: str) -> LabelledImages:
    """Reads what lies under ``DETECTRON2_DATASETS``, or says where it should."""
    value = os.environ.get("DETECTRON2_DATASETS")
    path = os.path.join("datasets" if value is None else value, *relative.split("/"))
    if not os.path.exists(path):
        now = "is not set, so ./datasets is searched" if value is None else f"is {value!r}"
        raise DatasetError(
            f"The data was looked for at {path} and is not there: put it there, or start with the "
            f"environment variable DETECTRON2_DATASETS (it {now}) set to the folder that holds the "
            "datasets."
        )
    return read(path, *args)


def _splits(
    prefix: str, read: Reader, val_fraction: float = VAL_FRACTION
) -> dict[str, Callable[[], LabelledImages]]:
    """Name -> what reads it, for the four splits of a source."""
    return {f"{prefix}_{split}": partial(read_split, read, split, val_fraction) for split in SPLITS}


_OWN = {
    **_splits("digits", read_digits, _DIGITS_VAL_FRACTION),
    **_splits("cifar10_small", partial(_under_root, read_npz, "cifar10_small/cifar10_small.npz")),
    **_splits("cifar10", partial(_under_root, read_cifar10, "cifar-10-batches-py")),
    **_splits("cifar100", partial(_under_root, read_cifar100, "cifar-100-python")),
    "imagenet_train": partial(_under_root, read_image_folder, "imagenet/train"),
    "imagenet_val": partial(_under_root, read_image_folder, "imagenet/val"),
}


def _register(name: str, read: Callable[[], LabelledImages]) -> None:
    known = MetadataCatalog.pop(name).as_dict() if name in MetadataCatalog else {}
    fields = {**known, "name": name, "evaluator_type": "classification"}
    MetadataCatalog[name] = LateClasses(**fields)
    DatasetCatalog.register(name, partial(_load, name, read))


def _check_free(*names: str) -> None:
    for name in names:
        if name in DatasetCatalog:
            raise DatasetError(
                f"The dataset name {name!r} is already registered: choose another one, or remove "
                "it first with DatasetCatalog.remove."
            )


def register_npz(prefix: str, path: str) -> None:
    """Registers ``<prefix>_train``, ``_val``, ``_trainval`` and ``_test`` of an ``.npz`` file.

    "val" is a tenth of each class of the file's training part, always the same, "train" the rest,
    "trainval" the whole part, and "test" the file's test part. The file is read on use.

    Args:
        prefix: what the four names start with.
        path: a file with ``train_x`` and ``test_x`` (N, H, W, C) uint8, of 1 or 3 channels;
            ``train_y`` and ``test_y`` (N,) whole numbers from 0 to K - 1; and ``class_names`` (K,)
            text.

    Raises:
        DatasetError: one of the names is taken.
    """
    splits = _splits(prefix, partial(read_npz, path))
    _check_free(*splits)
    for name, read in splits.items():
        _register(name, read)


def register_image_folder(name: str, root: str) -> None:
    """Registers a folder that has one folder of images for each class, in ``ImageFolder``'s manner.

    The classes are the names of the folders in sorted order. The folder is searched on use; an
    image is read, as RGB, when the mapper comes to it.

    Args:
        name: of the dataset.
        root: path of the folder.

    Raises:
        DatasetError: the name is taken.
    """
    _check_free(name)
    _register(name, partial(read_image_folder, root))


def _is_ours(name: str) -> bool:
    """Whether a registered name was registered here, by this import of the module or another."""
    return getattr(getattr(DatasetCatalog[name], "func", None), "__module__", None) == __name__


def register_classification_datasets() -> None:
    """Registers our datasets; names that are taken are left as they are.

    A name that somebody else has registered is reported in the log, since it then means their data.
    """
    for name, read in _OWN.items():
        if name not in DatasetCatalog:
            _register(name, read)
        elif not _is_ours(name):
            logger.warning(
                "The dataset name %r was already registered by other code, so it keeps meaning "
                "that data and sssd's own %s is not available.",
                name,
                name,
            )


register_classification_datasets()
