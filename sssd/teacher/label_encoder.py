"""Encodes the labelled objects of an image as a set (LGD's label encoder, after PointNet).

N: images, M: most objects in an image, D: descriptor width, E: embedding width.
"""

import math

import torch
from torch import Tensor, nn

from .objects import ObjectBatch
from .spatial_transformer import SpatialTransformer, max_over_objects, pointwise

__all__ = ["LabelEncoder", "normalised_boxes"]


def normalised_boxes(objects: ObjectBatch) -> Tensor:
    """Box corners in [-1, 1], relative to each image's own size: (N, M, 4).

    Its own size and not that of the padded batch, so that an image has the same descriptors
    whichever images it shares a batch with.
    """
    scale = objects.image_sizes.flip(1).repeat(1, 2)[:, None]
    return objects.boxes / scale * 2 - 1


class LabelEncoder(nn.Module):
    """Box and class of each object, and its company in the image -> a label embedding.

    LGD describes the class by a one-hot vector, so that its first spatial transformer has a
    matrix of (4 + classes)^2 entries. Here the class is an embedding of fixed width: the
    parameters grow linearly with the classes, by ``DESCRIPTOR_DIM - 4`` for each.
    """

    DESCRIPTOR_DIM = 64

    def __init__(self, *, num_classes: int, embed_dim: int) -> None:
        """
        Args:
            num_classes: number of classes; index ``num_classes`` means "no class" and has an
                embedding of zeros.
            embed_dim: width E of the label embedding.
        """
        super().__init__()
        dim = self.DESCRIPTOR_DIM
        self.class_embedding = nn.Embedding(num_classes + 1, dim - 4, padding_idx=num_classes)
        self.input_transform = SpatialTransformer(dim)
        self.point = pointwise(dim, 64)
        self.feature_transform = SpatialTransformer(64)
        self.set_features = pointwise(64, 128, 1024)
        self.output = pointwise(64 + 1024, embed_dim)
        # Sixteen times as many inputs describe the company as the object itself. Left at that, the
        # embeddings of an image start out all but equal; this gives both halves equal say.
        with torch.no_grad():
            self.output[0].weight[:, :64] *= math.sqrt(1024 / 64)

    def forward(self, objects: ObjectBatch) -> Tensor:
        """Returns the label embeddings (N, M, E); those of padding are meaningless."""
        valid = objects.valid
        x = torch.cat([normalised_boxes(objects), self.class_embedding(objects.classes)], dim=2)
        x = self.point(self.input_transform(x, valid))
        x = self.feature_transform(x, valid)
        company = max_over_objects(self.set_features(x), valid)
        company = company[:, None].expand(-1, x.shape[1], -1)
        return self.output(torch.cat([x, company], dim=2))
