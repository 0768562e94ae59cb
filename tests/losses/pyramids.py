"""Small pyramids, padded batches, and the distance once more, one distribution at a time."""

import math

import numpy as np
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr, softmax

SIZES = {"p3": (4, 6), "p4": (2, 3), "top": (1, 1)}
# Images of a padded batch: rows and columns of each level that lie on the image.
EXTENTS = [{"p3": (4, 4), "p4": (2, 2), "top": (1, 1)}, {"p3": (3, 6), "p4": (2, 3), "top": (1, 1)}]


def pyramid(*, seed, images=2, channels=3, sizes=SIZES, dtype=torch.float64):
    """Level -> Gaussian maps (images, channels, height, width)."""
    generator = torch.Generator().manual_seed(seed)
    return {
        level: torch.randn(images, channels, *size, generator=generator, dtype=dtype)
        for level, size in sizes.items()
    }


def padding_masks(extents=EXTENTS, sizes=SIZES):
    """Level -> bool (images, height, width), True on the images."""
    masks = {level: torch.zeros(len(extents), *size).bool() for level, size in sizes.items()}
    for index, extent in enumerate(extents):
        for level, (rows, columns) in extent.items():
            masks[level][index, :rows, :columns] = True
    return masks


def oracle(student, teacher, masks, distance, axis, reduction, level_reduction):
    """The definition, one distribution at a time."""
    values, weights = [], []
    for level in student:
        divergences, elements = [], 0
        for image in range(len(student[level])):
            maps = [x[level][image].numpy() for x in (student, teacher)]
            inside = np.ones(maps[0].shape[1:], bool) if masks is None else masks[level][image]
            rows = [x[:, np.asarray(inside)] for x in maps]  # (C, cells on the image)
            elements += rows[0].size
            if axis == "channel":
                rows = [x.T for x in rows]
            elif axis == "flatten":
                rows = [x.reshape(1, -1) for x in rows]
            for a, b in zip(*rows, strict=True):
                p, q = softmax(a), softmax(b)
                if distance == "js":
                    divergences.append(jensenshannon(p, q, base=2) ** 2)
                elif distance == "kl":
                    divergences.append(rel_entr(q, p).sum() / math.log(2))
                else:
                    divergences.append(((a - b) ** 2).sum())
        divergences = np.nan_to_num(divergences)  # scipy's own rounding below 0
        # The root has a limited slope at 0.
        root = (lambda x: np.sqrt(x + 1e-12) - 1e-6) if distance == "js" else np.asarray
        if reduction == "element_mean":
            values.append(root(np.sum(divergences) / elements))
        else:
            values.append(np.mean(root(divergences)))
        weights.append(elements if level_reduction == "elements" else 1)
    total = np.dot(values, weights)
    return total if level_reduction == "sum" else total / np.sum(weights)
