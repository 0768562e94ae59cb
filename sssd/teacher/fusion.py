"""From label and appearance embeddings back to feature maps.

N: images, M: most objects in an image, P: levels, C: pyramid width, E: embedding width,
H, W: height and width of a level.
"""

import torch
from torch import Tensor, nn

from .spatial_transformer import pointwise

__all__ = ["MapPainter", "RelationAdapter", "paint"]


class RelationAdapter(nn.Module):
    """Cross-attention among the objects of one image (LGD's inter-object relation adapter).

    Queries are the appearance embeddings of a level, keys and values the label embeddings; the
    weights are shared by all levels. Objects never attend to another image's.
    """

    def __init__(self, *, embed_dim: int, num_heads: int, label_residual: bool = False) -> None:
        """
        Args:
            embed_dim: width E of the object embeddings, a multiple of ``num_heads``.
            num_heads: attention heads.
            label_residual: add each object's own label embedding to what it attends to.
        """
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(
                f"The teacher's embedding width {embed_dim} is not a multiple of its {num_heads} "
                "attention heads; change MODEL.SSSD.TEACHER.EMBED_DIM or NUM_HEADS."
            )
        self.label_residual = label_residual
        self.label_projection = pointwise(embed_dim, embed_dim)
        self.attention = nn.MultiheadAttention(embed_dim, num_heads, batch_first=True)

    def forward(self, appearance: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        """
        Args:
            appearance: (P, N, M, E).
            labels: (N, M, E).
            valid: bool (N, M).

        Returns:
            (P, N, M, E); rows of padding are meaningless.
        """
        num_levels = len(appearance)
        # A softmax over no key at all is NaN: an image without objects attends to its padding,
        # and the result is masked when it is painted.
        ignored = ~valid
        ignored = ignored & ~ignored.all(dim=1, keepdim=True)
        labels = self.label_projection(labels).repeat(num_levels, 1, 1)
        attended, _ = self.attention(
            appearance.flatten(0, 1),
            labels,
            labels,
            key_padding_mask=ignored.repeat(num_levels, 1),
            need_weights=False,
        )
        if self.label_residual:
            attended = attended + labels
        return attended.view_as(appearance)


def paint(embeddings: Tensor, cells: Tensor) -> Tensor:
    """Writes each object's embedding on its cells; where objects overlap, their mean.

    Args:
        embeddings: (N, M, E).
        cells: bool (N, M, H, W); padding has none.

    Returns:
        (N, E, H, W), 0 on cells without an object.
    """
    weight = cells.flatten(2).to(embeddings.dtype)
    weight = weight / weight.sum(dim=1, keepdim=True).clamp(min=1)
    return (embeddings.transpose(1, 2) @ weight).unflatten(2, cells.shape[2:])


class MapPainter(nn.Module):
    """Objects onto the map, then refinement (LGD's intra-object knowledge mapper).

    One set of weights for all levels.
    """

    def __init__(self, *, channels: int, embed_dim: int, with_context: bool) -> None:
        """
        Args:
            channels: width C of the pyramid that comes out.
            embed_dim: width E of the object embeddings.
            with_context: whether the last object of each image is its context box, which is
                spread over the whole map instead of being painted.
        """
        super().__init__()
        self.object_projection = nn.Linear(embed_dim, embed_dim)
        self.context_projection = nn.Linear(embed_dim, channels) if with_context else None
        self.canvas = nn.Conv2d(embed_dim, channels, 3, padding=1)
        self.refinement = nn.Sequential(
            *_refinement_layer(channels),
            nn.ReLU(),
            *_refinement_layer(channels),
            nn.ReLU(),
            *_refinement_layer(channels),
        )

    def forward(self, embeddings: Tensor, cells: Tensor) -> Tensor:
        """
        Args:
            embeddings: (N, M, E), of one level.
            cells: bool (N, M, H, W).

        Returns:
            (N, C, H, W), the teacher's map of that level.
        """
        context = None
        if self.context_projection is not None:
            context = self.context_projection(embeddings[:, -1])[:, :, None, None]
            embeddings, cells = embeddings[:, :-1], cells[:, :-1]
        canvas = self.canvas(paint(self.object_projection(embeddings), cells))
        if context is not None:
            canvas = canvas + context
        return self.refinement(torch.relu(canvas))


def _refinement_layer(channels: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.GroupNorm(1, channels, affine=False),
    ]
