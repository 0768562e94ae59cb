from ..common.data import dataloader
from ..common.methods import labelenc_step2
from ..common.models import fcos
from ..common.schedules import lr_multiplier_2x as lr_multiplier
from ..common.schedules import optimizer
from ..common.schedules import train_2x as train

model = labelenc_step2(fcos, train, lr_multiplier)
train.output_dir = "output/labelenc_fcos_R_50_FPN_2x_step2"
train.first_step = "output/labelenc_fcos_R_50_FPN_2x_step1/model_final.pth"
optimizer.lr = 0.01
