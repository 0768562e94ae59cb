"""A detector small enough for unit tests, and inputs for it."""

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances

from sssd.engine import load_config

from .conftest import REPOSITORY


def tiny_config(*opts: Any, distilled: bool = True) -> CfgNode:
    """ResNet-18, a pyramid 16 channels wide, 3 classes; no phases, coefficient 10."""
    cfg = load_config(str(REPOSITORY / "configs" / "Base-RCNN-FPN-small.yaml"))
    options = {
        "MODEL.DEVICE": "cpu",
        "MODEL.FPN.OUT_CHANNELS": 16,
        "MODEL.ROI_HEADS.NUM_CLASSES": 3,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 32,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
        "MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16], [32], [64], [128]],
        "MODEL.SSSD.PHASES.NO_DISTILL_ITERS": 0,
        "MODEL.SSSD.PHASES.FREEZE_BACKBONE_ITERS": 0,
        "MODEL.SSSD.COEFFICIENT.SCHEDULE": "constant",
        "MODEL.SSSD.COEFFICIENT.VALUES": [10.0],
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.BASE_LR": 0.01,
        "SOLVER.WARMUP_ITERS": 0,
    }
    if distilled:
        options["MODEL.META_ARCHITECTURE"] = "SelfDistiller"
    cfg.merge_from_list([x for pair in options.items() for x in pair])
    cfg.merge_from_list(list(opts))
    return cfg


def training_input(
    num_objects: int, height: int = 64, width: int = 96, seed: int = 0, num_classes: int = 3
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
    return {"image": image, "instances": instances, "height": height, "width": width}


def training_batch(seed: int = 0) -> list[dict[str, Any]]:
    """Two images of different sizes with three objects and one."""
    return [training_input(3, seed=2 * seed), training_input(1, 80, 64, seed=2 * seed + 1)]
