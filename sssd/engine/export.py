"""From a training checkpoint to what stock Detectron2 loads."""

import os

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from .checkpoint import Checkpointer
from .setup import load_config

__all__ = ["export_student", "stock_config"]


def stock_config(cfg: CfgNode) -> CfgNode:
    """The config of the student alone: stock meta-architecture, no key of sssd."""
    cfg = cfg.clone()
    cfg.defrost()
    if cfg.MODEL.META_ARCHITECTURE == "SelfDistiller":
        cfg.MODEL.META_ARCHITECTURE = cfg.MODEL.SSSD.STUDENT
    del cfg.MODEL["SSSD"]
    return cfg


def export_student(checkpoint: str, config_file: str, output: str) -> None:
    """Writes ``model.pth`` (weights only) and ``config.yaml`` of the student into a folder.

    Args:
        checkpoint: a file written by training, self-distilled or plain.
        config_file: the config of that training (its OUTPUT_DIR has it as config.yaml).
        output: folder, made if missing.

    Raises:
        FileNotFoundError: when there is no config file.
        CheckpointError: when the checkpoint is damaged or does not fit the config.
    """
    if not os.path.isfile(config_file):
        raise FileNotFoundError(
            f"The config {config_file} does not exist; name the config of the training with "
            "--config-file."
        )
    cfg = stock_config(load_config(config_file))
    os.makedirs(output, exist_ok=True)
    weights = os.path.join(output, "model.pth")
    cfg.MODEL.WEIGHTS = weights
    cfg.OUTPUT_DIR = output

    # Built and loaded whole, so that what is written is known to fit.
    model = build_model(cfg)
    Checkpointer(model).load(checkpoint, checkpointables=[], whole=True)
    torch.save({"model": {k: v.cpu() for k, v in model.state_dict().items()}}, weights)
    with open(os.path.join(output, "config.yaml"), "w") as f:
        f.write(cfg.dump())
