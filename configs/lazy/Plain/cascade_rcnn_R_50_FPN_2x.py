from ..common.data import dataloader
from ..common.models import cascade_rcnn as model
from ..common.schedules import lr_multiplier_2x as lr_multiplier
from ..common.schedules import optimizer
from ..common.schedules import train_2x as train
