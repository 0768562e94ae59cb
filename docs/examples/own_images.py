"""Distillation on folders of images, with a network of one's own as the student.

own_images.py TRAIN_FOLDER VAL_FOLDER --config-file docs/examples/own_images.yaml [KEY VALUE ...]

Each of the two folders has a folder of images for each class.
"""

import sssd  # noqa: F401  (before Detectron2: it applies the compatibility layer)

# isort: split
import sys

from timm.models import register_model
from torch import Tensor, nn

from sssd.data import register_image_folder
from sssd.engine import argument_parser, launch_script, run_stages, setup


def _stage(width_in: int, width: int) -> nn.Sequential:
    convolution = nn.Conv2d(width_in, width, 3, stride=2, padding=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())


class SmallNet(nn.Module):
    """Two convolutions and a classifier: images (B, C, H, W) to logits (B, K)."""

    def __init__(self, num_classes: int, in_chans: int, width: int) -> None:
        super().__init__()
        self.stage1 = _stage(in_chans, width)
        self.stage2 = _stage(width, 2 * width)
        self.fc = nn.Linear(2 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.stage2(self.stage1(images)).mean((2, 3)))


# Now a config may name it; MODEL.SSSD.CLASSIFIER.NETWORK_OPTIONS holds what follows in_chans.
@register_model
def small_net(pretrained=False, *, num_classes, in_chans, width=32, **timm_options):
    return SmallNet(num_classes, in_chans, width)


def main(args):
    register_image_folder("own_train", args.train_folder)
    register_image_folder("own_val", args.val_folder)
    return run_stages(setup(args), args.resume)


if __name__ == "__main__":
    # The two folders come first; the rest is Detectron2's.
    train_folder, val_folder, *rest = sys.argv[1:]
    args = argument_parser().parse_args(rest)
    args.train_folder, args.val_folder = train_folder, val_folder
    launch_script(main, args)
