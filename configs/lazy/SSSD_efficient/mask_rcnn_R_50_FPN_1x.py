from ..common.data import dataloader
from ..common.methods import sssd_efficient
from ..common.models import mask_rcnn
from ..common.schedules import lr_multiplier_1x as lr_multiplier
from ..common.schedules import optimizer
from ..common.schedules import train_1x as train

model = sssd_efficient(
    mask_rcnn,
    train.max_iter,
    [60000, 80000],
    activation_checkpoint=True,
)
dataloader.train.mapper.use_instance_mask = True
train.clip_value = 1.0  # LGD clips gradients, plain Detectron2 does not
