"""Schedules of Detectron2's model zoo, for batches of 16.

The learning rate of Faster R-CNN is 0.02, that of RetinaNet and FCOS 0.01.
"""

import torch
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from sssd.engine import optimizer_params


def _lr_multiplier(steps, max_iter):
    return L(WarmupParamScheduler)(
        scheduler=L(MultiStepParamScheduler)(
            values=[1.0, 0.1, 0.01], milestones=[*steps, max_iter]
        ),
        warmup_length=1000 / max_iter,
        warmup_method="linear",
        warmup_factor=0.001,
    )


def _train(max_iter):
    return dict(
        output_dir="./output",
        init_checkpoint="detectron2://ImageNetPretrained/MSRA/R-50.pkl",
        max_iter=max_iter,
        amp=dict(enabled=False),
        ddp=dict(broadcast_buffers=False, find_unused_parameters=False, fp16_compression=False),
        checkpointer=dict(period=5000, max_to_keep=100),
        eval_period=5000,
        log_period=20,
        device="cuda",
    )


optimizer = L(torch.optim.SGD)(
    # params.model is set to the model by the training script; params.teacher may hold what is
    # different for the teacher, such as dict(base_lr=0.01)
    params=L(optimizer_params)(base_lr="${..lr}", weight_decay_norm=0.0),
    lr=0.02,
    momentum=0.9,
    weight_decay=1e-4,
)

lr_multiplier_1x, train_1x = _lr_multiplier([60000, 80000], 90000), _train(90000)
lr_multiplier_2x, train_2x = _lr_multiplier([120000, 160000], 180000), _train(180000)
lr_multiplier_3x, train_3x = _lr_multiplier([210000, 250000], 270000), _train(270000)
