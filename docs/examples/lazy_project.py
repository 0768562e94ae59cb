"""A project's LazyConfig. Self-distillation wraps its model node; the rest is as it was.

tools/lazyconfig_train_net.py --config-file docs/examples/lazy_project.py
"""

import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig
from detectron2.data import DatasetMapper, build_detection_train_loader, transforms
from detectron2.data import get_detection_dataset_dicts as records
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler
from omegaconf import OmegaConf

import sssd
from sssd.engine import optimizer_params
from sssd.losses import coefficient_schedule

# ---- What the project has: a model (here one of ours), data, optimizer and schedule ----
detector = LazyConfig.load_rel("../../configs/lazy/common/models.py", "retinanet")
detector.num_classes = 3
# From random weights: BatchNorm and nothing frozen.
detector.backbone.bottom_up.freeze_at = 0
detector.backbone.bottom_up.stem.norm = detector.backbone.bottom_up.stages.norm = "BN"

dataloader = OmegaConf.create()
dataloader.train = L(build_detection_train_loader)(
    dataset=L(records)(names="project_train"),
    mapper=L(DatasetMapper)(
        is_train=True,
        augmentations=[L(transforms.ResizeShortestEdge)(short_edge_length=64, max_size=96)],
        image_format="BGR",
    ),
    total_batch_size=2,
    num_workers=0,
)
optimizer = L(torch.optim.SGD)(
    # Detectron2's get_default_optimizer_params for the student, and for the teacher with what is
    # different there.
    params=L(optimizer_params)(
        base_lr="${..lr}", weight_decay_norm=0.0, teacher=dict(base_lr=0.001)
    ),
    lr=0.0005,
    momentum=0.9,
    weight_decay=1e-4,
)
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[2, 3]),
    warmup_length=0.1,
    warmup_factor=0.01,
)
train = dict(
    output_dir="./output/lazy_project",
    init_checkpoint="",
    max_iter=3,
    amp=dict(enabled=False),
    ddp=dict(broadcast_buffers=False),
    checkpointer=dict(period=1000),
    eval_period=0,
    log_period=1,
    device="cpu",
)

# ---- What self-distillation adds ----
model = L(sssd.distill)(
    student=detector,
    coefficient=L(coefficient_schedule)(name="step", values=[75.0, 100.0], milestones=[2]),
    phases=L(sssd.Phases)(max_iter=train["max_iter"], no_distill_iters=1),
    teacher=dict(add_context_box=True, detach_appearance=False),
)
