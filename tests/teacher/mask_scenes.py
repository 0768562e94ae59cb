"""Objects with masks, for the tests of the teacher."""

import numpy as np

from sssd.teacher.masks import MaskedObjects, polygon_cells, with_masks
from tests.teacher.scenes import STRIDES, scene


def rectangle(x1, y1, x2, y2):
    return np.array([x1, y1, x2, y1, x2, y2, x1, y2], dtype=np.float64)


def masked_scene(*counts, seed=0) -> MaskedObjects:
    """The objects of ``scene`` with an ellipse in each box; tiny boxes have tiny ellipses."""
    objects = scene(*counts, seed=seed)
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    masks = []
    for boxes, valid, size in zip(objects.boxes, objects.valid, objects.image_sizes, strict=True):
        low, high = boxes[valid].double().numpy().reshape(-1, 2, 2).transpose(1, 0, 2)
        polygons = [
            [((a + b) / 2 + circle * (b - a) / 2).ravel()] for a, b in zip(low, high, strict=True)
        ]
        masks.append(polygon_cells(polygons, [int(v) for v in size], STRIDES))
    return with_masks(objects, masks, STRIDES)
