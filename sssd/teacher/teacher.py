"""The training-only branch: ground truth and the student's pyramid in, a second pyramid out.

N: images, M: most objects in an image, C: pyramid width, E: embedding width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .appearance import AppearanceEncoder
from .fusion import INTERACTIONS, MapPainter, RelationAdapter
from .label_encoder import LabelEncoder
from .masks import mask_cells
from .objects import ObjectBatch, object_cells

__all__ = ["REGIONS", "LabelEncodingTeacher"]

REGIONS = ("box", "mask")
"""What the cells of an object are: those in its box, or those in its mask."""


class LabelEncodingTeacher(nn.Module):
    """LGD's teacher (2109.11496), which SSSD inherits, computed for the whole batch at once.

    1. The label encoder turns boxes and classes into label embeddings.
    2. The appearance encoder pools, for each object and level, what the student sees there.
    3. Cross-attention lets each object's appearance query the labels of its image (or another
       pattern of the :class:`~sssd.teacher.fusion.RelationAdapter`; those without attention need
       one of the two encoders only, and the other does not exist).
    4. The result is painted on the objects' cells and refined: the teacher's maps.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        channels: int,
        strides: Mapping[str, int],
        embed_dim: int = 0,
        num_heads: int = 8,
        add_context_box: bool = False,
        detach_appearance: bool = True,
        label_residual: bool = False,
        interaction: str = "student_guided",
        regions: str = "box",
        refinement_dim: int = 0,
    ) -> None:
        """
        Args:
            num_classes: number of classes of the ground truth.
            channels: width C of the student's pyramid.
            strides: level name -> pixels per cell. These are the levels that are taught.
            embed_dim: width E of the object embeddings; 0 for C, rounded up to a multiple of
                ``num_heads``.
            num_heads: attention heads.
            add_context_box: add to each image an object without class that covers all of it.
            detach_appearance: keep the teacher's detection loss from reaching the student's
                backbone through the appearance embeddings (LGD: yes for Faster R-CNN only).
                Without effect on "label_fill", which does not look at the student's maps.
            label_residual: add each object's own label embedding to what its appearance attends
                to. Not in LGD: there, an object has to find its own label among those of its image,
                and until it has learned that, all objects of an image get their mean. For the
                two patterns with attention.
            interaction: "student_guided" (LGD's default), "label_guided", "label_fill" or
                "student_fill"; see the RelationAdapter.
            regions: where an object is on a level, for pooling and painting: "box", or "mask",
                for which the objects have to be :class:`~sssd.teacher.masks.MaskedObjects`.
            refinement_dim: width of the maps inside the refinement, before its last convolution;
                0 for C (LGD).

        Raises:
            ValueError: for an option with an unknown value, or that does not fit another.
        """
        super().__init__()
        if regions not in REGIONS:
            raise ValueError(
                f"MODEL.SSSD.TEACHER.REGIONS is {regions!r}; use one of {', '.join(REGIONS)}."
            )
        embed_dim = embed_dim or -(-channels // num_heads) * num_heads
        self.num_classes = num_classes
        self.strides = dict(strides)
        self.add_context_box = add_context_box
        self.detach_appearance = detach_appearance
        self.regions = regions
        # An unknown pattern is the adapter's to refuse.
        used = INTERACTIONS.get(interaction, set())
        self.label_encoder = self.appearance_encoder = None
        if "labels" in used:
            self.label_encoder = LabelEncoder(num_classes=num_classes, embed_dim=embed_dim)
        if "appearance" in used:
            self.appearance_encoder = AppearanceEncoder(channels=channels, embed_dim=embed_dim)
        self.relation_adapter = RelationAdapter(
            embed_dim=embed_dim,
            num_heads=num_heads,
            interaction=interaction,
            label_residual=label_residual,
        )
        self.painter = MapPainter(
            channels=channels,
            embed_dim=embed_dim,
            with_context=add_context_box,
            refinement_dim=refinement_dim,
        )

    @property
    def mask_strides(self) -> dict[str, int]:
        """Level -> pixels per cell, of the levels on which it needs the objects' masks."""
        return self.strides if self.regions == "mask" else {}

    def forward(self, features: Mapping[str, Tensor], objects: ObjectBatch) -> dict[str, Tensor]:
        """
        Args:
            features: level -> (N, C, H, W), the student's pyramid; at least the taught levels.
            objects: the ground truth, on any device; MaskedObjects with the regions "mask".

        Returns:
            Taught level -> (N, C, H, W).
        """
        objects = objects.to(next(iter(features.values())).device)
        if self.add_context_box:
            objects = objects.with_context_box(self.num_classes)
        maps = {level: features[level] for level in self.strides}
        if self.detach_appearance:
            maps = {level: x.detach() for level, x in maps.items()}
        cells = {level: self._cells(objects, level, x.shape[-2:]) for level, x in maps.items()}
        labels = appearance = None
        if self.label_encoder is not None:
            labels = self.label_encoder(objects)
        if self.appearance_encoder is not None:
            appearance = torch.stack(
                [self.appearance_encoder(x, cells[level]) for level, x in maps.items()]
            )
        embeddings = self.relation_adapter(appearance, labels, objects.valid)
        embeddings = embeddings.expand(len(maps), -1, -1, -1)
        return {
            level: self.painter(embedding, cells[level])
            for level, embedding in zip(maps, embeddings, strict=True)
        }

    def _cells(self, objects: ObjectBatch, level: str, size: tuple[int, int]) -> Tensor:
        """Which cells of a level belong to which object: bool (N, M, H, W)."""
        if self.regions == "mask":
            return mask_cells(objects, level, size, self.strides[level])
        return object_cells(objects, size, self.strides[level])
