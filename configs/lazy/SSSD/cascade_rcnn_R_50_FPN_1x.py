from ..common.data import dataloader
from ..common.methods import sssd
from ..common.models import cascade_rcnn
from ..common.schedules import lr_multiplier_1x as lr_multiplier
from ..common.schedules import optimizer
from ..common.schedules import train_1x as train

model = sssd(cascade_rcnn, train.max_iter, [60000, 80000])
train.clip_value = 1.0  # LGD clips gradients, plain Detectron2 does not
