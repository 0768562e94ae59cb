#!/usr/bin/env python
"""Writes the student of a training checkpoint as a stock Detectron2 model and config.

    tools/export_student.py output/demo/sssd/model_final.pth --output output/student

The folder then holds ``model.pth`` (weights only) and ``config.yaml`` (no key of sssd): what
Detectron2's own tools need for prediction, test-time augmentation, tracing or ONNX. Where yacs
has no name for the student (FCOS, and what comes from a LazyConfig), the config is
``lazy_config.yaml``, for LazyConfig.load and instantiate.
"""

import argparse
import sys
from pathlib import Path

from sssd.engine import CheckpointError, export_student


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a .pth file written by training")
    parser.add_argument("--output", required=True, help="folder to write to")
    parser.add_argument(
        "--config-file",
        default="",
        help="config of the training; default: config.yaml beside the checkpoint",
    )
    args = parser.parse_args()
    config_file = args.config_file or str(Path(args.checkpoint).parent / "config.yaml")
    try:
        written = export_student(args.checkpoint, config_file, args.output)
    except (CheckpointError, FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {args.output}/model.pth and {written}")


if __name__ == "__main__":
    main()
