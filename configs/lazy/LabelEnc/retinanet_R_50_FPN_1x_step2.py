from ..common.data import dataloader
from ..common.methods import labelenc_step2
from ..common.models import retinanet
from ..common.schedules import lr_multiplier_1x as lr_multiplier
from ..common.schedules import optimizer
from ..common.schedules import train_1x as train

model = labelenc_step2(retinanet, train, lr_multiplier)
train.output_dir = "output/labelenc_retinanet_R_50_FPN_1x_step2"
train.first_step = "output/labelenc_retinanet_R_50_FPN_1x_step1/model_final.pth"
optimizer.lr = 0.01
