"""RetinaNet with a Swin-T, which Detectron2 v0.6 does not have: this needs its main branch.

Optimizer, schedule and LGD's switches are those of LGD's config for this detector. Set
train.init_checkpoint to the weights of a Swin-T in Detectron2's format.
"""

import torch
from detectron2.config import LazyCall as L
from detectron2.modeling import SwinTransformer

from ..common.data import dataloader
from ..common.methods import sssd
from ..common.models import retinanet
from ..common.schedules import lr_multiplier_3x as lr_multiplier
from ..common.schedules import optimizer
from ..common.schedules import train_3x as train

retinanet.backbone.bottom_up = L(SwinTransformer)(
    embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], out_indices=[1, 2, 3]
)
# Swin counts its maps from p0; the pyramid's are named by stride, p3 to p7. P6 comes from P5: with
# the map p3 of both, a name would mean two things.
retinanet.backbone.in_features = ["p1", "p2", "p3"]
retinanet.backbone.top_block.in_feature = "p5"
retinanet.backbone.top_block.in_channels = 256
# ImageNet's red, green, blue, as Swin's weights expect.
retinanet.pixel_mean = [123.675, 116.28, 103.53]
retinanet.pixel_std = [58.395, 57.12, 57.375]
retinanet.input_format = "RGB"
dataloader.train.mapper.image_format = "RGB"

train.init_checkpoint = ""
optimizer._target_ = torch.optim.AdamW
optimizer.lr = 1e-4
optimizer.weight_decay = 0.05
del optimizer.momentum
optimizer.params.overrides = {"relative_position_bias_table": {"weight_decay": 0.0}}

model = sssd(
    retinanet, train.max_iter, [210000, 250000], add_context_box=True, detach_appearance=False
)
# LGD's phases, not scaled to the longer schedule.
model.phases = dict(
    _target_="sssd.Phases",
    max_iter=train.max_iter,
    no_distill_iters=30000,
    freeze_backbone_iters=20000,
)
