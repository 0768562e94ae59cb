"""Classification networks out of the folders that trainings leave."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from torch import nn

from ..classification.networks import build_network, load_network_weights
from ..meta_arch.passes import forked_random_state
from .config_file import load_config

__all__ = ["TrainedNetwork", "config_beside", "load_trained_network", "network_of", "titles_of"]

_CONFIGS = ("config.yaml", "stage_config.yaml")  # of a whole run, and of one of its stages


@dataclass(frozen=True)
class TrainedNetwork:
    """A classification network and the config by which its images are prepared.

    Attributes:
        network: normalised images (B, C, H, W) -> logits (B, K); in evaluation mode, on
            MODEL.DEVICE.
        cfg: of its training.
    """

    network: nn.Module
    cfg: CfgNode


def config_beside(checkpoint: str) -> str:
    """The config of the training that wrote a checkpoint, by its place in the same folder.

    Returns:
        The path of config.yaml or, of a stage that is not the last, stage_config.yaml; that of
        config.yaml where there is neither.
    """
    folder = os.path.dirname(checkpoint)
    paths = [os.path.join(folder, name) for name in _CONFIGS]
    return next((path for path in paths if os.path.isfile(path)), paths[0])


def network_of(cfg: CfgNode) -> nn.Module:
    """The network that a config trains, with random weights.

    Raises:
        ValueError: the config is not one of image classification, or names no network.
    """
    keys = cfg.MODEL.SSSD.CLASSIFIER
    if cfg.MODEL.META_ARCHITECTURE != "ClassificationDistiller" or not keys.NETWORK:
        raise ValueError(
            f"The config trains {cfg.MODEL.META_ARCHITECTURE!r} with the network "
            f"{keys.NETWORK!r}: name a config of image classification, with "
            "MODEL.META_ARCHITECTURE 'ClassificationDistiller' and MODEL.SSSD.CLASSIFIER.NETWORK."
        )
    return build_network(
        keys.NETWORK,
        num_classes=keys.NUM_CLASSES,
        in_chans=len(cfg.MODEL.PIXEL_MEAN),
        **dict(keys.NETWORK_OPTIONS),
    )


def load_trained_network(
    checkpoint: str, config_file: str = "", *, random_seed: int | None = None
) -> TrainedNetwork:
    """The student of a checkpoint.

    Args:
        checkpoint: a file written by training.
        config_file: the config of that training; "" for the one beside the checkpoint.
        random_seed: if given, the network keeps the random weights that this seed gives it; the
            checkpoint is not read.

    Raises:
        FileNotFoundError: there is no config file.
        ValueError: the config is not one of classification, or the checkpoint does not fit it.
    """
    config_file = config_file or config_beside(checkpoint)
    if not os.path.isfile(config_file):
        raise FileNotFoundError(
            f"The config {config_file} of the checkpoint {checkpoint} does not exist: name a "
            "checkpoint in the folder that its training wrote."
        )
    cfg = load_config(config_file)
    with forked_random_state():
        if random_seed is not None:
            torch.manual_seed(random_seed)
        network = network_of(cfg)
    if random_seed is None:
        load_network_weights(network, checkpoint, cfg.MODEL.SSSD.CLASSIFIER.NETWORK)
    return TrainedNetwork(network.to(cfg.MODEL.DEVICE).eval(), cfg)


def titles_of(checkpoints: Sequence[str], titles: Sequence[str] = ()) -> list[str]:
    """A name for each checkpoint in tables and pictures.

    Args:
        checkpoints: paths.
        titles: the names, if they were chosen; else they are those of the folders, or, where two
            folders have one name, the paths.

    Raises:
        ValueError: there are not as many titles as checkpoints, or two are equal.
    """
    if not titles:
        titles = [os.path.basename(os.path.dirname(os.path.abspath(path))) for path in checkpoints]
        titles = titles if len(set(titles)) == len(titles) else checkpoints
    if len(titles) != len(checkpoints) or len(set(titles)) != len(titles):
        raise ValueError(
            f"{len(checkpoints)} checkpoints have the titles {', '.join(titles)}: give each "
            "checkpoint one of its own."
        )
    return list(titles)
