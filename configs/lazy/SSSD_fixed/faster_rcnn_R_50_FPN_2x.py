from ..common.data import dataloader
from ..common.methods import sssd_fixed
from ..common.models import faster_rcnn
from ..common.schedules import lr_multiplier_2x as lr_multiplier
from ..common.schedules import optimizer
from ..common.schedules import train_2x as train

model = sssd_fixed(faster_rcnn, train.max_iter, [120000, 160000])
train.clip_value = 1.0  # LGD clips gradients, plain Detectron2 does not
