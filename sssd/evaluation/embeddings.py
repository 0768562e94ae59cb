"""What a classifier makes of images just before its logits: to compare, to draw, to learn from.

Letters: N: images, D: width of the embedding.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import matplotlib
import numpy as np
import torch
from detectron2.config import CfgNode
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from torch import Tensor, nn

from ..classification.capture import EMBEDDING, Capture
from ..data.classification_check import read_dataset
from ..data.classification_mapper import ClassificationMapper

__all__ = ["Embeddings", "class_separation", "draw_embeddings", "embed_dataset", "tsne"]

_CHUNK = 512  # images whose distances to all are in memory at once
_FEWEST = 4  # images from which t-SNE can make a picture
_NAMED = 20  # classes that a legend has room for


@dataclass(frozen=True)
class Embeddings:
    """A dataset as a network sees it.

    Attributes:
        features: (N, D) float32, the pooled feature that enters the classifier.
        labels: (N,) int64.
        classes: names by label.
    """

    features: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]


@torch.no_grad()
def embed_dataset(
    network: nn.Module, cfg: CfgNode, dataset: str, *, max_images: int | None = None
) -> Embeddings:
    """The embeddings of a dataset, whose classes need not be those of the network.

    Images are resized and cropped as in the evaluation of the network. Grey ones become RGB for a
    network that was trained on RGB, by repeating their channel.

    Args:
        network: in evaluation mode.
        cfg: of its training: size and normalisation of its images.
        dataset: a name in Detectron2's ``DatasetCatalog``.
        max_images: takes a random part, the same for every network; None for all.

    Raises:
        DatasetError: the dataset cannot be read or is empty.
        ValueError: its images have channels that the network cannot take, or the embeddings are
            not finite.
    """
    records, classes = read_dataset(dataset)
    if max_images is not None and max_images < len(records):
        chosen = np.random.RandomState(0).permutation(len(records))[:max_images]
        records = [records[i] for i in sorted(chosen)]
    keys = cfg.MODEL.SSSD.CLASSIFIER
    mapper = ClassificationMapper(False, keys.SIZE, keys.AUGMENTATION)
    device = next(network.parameters()).device
    mean, std = (
        torch.tensor(values, device=device).view(-1, 1, 1)
        for values in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    )
    capture = Capture(network, [EMBEDDING])
    features = []
    for start in range(0, len(records), keys.TEST_BATCH):
        images = [
            _with_channels(mapper(record)["image"], len(mean), dataset)
            for record in records[start : start + keys.TEST_BATCH]
        ]
        with capture:
            network((torch.stack(images).to(device) - mean) / std)
        features.append(capture[EMBEDDING].float().cpu())
    capture.clear()
    together = torch.cat(features)
    if not together.isfinite().all():
        raise ValueError(
            f"The embeddings of {dataset!r} by the network {keys.NETWORK!r} are not finite: its "
            "training has diverged; use another checkpoint."
        )
    labels = np.asarray([record["label"] for record in records], dtype=np.int64)
    return Embeddings(together.numpy(), labels, tuple(classes))


def class_separation(embeddings: Embeddings) -> float:
    """Mean distance between images of two classes, over that between images of one class.

    Distances are Euclidean, in the embedding space (not in a picture of it), and means are over all
    pairs of two images. 1 means that the classes are not told apart; the scale does not matter.

    Returns:
        The ratio; infinite where the images of each class coincide.

    Raises:
        ValueError: no two images are of one class, or all are.
    """
    features = torch.from_numpy(embeddings.features).double()
    labels = torch.from_numpy(embeddings.labels)
    within = between = 0.0
    num_within = -len(labels)  # each image meets itself once, at the distance 0
    for part, part_labels in zip(features.split(_CHUNK), labels.split(_CHUNK), strict=True):
        distances = torch.cdist(part, features, compute_mode="donot_use_mm_for_euclid_dist")
        same = part_labels[:, None] == labels
        within += distances[same].sum().item()
        between += distances[~same].sum().item()
        num_within += int(same.sum())
    num_between = len(labels) * (len(labels) - 1) - num_within
    if not num_within or not num_between:
        raise ValueError(
            f"{len(labels)} images of {len(labels.unique())} class(es) have no distances within "
            "and between classes: use two or more classes, of which one has two images or more."
        )
    within, between = within / num_within, between / num_between
    return between / within if within else float("inf")


def tsne(features: np.ndarray, seed: int = 0) -> np.ndarray:
    """Positions (N, 2) that keep neighbours together, by t-SNE (van der Maaten and Hinton, 2008).

    Args:
        features: (N, D), N at least 4.
        seed: the same one gives the same picture on the same machine.

    Raises:
        ValueError: there are fewer images.
    """
    count, width = features.shape
    if count < _FEWEST:
        raise ValueError(
            f"A t-SNE picture of {count} images was asked for: give it {_FEWEST} or more."
        )
    perplexity = min(30.0, (count - 1) / 3)  # scikit-learn's default, where there are enough
    init = "pca" if width > 1 else "random"
    return TSNE(perplexity=perplexity, init=init, random_state=seed).fit_transform(features)


def draw_embeddings(embeddings: Mapping[str, Embeddings], seed: int = 0) -> Figure:
    """Draws the same images as several networks see them, side by side, coloured by class.

    Under each picture stands `class_separation`.

    Args:
        embeddings: title -> embeddings of the same images.
        seed: of `tsne`.

    Returns:
        A figure of matplotlib with an axis for each; save it with its ``savefig``.

    Raises:
        ValueError: there are none, or they are of different images.
    """
    everyone = list(embeddings.values())
    if not everyone or any(
        not np.array_equal(other.labels, everyone[0].labels) for other in everyone
    ):
        raise ValueError(
            f"Embeddings of {', '.join(embeddings) or 'no network'} cannot be drawn side by side: "
            "give those of one or more networks on the same images."
        )
    figure = Figure(figsize=(4.4 * len(everyone), 4.9), layout="constrained")
    axes = figure.subplots(1, len(everyone), squeeze=False)[0]
    labels, classes = everyone[0].labels, everyone[0].classes
    colors = matplotlib.colormaps["tab10" if len(classes) <= 10 else "gist_ncar"]
    colors = colors.resampled(max(len(classes), 2)) if len(classes) > 10 else colors
    for axis, (title, embedded) in zip(axes, embeddings.items(), strict=True):
        positions = tsne(embedded.features, seed)
        for label, name in enumerate(classes):
            chosen = positions[labels == label]
            axis.scatter(*chosen.T, s=7, color=colors(label), linewidths=0, label=name)
        axis.set(title=title, xticks=[], yticks=[])
        axis.set_xlabel(f"between / within class distance: {class_separation(embedded):.2f}")
    if len(classes) <= _NAMED:
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(
            handles, names, loc="outside lower center", ncols=min(len(classes), 5), markerscale=2
        )
    return figure


def _with_channels(image: Tensor, channels: int, dataset: str) -> Tensor:
    """An image (C, H, W) with the channels that a network takes."""
    if len(image) == channels:
        return image
    if len(image) == 1:
        return image.expand(channels, -1, -1)
    raise ValueError(
        f"The images of {dataset!r} have {len(image)} channels and the network takes {channels}: "
        "use a network that was trained on images of as many channels, or a grey dataset."
    )
