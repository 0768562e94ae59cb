"""The datasets sssd adds to Detectron2's catalog, and where the files of a dataset are.

Importing this module registers ``bccd_{train,val,test}``, found under ``DETECTRON2_DATASETS``, and
``sssd_demo_{train,val}``, made on first use under ``SSSD_DEMO_ROOT``. Both variables are read when
a dataset is used, so setting them after the import is not too late.
"""

import logging
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.utils.file_io import PathManager

from .demo import FOLDER, SPLITS, make_demo_dataset
from .demo_pictures import CLASS_NAMES

# name -> split
_BCCD = {f"bccd_{split}": split for split in ("train", "val", "test")}
_DEMO = {f"sssd_demo_{split}": split for split in SPLITS}

logger = logging.getLogger(__name__)


def _own_files(name: str) -> tuple[str, str]:
    """Where the annotation file and the image folder of one of our datasets belong, right now."""
    if name in _DEMO:
        folder, split = os.path.join(_demo_root(), FOLDER), _DEMO[name]
    else:
        folder = os.path.join(os.environ.get("DETECTRON2_DATASETS", "datasets"), "bccd")
        split = _BCCD[name]
    return (
        os.path.join(folder, "annotations", f"instances_{split}.json"),
        os.path.join(folder, "images"),
    )


def _demo_root() -> str:
    return os.environ.get("SSSD_DEMO_ROOT", os.path.join("output", "datasets"))


class LateMetadata(Metadata):
    """Metadata whose paths are worked out when they are read, not when they are registered.

    ``COCOEvaluator`` may read ``json_file`` before anything has loaded the dataset, so for the demo
    set reading it makes the files.
    """

    @property
    def json_file(self) -> str:
        """The annotation file; of the demo set it exists after this."""
        if self.name in _DEMO:
            make_demo_dataset(_demo_root())
        return _own_files(self.name)[0]

    @property
    def image_root(self) -> str:
        """The image folder."""
        return _own_files(self.name)[1]

    def as_dict(self) -> dict[str, Any]:
        """All metadata as a dict, the paths included."""
        json_file, image_root = _own_files(self.name)
        return {**super().as_dict(), "json_file": json_file, "image_root": image_root}


def is_coco_style(name: str) -> bool:
    """Whether the name is registered and has its annotations in a COCO file."""
    if name not in DatasetCatalog or name not in MetadataCatalog:
        return False
    if _is_ours(name):  # reading its json_file would make the demo set
        return True
    metadata = MetadataCatalog.get(name)
    return (
        metadata.get("evaluator_type") != "lvis"  # its files lack what COCO's have
        and None not in (metadata.get("json_file"), metadata.get("image_root"))
    )


def dataset_files(name: str) -> tuple[str, str]:
    """The annotation file and the image folder of a registered dataset in COCO format.

    The demo set is made if it is not there yet. The paths of Detectron2's own datasets were fixed
    when ``detectron2.data`` was imported.

    Args:
        name: a name in Detectron2's ``DatasetCatalog``.

    Returns:
        The paths of the annotation file and of the image folder; both exist.

    Raises:
        ValueError: the name is not registered, or its annotations are not in a COCO file.
        FileNotFoundError: the file or the folder does not exist.
    """
    if name not in DatasetCatalog:
        raise ValueError(
            f"The dataset {name!r} is not registered: correct DATASETS.TRAIN and DATASETS.TEST, or "
            "register it first, for instance with detectron2's register_coco_instances."
        )
    if not is_coco_style(name):
        raise ValueError(
            f"The dataset {name!r} was registered without a COCO annotation file (json_file in its "
            "metadata): register it with detectron2's register_coco_instances."
        )
    metadata = MetadataCatalog.get(name)
    json_file, image_root = metadata.json_file, metadata.image_root
    for what, path, exists in (
        ("annotation file", json_file, PathManager.isfile),
        ("image folder", image_root, PathManager.isdir),
    ):
        if not exists(path or "."):  # an empty image root: file names relative to here, or full
            value = os.environ.get("DETECTRON2_DATASETS")
            now = "is not set, so ./datasets is searched" if value is None else f"is {value!r}"
            raise FileNotFoundError(
                f"The {what} of the dataset {name!r} was looked for at {path} and is not there: "
                "put it there, or start with the environment variable DETECTRON2_DATASETS (it "
                f"{now}) set to the folder that holds the datasets."
            )
    return json_file, image_root


def _load(name: str) -> list[dict[str, Any]]:
    """The dataset in Detectron2's format; also fills in the classes of its metadata."""
    json_file, image_root = dataset_files(name)
    return load_coco_json(json_file, image_root, name)


def _is_ours(name: str) -> bool:
    """Whether a registered name was registered here, by this import of the module or another."""
    return getattr(getattr(DatasetCatalog[name], "func", None), "__module__", None) == __name__


def register_coco_datasets(entries: Sequence[Sequence[str]]) -> None:
    """Registers datasets in COCO format, as MODEL.SSSD.COCO_DATASETS has them.

    What is registered already with the same files stays; files are looked for when they are used.

    Args:
        entries: name, annotation file and image folder of each.

    Raises:
        ValueError: an entry is not that, or its name means other data.
    """
    for entry in entries:
        texts = isinstance(entry, list | tuple) and all(isinstance(text, str) for text in entry)
        if not texts or len(entry) != 3 or not all(entry[:2]):
            raise ValueError(
                f"it has the entry {entry!r}, and each has to be a name, an annotation file and an "
                "image folder"
            )
        name, *files = entry
        if name not in DatasetCatalog:
            register_coco_instances(name, {}, *files)
            continue
        metadata = None if _is_ours(name) else MetadataCatalog.get(name)
        if metadata is None or files != [metadata.get("json_file"), metadata.get("image_root")]:
            raise ValueError(
                f"the name {name!r} is registered already and means other data: choose another"
            )


def register_datasets() -> None:
    """Registers our datasets; names that are taken are left as they are.

    A name that somebody else has registered is reported in the log, since it then means their data.
    """
    for name in (*_BCCD, *_DEMO):
        if name in DatasetCatalog:
            if not _is_ours(name):
                logger.warning(
                    "The dataset name %r was already registered by other code, so it keeps "
                    "meaning that data and sssd's own %s is not available.",
                    name,
                    name,
                )
            continue
        known = MetadataCatalog.pop(name).as_dict() if name in MetadataCatalog else {}
        classes = {"thing_classes": list(CLASS_NAMES)} if name in _DEMO else {}
        MetadataCatalog[name] = LateMetadata(
            **{**known, "name": name, "evaluator_type": "coco", **classes}
        )
        DatasetCatalog.register(name, partial(_load, name))


register_datasets()
