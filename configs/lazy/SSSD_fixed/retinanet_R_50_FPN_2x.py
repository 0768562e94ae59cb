from ..common.data import dataloader
from ..common.methods import sssd_fixed
from ..common.models import retinanet
from ..common.schedules import lr_multiplier_2x as lr_multiplier
from ..common.schedules import optimizer
from ..common.schedules import train_2x as train

model = sssd_fixed(
    retinanet, train.max_iter, [120000, 160000], add_context_box=True, detach_appearance=False
)
optimizer.lr = 0.01
train.clip_value = 1.0  # LGD clips gradients, plain Detectron2 does not
