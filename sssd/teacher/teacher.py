"""The training-only branch: ground truth and the student's pyramid in, a second pyramid out.

N: images, M: most objects in an image, C: pyramid width, E: embedding width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .appearance import AppearanceEncoder
from .fusion import MapPainter, RelationAdapter
from .label_encoder import LabelEncoder
from .objects import ObjectBatch, object_cells

__all__ = ["LabelEncodingTeacher"]


class LabelEncodingTeacher(nn.Module):
    """LGD's teacher (2109.11496), which SSSD inherits, computed for the whole batch at once.

    1. The label encoder turns boxes and classes into label embeddings.
    2. The appearance encoder pools, for each object and level, what the student sees there.
    3. Cross-attention lets each object's appearance query the labels of its image.
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
            label_residual: add each object's own label embedding to what its appearance attends
                to. Not in LGD: there, an object has to find its own label among those of its image,
                and until it has learned that, all objects of an image get their mean.
        """
        super().__init__()
        embed_dim = embed_dim or -(-channels // num_heads) * num_heads
        self.num_classes = num_classes
        self.strides = dict(strides)
        self.add_context_box = add_context_box
        self.detach_appearance = detach_appearance
        self.label_encoder = LabelEncoder(num_classes=num_classes, embed_dim=embed_dim)
        self.appearance_encoder = AppearanceEncoder(channels=channels, embed_dim=embed_dim)
        self.relation_adapter = RelationAdapter(
            embed_dim=embed_dim, num_heads=num_heads, label_residual=label_residual
        )
        self.painter = MapPainter(
            channels=channels, embed_dim=embed_dim, with_context=add_context_box
        )

    def forward(self, features: Mapping[str, Tensor], objects: ObjectBatch) -> dict[str, Tensor]:
        """
        Args:
            features: level -> (N, C, H, W), the student's pyramid; at least the taught levels.
            objects: the ground truth, on any device.

        Returns:
            Taught level -> (N, C, H, W).
        """
        objects = objects.to(next(iter(features.values())).device)
        if self.add_context_box:
            objects = objects.with_context_box(self.num_classes)
        maps = {level: features[level] for level in self.strides}
        if self.detach_appearance:
            maps = {level: x.detach() for level, x in maps.items()}
        cells = {
            level: object_cells(objects, x.shape[-2:], self.strides[level])
            for level, x in maps.items()
        }
        labels = self.label_encoder(objects)
        appearance = torch.stack(
            [self.appearance_encoder(x, cells[level]) for level, x in maps.items()]
        )
        embeddings = self.relation_adapter(appearance, labels, objects.valid)
        return {
            level: self.painter(embedding, cells[level])
            for level, embedding in zip(maps, embeddings, strict=True)
        }
