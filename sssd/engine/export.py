"""From a training checkpoint to what stock Detectron2, timm or torchvision loads."""

import os
import re

import torch
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.modeling import META_ARCH_REGISTRY
from omegaconf import DictConfig, OmegaConf
from torch import nn

from .averaging import AVERAGED
from .checkpoint import Checkpointer
from .config_file import default_config, load_config, load_lazy_config, read_keys
from .export_classifier import export_classifier
from .files import write_whole

__all__ = ["export_student", "stock_config"]


def stock_config(cfg: CfgNode) -> CfgNode:
    """The config of the student alone: stock meta-architecture, no key of sssd."""
    cfg = cfg.clone()
    cfg.defrost()
    if cfg.MODEL.META_ARCHITECTURE == "SelfDistiller":
        cfg.MODEL.META_ARCHITECTURE = cfg.MODEL.SSSD.STUDENT
    del cfg.MODEL["SSSD"]
    return cfg


def export_student(checkpoint: str, config_file: str, output: str, averaged: bool = False) -> str:
    """Writes the weights of the student and a config that it is built from without sssd.

    Of a detector the folder then holds ``model.pth`` and ``config.yaml``, or, for a student that
    comes from a LazyConfig or that stock yacs has no name for, ``lazy_config.yaml`` with the key
    ``model``. Of a classifier it holds ``model.pth``, a bare state dict for timm or torchvision,
    and ``config.json`` (:func:`sssd.engine.export_classifier.export_classifier`).

    Args:
        checkpoint: a file written by training, self-distilled or plain.
        config_file: the config of that training (its OUTPUT_DIR has it as config.yaml).
        output: folder, made if missing.
        averaged: the averaged weights (MODEL.SSSD.AVERAGING) instead of the last ones.

    Returns:
        Path of the config that was written.

    Raises:
        FileNotFoundError: when there is no config file.
        CheckpointError: when the checkpoint is damaged or does not fit the config.
        ValueError: the same of a classifier.
        OSError: ``output`` cannot be written.
    """
    if not os.path.isfile(config_file):
        raise FileNotFoundError(
            f"The config {config_file} does not exist; name the config of the training with "
            "--config-file."
        )
    entry = AVERAGED if averaged else "model"
    lazy = _is_lazy(config_file)
    cfg = load_lazy_config(config_file) if lazy else load_config(config_file)
    device = None if lazy else read_keys(config_file).get("MODEL", {}).get("DEVICE")
    if not lazy and cfg.MODEL.META_ARCHITECTURE == "ClassificationDistiller":
        return export_classifier(checkpoint, cfg, output, entry)
    config = _student_config(cfg)
    weights = os.path.join(output, "model.pth")
    if isinstance(config, DictConfig):
        model, path = instantiate(config), os.path.join(output, "lazy_config.yaml")
    else:
        model = META_ARCH_REGISTRY.get(config.MODEL.META_ARCHITECTURE)(config)
        path = os.path.join(output, "config.yaml")
        config.MODEL.WEIGHTS = weights
        config.MODEL.DEVICE = device or default_config().MODEL.DEVICE  # not this machine's
        config.OUTPUT_DIR = output

    # Built and loaded whole, so that what is written is known to fit.
    _save_weights(model, checkpoint, weights, entry)
    if isinstance(config, DictConfig):
        LazyConfig.save(OmegaConf.create({"model": config}, flags={"allow_objects": True}), path)
    else:
        write_whole(path, lambda file: file.write(config.dump().encode()))
    return path


def _is_lazy(config_file: str) -> bool:
    with open(config_file) as f:
        return config_file.endswith(".py") or bool(re.search(r"^model:", f.read(), re.M))


def _student_config(cfg: CfgNode | DictConfig) -> CfgNode | DictConfig:
    """The yacs config of the student, or its LazyConfig node."""
    if isinstance(cfg, DictConfig):
        return cfg.model.student if "student" in cfg.model else cfg.model
    stock = stock_config(cfg)
    builder = META_ARCH_REGISTRY.get(stock.MODEL.META_ARCHITECTURE)
    return builder.lazy_config(cfg) if hasattr(builder, "lazy_config") else stock


def _save_weights(model: nn.Module, checkpoint: str, path: str, entry: str) -> None:
    Checkpointer(model).load(checkpoint, checkpointables=[], whole=True, entry=entry)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    weights = {"model": {k: v.cpu() for k, v in model.state_dict().items()}}
    write_whole(path, lambda file: torch.save(weights, file))
