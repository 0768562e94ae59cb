#!/usr/bin/env python
"""LabelEnc: trains step 1 and then step 2, or one of them, with Detectron2's own flags.

tools/train_labelenc.py --config-file configs/LabelEnc/retinanet_R_50_FPN_1x.yaml
tools/train_labelenc.py --config-file ... --resume
tools/train_labelenc.py --step 2 --config-file ... MODEL.SSSD.TEACHER.WEIGHTS .../model_final.pth

The detector is OUTPUT_DIR/step2/model_final.pth, a stock one: evaluate it with tools/train_net.py
and the plain config.
"""

import sssd  # noqa: F401  (before Detectron2: it applies the compatibility layer)

# isort: split
import argparse
import os
import subprocess
import sys

from detectron2.engine import default_argument_parser

from sssd.engine import Trainer, labelenc_step, launch_script, load_config, setup, user_errors


def main(args: argparse.Namespace) -> None:
    cfg = setup(args, lambda cfg: labelenc_step(cfg, args.step))
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()


def run_both(args: argparse.Namespace) -> int:
    """Each step in a process of its own; with --resume, a step 1 that is complete is skipped."""
    folder = labelenc_step(load_config(args.config_file, args.opts), 1).OUTPUT_DIR
    for step in (1, 2):
        if step == 1 and args.resume and os.path.isfile(os.path.join(folder, "model_final.pth")):
            continue
        command = [sys.executable, sys.argv[0], "--step", str(step), *sys.argv[1:]]
        status = subprocess.run(command).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    parser = default_argument_parser()
    parser.add_argument("--step", type=int, choices=(1, 2), help="one step alone")
    args = parser.parse_args()
    if args.step is not None:
        launch_script(main, args)
    else:
        with user_errors():
            sys.exit(run_both(args))
