"""From label and appearance embeddings back to feature maps.

N: images, M: most objects in an image, P: levels, C: pyramid width, E: embedding width,
H, W: height and width of a level.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .spatial_transformer import pointwise

__all__ = ["INTERACTIONS", "MapPainter", "RelationAdapter", "paint", "paint_and_convolve"]

INTERACTIONS = {
    "student_guided": {"appearance", "labels"},
    "label_guided": {"appearance", "labels"},
    "label_fill": {"labels"},
    "student_fill": {"appearance"},
}
"""Pattern of the RelationAdapter -> the embeddings that it is made of."""


class RelationAdapter(nn.Module):
    """What is painted for each object of an image (LGD's inter-object relation adapter).

    One of LGD's four patterns (its names for them: stuGuided, labelGuided, teacher_fill and
    student_fill); the weights are shared by all levels:

    - "student_guided": attention, in which the appearance embeddings of a level query the label
      embeddings of the same image. What is painted is made of labels.
    - "label_guided": the reverse. What is painted is made of appearance.
    - "label_fill": no attention; each object's own label embedding, the same on all levels.
    - "student_fill": no attention and no labels; each object's own appearance.

    Objects never attend to another image's. The parts that a pattern does not use do not exist.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        interaction: str = "student_guided",
        label_residual: bool = False,
    ) -> None:
        """
        Args:
            embed_dim: width E of the object embeddings; for attention, a multiple of ``num_heads``.
            num_heads: attention heads.
            interaction: the pattern.
            label_residual: add each object's own label embedding to what it attends to (ours). A
                pattern without attention has nothing to add it to, and refuses it.

        Raises:
            ValueError: for an unknown pattern, or options that do not fit it.
        """
        super().__init__()
        if interaction not in INTERACTIONS:
            raise ValueError(
                f"MODEL.SSSD.TEACHER.INTERACTION is {interaction!r}; use one of "
                f"{', '.join(INTERACTIONS)}."
            )
        attends = INTERACTIONS[interaction] == {"appearance", "labels"}
        if label_residual and not attends:
            raise ValueError(
                "MODEL.SSSD.TEACHER.LABEL_RESIDUAL adds an object's label to what it attends to, "
                f"but the INTERACTION {interaction!r} has no attention; set LABEL_RESIDUAL to "
                'False, or INTERACTION to "student_guided" or "label_guided".'
            )
        if attends and embed_dim % num_heads:
            raise ValueError(
                f"The teacher's embedding width {embed_dim} is not a multiple of its {num_heads} "
                "attention heads; change MODEL.SSSD.TEACHER.EMBED_DIM or NUM_HEADS."
            )
        self.interaction = interaction
        self.label_residual = label_residual
        self.label_projection = self.attention = None
        if "labels" in INTERACTIONS[interaction]:
            self.label_projection = pointwise(embed_dim, embed_dim)
        if attends:
            self.attention = nn.MultiheadAttention(embed_dim, num_heads, batch_first=True)

    def forward(self, appearance: Tensor | None, labels: Tensor | None, valid: Tensor) -> Tensor:
        """
        Args:
            appearance: (P, N, M, E); None with "label_fill".
            labels: (N, M, E); None with "student_fill".
            valid: bool (N, M).

        Returns:
            (P, N, M, E), or (1, N, M, E) for all levels with "label_fill"; rows of padding are
            meaningless.
        """
        if self.label_projection is None:
            return appearance
        labels = self.label_projection(labels)[None]
        if self.attention is None:
            return labels
        num_levels = len(appearance)
        # A softmax over no key at all is NaN: an image without objects attends to its padding,
        # and the result is masked when it is painted.
        ignored = ~valid
        ignored = ignored & ~ignored.all(dim=1, keepdim=True)
        queries, keys = appearance.flatten(0, 1), labels.expand_as(appearance).flatten(0, 1)
        if self.interaction == "label_guided":
            queries, keys = keys, queries
        attended, _ = self.attention(
            queries,
            keys,
            keys,
            key_padding_mask=ignored.repeat(num_levels, 1),
            need_weights=False,
        )
        attended = attended.view_as(appearance)
        return attended + labels if self.label_residual else attended


def paint(embeddings: Tensor, cells: Tensor) -> Tensor:
    """Writes each object's embedding on its cells; where objects overlap, their mean.

    Args:
        embeddings: (N, M, E).
        cells: bool (N, M, H, W); padding has none.

    Returns:
        (N, E, H, W), 0 on cells without an object.
    """
    weight = _share_of_cells(cells, embeddings.dtype).flatten(2)
    return (embeddings.transpose(1, 2) @ weight).unflatten(2, cells.shape[2:])


def paint_and_convolve(embeddings: Tensor, cells: Tensor, convolution: nn.Conv2d) -> Tensor:
    """A convolution of what :func:`paint` gives.

    Both are linear, so with few objects the painted map need not be made: the kernel, applied to
    each object's embedding first, becomes one of as many input channels as there are objects. It
    is the same function at a fraction of the work, and there is no gradient of the painted map.

    Args:
        embeddings: (N, M, E).
        cells: bool (N, M, H, W); padding has none.
        convolution: of E channels into C, that keeps the size of the map.

    Returns:
        (N, C, H, W).
    """
    num_images, num_objects, width = embeddings.shape
    # At a quarter of the width, applying the kernel to objects is still a third of the work.
    if num_objects > width // 4:
        return convolution(paint(embeddings, cells))
    kernels = torch.einsum("nme,ceij->ncmij", embeddings, convolution.weight)
    convolved = F.conv2d(
        _share_of_cells(cells, kernels.dtype).flatten(0, 1)[None],
        kernels.flatten(0, 1),
        padding=convolution.padding,
        groups=num_images,
    )
    return convolved.unflatten(1, (num_images, -1))[0] + convolution.bias[:, None, None]


def _share_of_cells(cells: Tensor, dtype: torch.dtype) -> Tensor:
    """1 on an object's cells, divided by the objects that share the cell: (N, M, H, W)."""
    share = cells.to(dtype)
    return share / share.sum(dim=1, keepdim=True).clamp(min=1)


class MapPainter(nn.Module):
    """Objects onto the map, then refinement (LGD's intra-object knowledge mapper).

    One set of weights for all levels.
    """

    def __init__(
        self, *, channels: int, embed_dim: int, with_context: bool, refinement_dim: int = 0
    ) -> None:
        """
        Args:
            channels: width C of the pyramid that comes out.
            embed_dim: width E of the object embeddings.
            with_context: whether the last object of each image is its context box, which is
                spread over the whole map instead of being painted.
            refinement_dim: width of the maps before the last convolution; 0 for C.
        """
        super().__init__()
        width = refinement_dim or channels
        self.object_projection = nn.Linear(embed_dim, embed_dim)
        self.context_projection = nn.Linear(embed_dim, width) if with_context else None
        self.canvas = nn.Conv2d(embed_dim, width, 3, padding=1)
        self.refinement = nn.Sequential(
            *_refinement_layer(width, width),
            nn.ReLU(),
            *_refinement_layer(width, width),
            nn.ReLU(),
            *_refinement_layer(width, channels),
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
        canvas = paint_and_convolve(self.object_projection(embeddings), cells, self.canvas)
        if context is not None:
            canvas = canvas + context
        return self.refinement(torch.relu(canvas))


def _refinement_layer(width: int, channels: int) -> list[nn.Module]:
    return [
        nn.Conv2d(width, channels, 3, padding=1),
        nn.GroupNorm(1, channels, affine=False),
    ]
