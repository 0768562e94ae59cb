#!/usr/bin/env python
"""Writes the student of a training checkpoint as a stock model with its config.

    tools/export_student.py output/demo/model_final.pth --output output/student

Of a detector the folder then holds ``model.pth`` (weights only) and ``config.yaml`` (no key of
sssd): what Detectron2's own tools need for prediction, test-time augmentation, tracing or ONNX.
Where yacs has no name for the student (FCOS, and what comes from a LazyConfig), the config is
``lazy_config.yaml``, for LazyConfig.load and instantiate.

Of a classifier it holds ``model.pth``, a bare state dict that timm or torchvision loads, and
``config.json``: the network's name and arguments, the classes, how images are prepared, and under
"usage" the Python that loads it.
"""

import argparse

from sssd.engine import export_student, user_errors
from sssd.engine.trained_network import config_beside


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a .pth file written by training")
    parser.add_argument("--output", required=True, help="folder to write to")
    parser.add_argument(
        "--config-file",
        default="",
        help="config of the training; default: the one beside the checkpoint",
    )
    parser.add_argument(
        "--averaged",
        action="store_true",
        help="the averaged weights (MODEL.SSSD.AVERAGING.DECAY) instead of the last ones",
    )
    args = parser.parse_args()
    with user_errors():
        config_file = args.config_file or config_beside(args.checkpoint)
        written = export_student(args.checkpoint, config_file, args.output, args.averaged)
    print(f"wrote {args.output}/model.pth and {written}")


if __name__ == "__main__":
    main()
