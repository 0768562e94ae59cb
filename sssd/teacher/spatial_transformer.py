"""Learned linear transform of a set of object descriptors (the T-Net of PointNet).

N: images, M: most objects in an image, D: descriptor width.
"""

import torch
from torch import Tensor, nn

__all__ = ["SpatialTransformer", "max_over_objects", "pointwise"]


def pointwise(in_features: int, *widths: int) -> nn.Sequential:
    """Linear layers applied to each object by itself, each with LayerNorm and ReLU."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [
            nn.Linear(in_features, width),
            nn.LayerNorm(width, elementwise_affine=False),
            nn.ReLU(),
        ]
        in_features = width
    return nn.Sequential(*layers)


def max_over_objects(x: Tensor, valid: Tensor) -> Tensor:
    """Largest value over the valid objects of each image: (N, M, D), (N, M) -> (N, D).

    ``x`` must be non-negative (it follows a ReLU): then 0 in the place of padding changes no
    maximum, and an image without objects gets 0.
    """
    return (x * valid[..., None]).amax(dim=1)


class SpatialTransformer(nn.Module):
    """Predicts one D x D matrix for the objects of an image and applies it to each of them.

    Unlike LGD's, whose matrix depends on one object alone (its maximum runs over an axis of
    length 1) and starts at random, this is PointNet's: the maximum runs over the objects of the
    image, and the transform starts at the identity.
    """

    def __init__(self, dim: int) -> None:
        """
        Args:
            dim: descriptor width D.
        """
        super().__init__()
        self.dim = dim
        self.local = pointwise(dim, 64, 128, 1024)
        self.glob = pointwise(1024, 512, 256)
        self.matrix = nn.Linear(256, dim * dim)
        nn.init.zeros_(self.matrix.weight)
        with torch.no_grad():
            self.matrix.bias.copy_(torch.eye(dim).flatten())

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """
        Args:
            x: (N, M, D) descriptors.
            valid: bool (N, M), False on padding.

        Returns:
            (N, M, D) transformed descriptors.
        """
        summary = self.glob(max_over_objects(self.local(x), valid))
        return x @ self.matrix(summary).view(-1, self.dim, self.dim)
