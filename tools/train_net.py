#!/usr/bin/env python
"""Trains or evaluates a detector or a classifier, plain or distilled, with Detectron2's own flags.

tools/train_net.py --config-file configs/BCCD/faster_rcnn_R_18_FPN_sssd.yaml
tools/train_net.py --config-file ... --resume
tools/train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/.../model_final.pth
tools/train_net.py --config-file configs/Classification/kd_cifar_resnet8_digits.yaml

A classification method of several stages or generations runs from the first to the last; --resume
goes on in the middle of any.
"""

import sssd  # noqa: F401  (before Detectron2: it applies the compatibility layer)

# isort: split
import argparse

from detectron2.evaluation import verify_results
from detectron2.utils import comm

from sssd.engine import (
    ClassificationTrainer,
    Trainer,
    argument_parser,
    last_stage,
    launch_script,
    run_stages,
    setup,
)


def main(args: argparse.Namespace):
    cfg = setup(args)
    classifies = cfg.MODEL.META_ARCHITECTURE == "ClassificationDistiller"
    if args.eval_only:
        trainer = Trainer
        if classifies:
            trainer, cfg = ClassificationTrainer, last_stage(cfg)
        model = trainer.load_for_evaluation(cfg, args.resume)
        results = trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results

    if classifies:
        return run_stages(cfg, args.resume)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    launch_script(main, argument_parser().parse_args())
