"""A teacher of one's own: spots at the objects' centres, by name in configs.

Its options come from MODEL.SSSD.SPOTS, a node that the project adds to its config.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sssd import TEACHER_REGISTRY
from sssd.teacher import ObjectBatch


class SpotTeacher(nn.Module):
    """Adds to the student's map, at each object, a bump with the embedding of its class.

    N: images, M: most objects in an image, C: pyramid width, H, W: size of a level.
    """

    def __init__(
        self, *, num_classes: int, channels: int, strides: Mapping[str, int], radius: float
    ) -> None:
        """
        Args:
            radius: width of a bump, as a part of the object's size.
        """
        super().__init__()
        self.num_classes, self.strides = num_classes, dict(strides)  # every teacher has these two
        self.radius = radius
        # The last class means "no class": padding.
        self.embedding = nn.Embedding(num_classes + 1, channels, padding_idx=num_classes)
        self.refinement = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, features: Mapping[str, Tensor], objects: ObjectBatch) -> dict[str, Tensor]:
        """
        Args:
            features: level -> (N, C, H, W), the student's pyramid.
            objects: the ground truth, on any device.

        Returns:
            Level -> (N, C, H, W), for each level in ``strides``.
        """
        objects = objects.to(next(iter(features.values())).device)
        embedded = self.embedding(objects.classes)  # (N, M, C)
        taught = {}
        for level, stride in self.strides.items():
            bumps = self._bumps(objects.boxes, features[level].shape[-2:], stride)
            spots = torch.einsum("nmc,nmhw->nchw", embedded, bumps)
            taught[level] = self.refinement(features[level].detach() + spots)
        return taught

    def _bumps(self, boxes: Tensor, size: tuple[int, int], stride: int) -> Tensor:
        """(N, M, H, W), 1 at the centre of each box."""
        low, high = boxes[..., :2], boxes[..., 2:]
        width = (self.radius * (high - low)).clamp(min=stride / 2)[..., None, None, :]
        centre = ((low + high) / 2)[..., None, None, :]
        rows, columns = ((torch.arange(n, device=boxes.device) + 0.5) * stride for n in size)
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        cells = torch.stack([x, y], dim=-1)  # (H, W, 2)
        return torch.exp(-0.5 * ((cells - centre) / width).square().sum(dim=-1))


# Now MODEL.SSSD.TEACHER.NAME may be "spots".
@TEACHER_REGISTRY.register()
def spots(student: nn.Module, *, radius: float = 0.25, **required) -> SpotTeacher:
    """Options in MODEL.SSSD.SPOTS: RADIUS."""
    return SpotTeacher(radius=radius, **required)
