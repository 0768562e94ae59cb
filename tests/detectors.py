"""Detectors small enough for unit tests, and inputs for them."""

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils.events import EventStorage

from sssd.engine import load_config

from .conftest import REPOSITORY

_RCNN = {
    "MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16], [32], [64], [128]],
    "MODEL.ROI_HEADS.NUM_CLASSES": 3,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 32,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
}
_CASCADE = {
    "MODEL.ROI_HEADS.NAME": "CascadeROIHeads",
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
}
_MASK = {
    "MODEL.MASK_ON": True,
    "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
}
_KEYPOINTS = {
    "MODEL.KEYPOINT_ON": True,
    "MODEL.ROI_HEADS.NUM_CLASSES": 1,
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 4,
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": [16],
}
_PANOPTIC = {
    "MODEL.META_ARCHITECTURE": "PanopticFPN",
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 5,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
}
_DENSE = {
    "MODEL.ANCHOR_GENERATOR.SIZES": [[8, 12], [16, 24], [32, 48], [64, 96], [128, 192]],
    "MODEL.RETINANET.NUM_CLASSES": 3,
    "MODEL.RETINANET.NUM_CONVS": 1,
    "MODEL.FPN.OUT_CHANNELS": 64,  # GroupNorm has 32 groups, and refuses one value in each
}
# Name -> base file and its own keys.
DETECTORS: dict[str, tuple[str, dict[str, Any]]] = {
    "faster_rcnn": ("Base-RCNN-FPN-small", _RCNN),
    "mask_rcnn": ("Base-RCNN-FPN-small", {**_RCNN, **_MASK}),
    "cascade_rcnn": ("Base-RCNN-FPN-small", {**_RCNN, **_CASCADE}),
    "cascade_mask_rcnn": ("Base-RCNN-FPN-small", {**_RCNN, **_CASCADE, **_MASK}),
    "keypoint_rcnn": ("Base-RCNN-FPN-small", {**_RCNN, **_KEYPOINTS}),
    "panoptic_fpn": ("Base-RCNN-FPN-small", {**_RCNN, **_MASK, **_PANOPTIC}),
    "retinanet": ("Base-RetinaNet-small", _DENSE),
    "fcos": (
        "Base-FCOS-small",
        {
            **{k: v for k, v in _DENSE.items() if "RETINANET" not in k},
            "MODEL.SSSD.FCOS.NUM_CLASSES": 3,
            "MODEL.SSSD.FCOS.NUM_CONVS": 1,
        },
    ),
}


def tiny_config(*opts: Any, distilled: bool = True, detector: str = "faster_rcnn") -> CfgNode:
    """ResNet-18, a pyramid 16 or 64 channels wide, 3 classes; no phases, coefficient 10."""
    base, own = DETECTORS[detector]
    cfg = load_config(str(REPOSITORY / "configs" / f"{base}.yaml"))
    options = {
        "MODEL.DEVICE": "cpu",
        "MODEL.FPN.OUT_CHANNELS": 16,
        "MODEL.SSSD.PHASES.NO_DISTILL_ITERS": 0,
        "MODEL.SSSD.PHASES.FREEZE_BACKBONE_ITERS": 0,
        "MODEL.SSSD.COEFFICIENT.SCHEDULE": "constant",
        "MODEL.SSSD.COEFFICIENT.VALUES": [10.0],
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.BASE_LR": 0.01,
        "SOLVER.WARMUP_ITERS": 0,
        **own,
    }
    cfg.merge_from_list([x for pair in options.items() for x in pair])
    if distilled:
        cfg.MODEL.SSSD.STUDENT = cfg.MODEL.META_ARCHITECTURE
        cfg.MODEL.META_ARCHITECTURE = "SelfDistiller"
    cfg.merge_from_list(list(opts))
    return cfg


def training_input(
    num_objects: int,
    height: int = 64,
    width: int = 96,
    seed: int = 0,
    num_classes: int = 3,
    detector: str = "faster_rcnn",
) -> dict[str, Any]:
    """One image with boxes of 8 pixels and more, as Detectron2's mapper gives it."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(num_objects, 2, generator=generator) * torch.tensor(
        [width - 32.0, height - 32.0]
    )
    size = 8 + torch.rand(num_objects, 2, generator=generator) * 24
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.cat([corner, corner + size], dim=1))
    instances.gt_classes = torch.randint(num_classes, (num_objects,), generator=generator)
    image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
    inputs = {"image": image, "instances": instances, "height": height, "width": width}
    if detector in ("mask_rcnn", "cascade_mask_rcnn", "panoptic_fpn"):
        x1, y1, x2, y2 = instances.gt_boxes.tensor.double().unbind(1)
        corners = torch.stack([x1, y1, x2, y1, x2, y2, x1, y2], dim=1).numpy()
        instances.gt_masks = PolygonMasks([[polygon] for polygon in corners])
    if detector == "keypoint_rcnn":
        instances.gt_classes[:] = 0
        points = corner[:, None] + size[:, None] * torch.rand(
            num_objects, 4, 2, generator=generator
        )
        visible = torch.full((num_objects, 4, 1), 2.0)
        instances.gt_keypoints = Keypoints(torch.cat([points, visible], dim=2))
    if detector == "panoptic_fpn":
        inputs["sem_seg"] = torch.randint(5, (height, width), generator=generator)
    return inputs


def training_batch(seed: int = 0, detector: str = "faster_rcnn") -> list[dict[str, Any]]:
    """Two images of different sizes with three objects and one."""
    return [
        training_input(3, seed=2 * seed, detector=detector),
        training_input(1, 80, 64, seed=2 * seed + 1, detector=detector),
    ]


def build(cfg: CfgNode, seed: int = 0) -> torch.nn.Module:
    """The model in training mode."""
    torch.manual_seed(seed)
    return build_model(cfg).train()


def losses_at(
    model: torch.nn.Module, iteration: int = 0, batch: list[dict[str, Any]] | None = None
) -> tuple[dict[str, torch.Tensor], EventStorage]:
    """Losses of a training iteration, and what was logged."""
    with EventStorage(iteration) as storage:
        return model(batch or training_batch()), storage


def train(
    cfg: CfgNode, batches: list[list[dict[str, Any]]] | None = None, steps: int = 20, seed: int = 1
) -> torch.nn.Module:
    """Trains with Detectron2's own trainer and optimizer."""
    torch.manual_seed(seed)
    model = build_model(cfg)
    batches = batches or [training_batch(i % 5) for i in range(steps)]
    # The scripted focal loss rounds otherwise from its third call in a process on, as optimised.
    with torch.jit.optimized_execution(False):
        SimpleTrainer(model, batches, build_optimizer(cfg, model)).train(0, len(batches))
    return model
