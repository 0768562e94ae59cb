from ..common.data import dataloader
from ..common.methods import labelenc_step1
from ..common.models import faster_rcnn
from ..common.schedules import lr_multiplier_2x as lr_multiplier
from ..common.schedules import optimizer
from ..common.schedules import train_2x as train

model = labelenc_step1(faster_rcnn, train, lr_multiplier)
train.output_dir = "output/labelenc_faster_rcnn_R_50_FPN_2x_step1"
