"""What each object looks like on each level of the student's pyramid.

N: images, M: most objects in an image, C: pyramid width, E: embedding width,
H, W: height and width of a level.
"""

from torch import Tensor, nn

__all__ = ["AppearanceEncoder", "pool_over_cells"]


def pool_over_cells(features: Tensor, cells: Tensor) -> Tensor:
    """Mean of a map over the cells of each object.

    Args:
        features: (N, E, H, W).
        cells: bool (N, M, H, W), from :func:`sssd.teacher.objects.object_cells`.

    Returns:
        (N, M, E); 0 for objects without cells (padding).
    """
    cells = cells.flatten(2)
    # Divided first: under mixed precision the sum over a large object may exceed float16.
    weight = cells / cells.sum(dim=2, keepdim=True).clamp(min=1)
    return weight.to(features.dtype) @ features.flatten(2).transpose(1, 2)


class AppearanceEncoder(nn.Module):
    """3x3 convolution, GroupNorm(1), ReLU, then the mean over each object's cells.

    One set of weights for all levels (LGD's appearance encoder).
    """

    def __init__(self, *, channels: int, embed_dim: int) -> None:
        super().__init__()
        self.projection = nn.Sequential(
            nn.Conv2d(channels, embed_dim, 3, padding=1),
            nn.GroupNorm(1, embed_dim, affine=False),
            nn.ReLU(),
        )

    def forward(self, features: Tensor, cells: Tensor) -> Tensor:
        """
        Args:
            features: (N, C, H, W), the student's map of one level.
            cells: bool (N, M, H, W), the cells of each object on it.

        Returns:
            (N, M, E) appearance embeddings.
        """
        return pool_over_cells(self.projection(features), cells)
