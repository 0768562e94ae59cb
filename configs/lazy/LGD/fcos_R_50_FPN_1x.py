from ..common.data import dataloader
from ..common.methods import lgd
from ..common.models import fcos
from ..common.schedules import lr_multiplier_1x as lr_multiplier
from ..common.schedules import optimizer
from ..common.schedules import train_1x as train

model = lgd(fcos, train.max_iter, [60000, 80000], detach_appearance=False)
optimizer.lr = 0.01
train.clip_value = 1.0  # LGD clips gradients, plain Detectron2 does not
