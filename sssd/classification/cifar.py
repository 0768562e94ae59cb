"""The CIFAR networks of the distillation literature, made of timm's blocks and registered in timm.

Importing this module adds to timm's registry:

- ``cifar_resnet{8,14,20,32,44,56,110}``: stem and three stages of 16, 16, 32, 64 channels
  (He et al., arXiv 1512.03385, section 4.2),
- ``cifar_resnet8x4``, ``cifar_resnet32x4``: the same with 32, 64, 128, 256 channels,
- ``cifar_wrn_{16_1,16_2,40_1,40_2,28_10}``: depth and width of the wide ResNets
  (Zagoruyko and Komodakis, arXiv 1605.07146).

Widths, depths, shortcuts and initialisation are those of RepDistiller (arXiv 1910.10699), whose
tables the literature compares with. Its shortcut is a 1x1 convolution wherever the width changes:
followed by BatchNorm in the ResNets, bare in the wide ones. He et al. pad with zeros instead
("option A"), which saves 2,752 parameters of a ``cifar_resnet20``.

Any image size works, grey 8x8 digits included, since the last map is pooled whatever its size.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import BatchNormAct2d, create_classifier, create_conv2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, downsample_conv
from timm.models.resnetv2 import DownsampleConv, PreActBasic
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CifarResNet", "CifarWideResNet"]

# name -> channels of the stem and of the three stages, blocks of each stage
_RESNETS = {
    **{f"cifar_resnet{6 * n + 2}": ((16, 16, 32, 64), n) for n in (1, 2, 3, 5, 7, 9, 18)},
    **{f"cifar_resnet{6 * n + 2}x4": ((32, 64, 128, 256), n) for n in (1, 5)},
}
_WIDE_RESNETS = {
    f"cifar_wrn_{6 * n + 4}_{k}": ((16, 16 * k, 32 * k, 64 * k), n)
    for n, k in ((2, 1), (2, 2), (6, 1), (6, 2), (4, 10))
}


class _CifarNetwork(nn.Module):
    """What both families share: timm's interface, around layers the subclass has made.

    Attributes:
        num_classes: number of logits; 0 for none, so that the network ends in the pooled feature.
        in_chans: channels of the images.
        num_features, head_hidden_size: channels of the last map, and of the pooled feature.
        feature_info: timm's list of the maps of stem and stages: their module, channels, stride.
    """

    _trunk: tuple[str, ...]  # the children that run one after the other up to the last map

    def _finish(
        self, stem: str, channels: Sequence[int], num_classes: int, in_chans: int, pool: str
    ) -> None:
        """Adds the classifier and the description timm asks for, and initialises all layers."""
        self.in_chans = in_chans
        self.num_features = channels[-1]
        self.feature_info = [
            {"num_chs": width, "reduction": reduction, "module": module}
            for width, reduction, module in zip(
                channels, (1, 1, 2, 4), (stem, "layer1", "layer2", "layer3"), strict=True
            )
        ]
        self.reset_classifier(num_classes, pool)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def get_classifier(self) -> nn.Module:
        """The linear layer that makes the logits."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a new one.

        Args:
            num_classes: number of logits; 0 for no classifier.
            global_pool: timm's name of a pooling ("avg", "max", ...); None keeps the present one.
        """
        if global_pool is None:
            global_pool = self.global_pool.pool_type
        self.num_classes = num_classes
        pool, classifier = create_classifier(self.num_features, num_classes, pool_type=global_pool)
        self.head_hidden_size = self.num_features * pool.feat_mult()
        weight = self.conv1.weight
        self.global_pool = pool.train(self.training)
        self.fc = classifier.to(weight.device, weight.dtype).train(self.training)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (N, in_chans, H, W) to the last map (N, num_features, ceil(H/4), ceil(W/4))."""
        for name in self._trunk:
            x = getattr(self, name)(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map to the logits (N, num_classes), or with ``pre_logits`` to the feature."""
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_chans, H, W) to logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))


class CifarResNet(_CifarNetwork):
    """ResNet for small images; the maps before each block's last ReLU are ``act2:input``."""

    _trunk = ("conv1", "bn1", "act1", "layer1", "layer2", "layer3")

    def __init__(
        self,
        channels: Sequence[int],
        blocks: int,
        *,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        """
        Args:
            channels: widths of the stem and of the three stages.
            blocks: blocks of each stage, two convolutions each.
            num_classes: number of logits.
            in_chans: channels of the images.
            global_pool: timm's name of a pooling.
            drop_rate: probability of dropping an element of the pooled feature, in training.
        """
        super().__init__()
        self.drop_rate = drop_rate
        self.conv1 = create_conv2d(in_chans, channels[0], 3)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.act1 = nn.ReLU(inplace=True)
        for stage, (width_in, width) in enumerate(pairwise(channels)):
            stride = 1 if stage == 0 else 2
            shortcut = None
            if stride != 1 or width_in != width:
                shortcut = downsample_conv(width_in, width, kernel_size=1, stride=stride)
            first = BasicBlock(width_in, width, stride, shortcut)
            others = (BasicBlock(width, width) for _ in range(blocks - 1))
            self.add_module(f"layer{stage + 1}", nn.Sequential(first, *others))
        self._finish("act1", channels, num_classes, in_chans, global_pool)


class CifarWideResNet(_CifarNetwork):
    """Wide ResNet: normalisation and ReLU before the convolutions.

    The outputs of ``layer1`` to ``layer3`` have had neither (they can be negative). The same maps
    normalised are ``layer2.0.norm1``, ``layer3.0.norm1`` and ``norm``; before the ReLU, those
    names with ``.act:input``.
    """

    _trunk = ("conv1", "layer1", "layer2", "layer3", "norm")

    def __init__(
        self,
        channels: Sequence[int],
        blocks: int,
        *,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        """
        Args:
            channels: widths of the stem and of the three stages.
            blocks: blocks of each stage, two convolutions each.
            num_classes: number of logits.
            in_chans: channels of the images.
            global_pool: timm's name of a pooling.
            drop_rate: probability of dropping an element of the pooled feature, in training (none
                is dropped between the convolutions of a block, as in RepDistiller).
        """
        super().__init__()
        self.drop_rate = drop_rate
        self.conv1 = create_conv2d(in_chans, channels[0], 3)
        block = partial(
            PreActBasic,
            conv_layer=create_conv2d,
            norm_layer=BatchNormAct2d,
            proj_layer=DownsampleConv,
        )
        for stage, (width_in, width) in enumerate(pairwise(channels)):
            first = block(width_in, width, stride=1 if stage == 0 else 2)
            others = (block(width, width) for _ in range(blocks - 1))
            self.add_module(f"layer{stage + 1}", nn.Sequential(first, *others))
        self.norm = BatchNormAct2d(channels[-1])
        self._finish("conv1", channels, num_classes, in_chans, global_pool)
        if num_classes:
            with torch.no_grad():
                self.fc.bias.zero_()


# What timm's tools read about each network. There are no pretrained weights to download.
default_cfgs = generate_default_cfgs(
    {
        name: {
            "input_size": (3, 32, 32),
            "num_classes": 100,
            "pool_size": (8, 8),
            "crop_pct": 1.0,
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "conv1",
            "classifier": "fc",
        }
        for name in (*_RESNETS, *_WIDE_RESNETS)
    }
)


def _register(name: str, network: type[_CifarNetwork], channels: Sequence[int], n: int) -> None:
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_model_with_cfg(
            partial(network, channels, n),
            name,
            pretrained,
            feature_cfg={"out_indices": (0, 1, 2, 3)},
            **kwargs,
        )

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{network.__name__} with {n} blocks a stage and channels {channels}."
    globals()[name] = register_model(build)  # which adds the name to __all__


for _name, (_channels, _n) in _RESNETS.items():
    _register(_name, CifarResNet, _channels, _n)
for _name, (_channels, _n) in _WIDE_RESNETS.items():
    _register(_name, CifarWideResNet, _channels, _n)
