"""A Detectron2 project with yacs configs. Self-distillation adds the lines that are marked.

yacs_project.py CONFIG_FILE ANNOTATIONS IMAGES [KEY VALUE ...]
"""

import os
import sys

import sssd  # <- 1

# isort: split
from detectron2.config import get_cfg
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer


def main(config_file, annotations, images, *opts):
    register_coco_instances("project_train", {}, annotations, images)
    cfg = get_cfg()
    sssd.add_sssd_config(cfg)  # <- 2
    cfg.merge_from_file(config_file)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("project_train",), ()
    cfg.MODEL.SSSD.STUDENT = cfg.MODEL.META_ARCHITECTURE  # <- 3
    cfg.MODEL.META_ARCHITECTURE = "SelfDistiller"  # <- 4
    cfg.MODEL.SSSD.PHASES.SCALE_TO_MAX_ITER = True  # <- 5
    cfg.merge_from_list(list(opts))
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
