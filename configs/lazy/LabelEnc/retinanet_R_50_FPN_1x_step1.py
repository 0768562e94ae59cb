from ..common.data import dataloader
from ..common.methods import labelenc_step1
from ..common.models import retinanet
from ..common.schedules import lr_multiplier_1x as lr_multiplier
from ..common.schedules import optimizer
from ..common.schedules import train_1x as train

model = labelenc_step1(retinanet, train, lr_multiplier)
train.output_dir = "output/labelenc_retinanet_R_50_FPN_1x_step1"
optimizer.lr = 0.01
