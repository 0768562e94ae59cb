#!/usr/bin/env python
"""Finds the coefficient that makes distillation a chosen share of the total loss.

    tools/calibrate.py --config-file configs/BCCD/faster_rcnn_R_18_FPN_sssd.yaml
    tools/calibrate.py --config-file ... --share 0.5 --iterations 300
    tools/calibrate.py --config-file ... --search binary

Trains a few times from the start for --iterations, and keeps nothing but what it prints: the line
to put into the config. Without --share the target is the share that LGD's distance has, with its
coefficient 1, in the same training: the paper's procedure (there 45 %, and so 50 for SSSD).
"""

import sssd  # noqa: F401  (before Detectron2: it applies the compatibility layer)

# isort: split
import argparse
import tempfile

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm

from sssd.engine import argument_parser, launch_script, load_config
from sssd.engine.calibration import binary_search, closed_form, lgd_setting, measure
from sssd.engine.config_check import check_values


def main(args: argparse.Namespace) -> None:
    cfg = load_config(args.config_file, args.opts)
    check_values(cfg)
    with tempfile.TemporaryDirectory() as folder:  # for the log, which nobody needs
        cfg.OUTPUT_DIR = folder
        default_setup(cfg, args)
        calibrate(cfg, args)


def calibrate(cfg: CfgNode, args: argparse.Namespace) -> None:
    iterations = args.iterations or min(1000, cfg.SOLVER.MAX_ITER)
    share = args.share
    if share is None:
        share = measure(lgd_setting(cfg), 1.0, iterations).share
        say(f"LGD's distance, coefficient 1: {share:.1%} of the total loss")
    values = list(cfg.MODEL.SSSD.COEFFICIENT.VALUES)
    if args.search == "binary":
        runs = binary_search(cfg, share, iterations, tolerance=args.tolerance)
    else:
        start = values[0] or 50.0
        runs = closed_form(cfg, share, iterations, start=start, tolerance=args.tolerance)
    for run in runs:
        say(f"coefficient {run.coefficient:.4g}: {run.share:.1%} (wanted {share:.1%})")
    say(f"\nMean share over the first {iterations} iterations. For the config:\n")
    for line in config_lines(cfg, run.coefficient):
        say(line)


def config_lines(cfg: CfgNode, coefficient: float) -> list[str]:
    """The schedule with this value as its first, and the others in proportion; a constant one where
    that cannot be (bounds of a share, a schedule that begins with 0)."""
    key, values = "MODEL.SSSD.COEFFICIENT", cfg.MODEL.SSSD.COEFFICIENT.VALUES
    if cfg.MODEL.SSSD.COEFFICIENT.SCHEDULE == "share" or not values[0]:
        return [f"{key}.SCHEDULE constant", f"{key}.VALUES [{coefficient:.4g}]"]
    scaled = ", ".join(f"{coefficient * value / values[0]:.4g}" for value in values)
    return [f"{key}.VALUES [{scaled}]"]


def say(text: str) -> None:
    if comm.is_main_process():
        print(text, flush=True)


def share(text: str) -> float:
    value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is no share: give one such as 0.45 or 45%")
    return value


def parser() -> argparse.ArgumentParser:
    parser = argument_parser()
    parser.description = __doc__.splitlines()[0]
    parser.add_argument("--share", type=share, help="of the total loss (default: LGD's)")
    parser.add_argument(
        "--iterations", type=int, help="of each short run (1000, or SOLVER.MAX_ITER if less)"
    )
    parser.add_argument(
        "--search", choices=("closed", "binary"), default="closed",
        help="closed form from the losses, checked by a run; or the paper's halving of [1, 100]",
    )  # fmt: skip
    parser.add_argument(
        "--tolerance", type=float, default=0.005, help="of the share (0.005: half a point)"
    )
    return parser


if __name__ == "__main__":
    launch_script(main, parser().parse_args())
