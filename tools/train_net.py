#!/usr/bin/env python
"""Trains or evaluates a detector, plain or self-distilled, with Detectron2's own flags.

tools/train_net.py --config-file configs/BCCD/faster_rcnn_R_18_FPN_sssd.yaml
tools/train_net.py --config-file ... --resume
tools/train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/.../model_final.pth
"""

import sssd  # noqa: F401  (before Detectron2: it applies the compatibility layer)

# isort: split
import argparse

from detectron2.engine import default_argument_parser
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from sssd.engine import Trainer, launch_script, setup


def main(args: argparse.Namespace):
    cfg = setup(args)
    if args.eval_only:
        model = Trainer.load_for_evaluation(cfg, args.resume)
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results

    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    launch_script(main, default_argument_parser().parse_args())
