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
import signal
import subprocess
import sys

from sssd.engine import (
    Trainer,
    argument_parser,
    labelenc_step,
    launch_script,
    load_config,
    setup,
    signals_passed_on,
    user_errors,
)


def main(args: argparse.Namespace) -> None:
    cfg = setup(args, lambda cfg: labelenc_step(cfg, args.step))
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()


def run_both(args: argparse.Namespace) -> int:
    """Each step in a process of its own; with --resume, a step 1 that is complete is skipped.

    SIGTERM, and the end of the time, go to the step that runs.
    """
    folder = labelenc_step(load_config(args.config_file, args.opts), 1).OUTPUT_DIR
    processes: list[subprocess.Popen] = []
    with signals_passed_on(processes):
        signal.setitimer(signal.ITIMER_REAL, args.time_limit or 0)
        for step in (1, 2):
            done = os.path.isfile(os.path.join(folder, "model_final.pth"))
            if step == 1 and args.resume and done:
                continue
            command = [sys.executable, sys.argv[0], "--step", str(step), *sys.argv[1:]]
            processes[:] = [subprocess.Popen(command)]
            status = processes[0].wait()
            if status:
                return status
    return 0


if __name__ == "__main__":
    parser = argument_parser()
    parser.add_argument("--step", type=int, choices=(1, 2), help="one step alone")
    args = parser.parse_args()
    if args.eval_only:
        parser.error(
            "--eval-only is of tools/train_net.py, with the plain config and MODEL.WEIGHTS "
            ".../step2/model_final.pth"
        )
    if args.step is not None:
        launch_script(main, args)
    else:
        with user_errors():
            sys.exit(run_both(args))
