"""From a training checkpoint of a classifier to what timm or torchvision loads alone."""

import json
import os
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ..classification.networks import load_network_weights
from ..data import DatasetError
from ..data.classification_mapper import build_transform
from .files import write_whole
from .trained_network import network_of

__all__ = ["export_classifier"]

_TORCHVISION = "torchvision/"
_REGISTERS_CIFAR = "import sssd.classification.cifar"


def export_classifier(checkpoint: str, cfg: CfgNode, output: str, entry: str = "model") -> str:
    """Writes the student of a classification training, for use without sssd.

    The folder then holds ``model.pth``, a bare state dict, and ``config.json``, which says what
    network it belongs to, how images are prepared for it, and in "usage" the Python that loads it.

    Args:
        checkpoint: a file written by training, or a bare state dict.
        cfg: the config of that training.
        output: folder, made if missing.
        entry: of the checkpoint, with the weights.

    Returns:
        Path of config.json.

    Raises:
        ValueError: the checkpoint does not exist, is damaged or does not fit the config.
        OSError: ``output`` cannot be written.
    """
    network = network_of(cfg)
    load_network_weights(network, checkpoint, cfg.MODEL.SSSD.CLASSIFIER.NETWORK, entry)
    os.makedirs(output, exist_ok=True)
    weights, path = (os.path.join(output, name) for name in ("model.pth", "config.json"))
    write_whole(weights, lambda file: torch.save(network.state_dict(), file))
    text = json.dumps(_description(cfg), indent=2) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))
    return path


def _description(cfg: CfgNode) -> dict[str, Any]:
    """What config.json says."""
    keys = cfg.MODEL.SSSD.CLASSIFIER
    library, name = "timm", keys.NETWORK
    if name.startswith(_TORCHVISION):
        library, name = "torchvision", name.removeprefix(_TORCHVISION)
    resize, crop = build_transform(False, keys.SIZE, keys.AUGMENTATION).transforms
    mean, std = list(cfg.MODEL.PIXEL_MEAN), list(cfg.MODEL.PIXEL_STD)
    description = {
        "network": name,
        "library": library,
        "num_classes": keys.NUM_CLASSES,
        "in_chans": len(mean),
        "options": dict(keys.NETWORK_OPTIONS),
        "class_names": _class_names(cfg),
        "image_size": keys.SIZE,
        # The shorter side, bilinear with antialiasing, before the middle is cut out.
        "resize": resize.size[0],
        "center_crop": list(crop.size),
        "channels": "RGB" if len(mean) == 3 else "grey" if len(mean) == 1 else len(mean),
        "pixel_mean_of_0_to_255": mean,
        "pixel_std_of_0_to_255": std,
        "pixel_mean_of_0_to_1": [x / 255 for x in mean],
        "pixel_std_of_0_to_1": [x / 255 for x in std],
        "usage": _usage(cfg, library, name),
    }
    if name.startswith("cifar_"):
        description["registered_by"] = _REGISTERS_CIFAR
    return description


def _usage(cfg: CfgNode, library: str, name: str) -> str:
    """Python that, run in the folder, makes ``network`` the trained one."""
    keys = cfg.MODEL.SSSD.CLASSIFIER
    arguments: dict[str, Any] = {"num_classes": keys.NUM_CLASSES}
    if library == "timm":
        arguments["in_chans"] = len(cfg.MODEL.PIXEL_MEAN)
    arguments |= keys.NETWORK_OPTIONS
    listed = ", ".join([repr(name), *(f"{key}={value!r}" for key, value in arguments.items())])
    build = "timm.create_model" if library == "timm" else "torchvision.models.get_model"
    imports = f"{_REGISTERS_CIFAR}, " if name.startswith("cifar_") else "import "
    return (
        f"{imports}{library}, torch\n"
        f"network = {build}({listed})\n"
        'network.load_state_dict(torch.load("model.pth", weights_only=True))'
    )


def _class_names(cfg: CfgNode) -> list[str] | None:
    """Those of the data it was trained on; None where that is not registered or not here."""
    for name in cfg.DATASETS.TRAIN:
        try:
            classes = MetadataCatalog.get(name).get("classes") if name in MetadataCatalog else None
        except DatasetError:
            classes = None
        if classes is not None and len(classes) == cfg.MODEL.SSSD.CLASSIFIER.NUM_CLASSES:
            return list(classes)
    return None
