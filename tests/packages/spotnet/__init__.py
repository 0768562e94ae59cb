"""A detector package of somebody else's, as sssd has never seen one.

It knows Detectron2 and nothing of sssd: its own meta-architecture and its own backbone, whose
levels have names, strides and a width of their own. Each cell of a level says whether the centre
of an object lies in it, of which class, and how large the object is.
"""

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import nn
from torch.nn import functional as F


def add_spotnet_config(cfg: CfgNode) -> None:
    cfg.MODEL.SPOTNET = CfgNode({"KINDS": 2})


STRIDES = {"lateral0": 6, "lateral1": 12, "lateral2": 24}


@BACKBONE_REGISTRY.register()
class LateralBackbone(Backbone):
    """Three levels of 6, 12 and 24 pixels a cell, 96 channels wide."""

    def __init__(self, cfg: CfgNode, input_shape: ShapeSpec) -> None:
        super().__init__()
        self.stem = nn.Conv2d(input_shape.channels, 32, 7, stride=6, padding=3)
        self.downsample = nn.ModuleList(nn.Conv2d(32, 32, 3, stride=2, padding=1) for _ in range(2))
        self.laterals = nn.ModuleList(nn.Conv2d(32, 96, 1) for _ in range(3))

    @property
    def size_divisibility(self) -> int:
        return 24

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = [F.relu(self.stem(x))]
        for downsample in self.downsample:
            maps.append(F.relu(downsample(maps[-1])))
        laterals = [lateral(x) for lateral, x in zip(self.laterals, maps, strict=True)]
        return dict(zip(STRIDES, laterals, strict=True))

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {name: ShapeSpec(channels=96, stride=s) for name, s in STRIDES.items()}


@META_ARCH_REGISTRY.register()
class SpotNet(nn.Module):
    @configurable
    def __init__(self, *, backbone: Backbone, kinds: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.kinds = kinds  # how many classes: a name that nobody else uses
        self.tower = nn.Sequential(
            nn.Conv2d(96, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, kinds + 4, 1),
        )
        self.register_buffer("mean_spots", torch.zeros(()))

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        return {"backbone": build_backbone(cfg), "kinds": cfg.MODEL.SPOTNET.KINDS}

    def forward(self, batched_inputs: list[dict]):
        device = self.mean_spots.device
        images = [x["image"].to(device).float() / 255 - 0.5 for x in batched_inputs]
        images = ImageList.from_tensors(images, self.backbone.size_divisibility)
        features = self.backbone(images.tensor)
        strides = {name: shape.stride for name, shape in self.backbone.output_shape().items()}
        outputs = {name: self.tower(x) for name, x in features.items()}
        if self.training:
            return self.losses(
                outputs, strides, [x["instances"].to(device) for x in batched_inputs]
            )
        return [
            {"instances": self.detect({k: v[i] for k, v in outputs.items()}, strides, size)}
            for i, size in enumerate(images.image_sizes)
        ]

    def losses(self, outputs: dict, strides: dict, gt_instances: list[Instances]) -> dict:
        spots = sum(len(gt) for gt in gt_instances)
        # A running mean in a buffer, and another in an attribute: both move once an iteration.
        self.mean_spots.mul_(0.9).add_(0.1 * spots)
        self.seen = getattr(self, "seen", 0) + 1
        get_event_storage().put_scalar("spots", spots)
        loss_kind, loss_size = 0.0, 0.0
        for name, output in outputs.items():
            target = torch.zeros_like(output[:, : self.kinds])
            for i, gt in enumerate(gt_instances):
                x, y = (gt.gt_boxes.get_centers() / strides[name]).long().unbind(1)
                target[i, gt.gt_classes, y, x] = 1.0
                size = (gt.gt_boxes.tensor[:, 2:] - gt.gt_boxes.tensor[:, :2]) / 100
                loss_size = loss_size + (output[i, -2:, y, x].T - size).abs().sum()
            loss_kind = loss_kind + F.binary_cross_entropy_with_logits(
                output[:, : self.kinds], target, reduction="sum"
            )
        normaliser = max(self.mean_spots.item(), 1.0)
        return {"loss_kind": loss_kind / normaliser, "loss_size": loss_size / normaliser}

    def detect(self, outputs: dict, strides: dict, image_size: tuple[int, int]) -> Instances:
        """The best cell of each level."""
        boxes, scores, classes = [], [], []
        for name, output in outputs.items():
            score, index = output[: self.kinds].sigmoid().flatten().max(dim=0)
            kind, y, x = torch.unravel_index(index, output[: self.kinds].shape)
            centre = (torch.stack([x, y]) + 0.5) * strides[name]
            half = output[-2:, y, x] * 50
            boxes.append(torch.cat([centre - half, centre + half]))
            scores.append(score)
            classes.append(kind)
        found = Instances(image_size)
        found.pred_boxes = Boxes(torch.stack(boxes))
        found.scores = torch.stack(scores)
        found.pred_classes = torch.stack(classes)
        return found
