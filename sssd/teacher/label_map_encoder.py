"""LabelEnc's teacher (2007.03282): a network that turns label maps into a pyramid.

Not exported by ``sssd.teacher``, which needs torch only.

N: images, M: most objects in an image, P: classes that occur in the batch, C: pyramid width,
H, W: height and width of the network's padded input or of a level.
"""

import copy
import math
from collections.abc import Mapping, Sequence

from .. import _detectron2  # noqa: F401

# isort: split
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import FPN, Backbone, BottleneckBlock, ResNet
from fvcore.nn.weight_init import c2_xavier_fill
from torch import Tensor, nn

from .label_maps import LabelMaps, draw_label_maps, random_scales
from .objects import ObjectBatch

__all__ = ["LabelBlock", "LabelMapBackbone", "LabelMapTeacher", "fpn_state"]


class LabelBlock(BottleneckBlock):
    """Detectron2's bottleneck block as LabelEnc has it: biases and no normalisation.

    Detectron2's block (v0.6 and main) gives its convolutions no bias, whatever the norm, even
    none: then everything far from any object would be 0, in every channel and for good. As in
    LabelEnc's code, the shortcut has no bias, weights are uniform with variance 1 / fan-in
    (``c2_xavier_fill``) and biases are drawn as PyTorch does.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        """
        Args:
            in_channels, out_channels: widths; between them it is a quarter of the latter.
            stride: of the 3x3 convolution.
        """
        super().__init__(
            in_channels,
            out_channels,
            bottleneck_channels=max(out_channels // 4, 1),
            stride=stride,
            norm="",
        )
        for conv in (self.conv1, self.conv2, self.conv3):
            conv.bias = nn.Parameter(torch.empty(conv.out_channels))
            conv.reset_parameters()
        # Detectron2 (and LabelEnc) make one only where the width changes, and would then add maps
        # of different sizes.
        if self.shortcut is None and stride != 1:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
        for conv in self.children():
            nn.init.kaiming_uniform_(conv.weight, a=1)


class LabelMapBackbone(Backbone):
    """Label maps to maps with the names, widths and strides of the student's bottom-up.

    LabelEnc's label encoding function: a 7x7 convolution of stride 2 to 128 channels, then stages
    of bottleneck blocks, each of stride 2, with 1, 2, 2 and 1 blocks. As in LabelEnc's code there
    is no ReLU between the first convolution and the first block.

    Ours: the widths are the student's (LabelEnc has ResNet-50's for every student), and a stage
    below the finest that the student gives has half its width. And the first convolution starts
    with the same weights for any number of classes, variance 1 / 49: with PyTorch's, as in
    LabelEnc's code, an object of one of 80 classes moves the maps less than a tenth as far.
    """

    STEM_CHANNELS = 128
    NUM_BLOCKS = (1, 2, 2, 1)
    """Of the stages at strides 4, 8, 16 and 32; one block in those beyond."""

    def __init__(self, *, num_classes: int, shapes: Mapping[str, ShapeSpec]) -> None:
        """
        Args:
            num_classes: number of classes.
            shapes: name -> width and stride of each map to give.

        Raises:
            ValueError: when the strides are not distinct powers of two from 4 on.
        """
        super().__init__()
        self._out_features = list(shapes)
        self._out_feature_channels = {name: shape.channels for name, shape in shapes.items()}
        self._out_feature_strides = {name: shape.stride for name, shape in shapes.items()}
        widths = {shape.stride: shape.channels for shape in shapes.values()}
        strides = [2 ** (i + 2) for i in range(int(math.log2(max(widths))) - 1)]
        if len(widths) < len(shapes) or not set(widths) <= set(strides):
            found = ", ".join(f"{name}: {shape.stride}" for name, shape in shapes.items())
            raise ValueError(
                "The label map encoder halves its maps from stage to stage, from stride 4 on, and "
                f"cannot give maps of the strides {found}; use a backbone whose maps have strides "
                "of 4, 8, 16, ... pixels, each once."
            )
        for stride in reversed(strides):
            widths.setdefault(stride, max(widths.get(2 * stride, 0) // 2, 1))

        self.stem = nn.Conv2d(num_classes, self.STEM_CHANNELS, 7, stride=2, padding=3)
        # Few pixels are in objects of two classes, so the fan-in that matters is that of one.
        nn.init.kaiming_uniform_(self.stem.weight.detach().flatten(0, 1)[:, None], a=1)
        nn.init.zeros_(self.stem.bias)
        self.stages = nn.ModuleDict()
        in_channels = self.STEM_CHANNELS
        for i, stride in enumerate(strides):
            num_blocks = self.NUM_BLOCKS[i] if i < len(self.NUM_BLOCKS) else 1
            blocks = ResNet.make_stage(
                LabelBlock,
                num_blocks,
                in_channels=in_channels,
                out_channels=widths[stride],
                stride_per_block=[2] + [1] * (num_blocks - 1),
            )
            self.stages[f"stride{stride}"] = nn.Sequential(*blocks)
            in_channels = widths[stride]

    def forward(self, drawing: LabelMaps) -> dict[str, Tensor]:
        """
        Args:
            drawing: maps (N, P, H, W) and their classes (P,); one argument, because that is what
                Detectron2's FPN hands to its bottom-up.

        Returns:
            Name -> (N, width, ceil(H / stride), ceil(W / stride)).
        """
        # Channels of classes that do not occur are 0 and add nothing to the convolution.
        weight = self.stem.weight[:, drawing.classes]
        maps, bias = drawing.maps.to(weight.dtype), self.stem.bias
        x = F.conv2d(maps, weight, bias, self.stem.stride, self.stem.padding)
        by_stride = {}
        for name, stage in self.stages.items():
            x = by_stride[name] = stage(x)
        return {
            name: by_stride[f"stride{stride}"] for name, stride in self._out_feature_strides.items()
        }


class LabelMapTeacher(nn.Module):
    """LabelEnc's label encoding: label maps, a :class:`LabelMapBackbone` and an FPN.

    The FPN is built like the student's, with weights of its own that start anew. Unlike
    :class:`sssd.teacher.LabelEncodingTeacher` it never looks at the image: the student's maps are
    asked for their shapes only.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        fpn: FPN,
        levels: Sequence[str] = (),
        augment_scales: bool = False,
    ) -> None:
        """
        Args:
            num_classes: number of classes of the ground truth.
            fpn: the student's backbone, which is left as it is.
            levels: names of the pyramid levels that are taught; empty for all.
            augment_scales: in training, draw half of the objects paler (LabelEnc: in its first
                step, not in its second).

        Raises:
            ValueError: when the backbone is no FPN, its strides are none that the encoder can
                give, or it has no such level.
        """
        super().__init__()
        if not isinstance(fpn, FPN):
            raise ValueError(
                f"The student's backbone is a {type(fpn).__name__}, and the label map teacher "
                "copies Detectron2's FPN; use a student with one, such as MODEL.BACKBONE.NAME "
                '"build_resnet_fpn_backbone".'
            )
        shapes = fpn.output_shape()
        unknown = [level for level in levels if level not in shapes]
        if unknown:
            raise ValueError(
                f"The levels to teach include {', '.join(unknown)}, but the student's backbone "
                f"gives {', '.join(shapes)}; name levels among these."
            )
        strides = {level: shapes[level].stride for level in levels or shapes}
        self.num_classes = num_classes
        self.strides = dict(sorted(strides.items(), key=lambda item: item[1]))
        self.augment_scales = augment_scales
        self.fpn = _with_label_maps(fpn, num_classes)
        # Of its own: the student draws the same random numbers as without a teacher.
        self._seed = int(torch.randint(2**48, (), device="cpu"))
        self._num_draws = 0

    def forward(self, features: Mapping[str, Tensor], objects: ObjectBatch) -> dict[str, Tensor]:
        """
        Args:
            features: level -> (N, C, H, W), the student's pyramid; at least the taught levels.
            objects: the ground truth. It may be left on the CPU, which spares waiting for a GPU.

        Returns:
            Taught level -> (N, C, H, W).

        Raises:
            ValueError: when the student's maps have sizes that the FPN cannot give, or an image
                is larger than they say.
        """
        finest, stride = next(iter(self.strides.items()))
        height, width = (cells * stride for cells in features[finest].shape[-2:])
        divisor = self.fpn.size_divisibility or 1
        if height % divisor or width % divisor:
            raise ValueError(
                f"The student's level {finest!r} says that its input is {height} x {width} pixels "
                f"(height x width), and an FPN needs multiples of {divisor}; pad the student's "
                "input to the size_divisibility of its backbone."
            )
        scales = None
        if self.augment_scales and self.training:
            scales = random_scales(objects.valid.shape, self._next_generator())
        drawing = draw_label_maps(
            objects, (height, width), scales=scales, device=features[finest].device
        )
        maps = self.fpn(drawing)
        taught = {level: maps.pop(level) for level in self.strides}
        for level, x in taught.items():
            if x.shape != features[level].shape:
                raise ValueError(
                    f"The label maps of {len(drawing.maps)} images of {height} x {width} pixels "
                    f"become {tuple(x.shape)} on level {level!r}, where the student has "
                    f"{tuple(features[level].shape)}; the label map teacher needs a student with "
                    "the sizes of its FPN, and the objects of the same images."
                )
        # Whatever leads to other levels only is in the graph too: DistributedDataParallel waits
        # for a gradient of each parameter. One value is enough.
        for x in maps.values():
            taught[finest] = taught[finest] + 0.0 * x.flatten()[0]
        return taught

    def _next_generator(self) -> torch.Generator:
        self._num_draws += 1
        return torch.Generator().manual_seed(self._seed + self._num_draws)

    def get_extra_state(self) -> Tensor:
        """How often scales were drawn, and from which seed: a resumed run goes on where it was."""
        return torch.tensor([self._num_draws, self._seed])

    def set_extra_state(self, state: Tensor) -> None:
        self._num_draws, self._seed = state.tolist()


def fpn_state(teacher: LabelMapTeacher) -> dict[str, Tensor]:
    """The teacher's FPN without its bottom-up, under the names that the student's FPN has.

    LabelEnc's second step starts its student from it:
    ``student.backbone.load_state_dict(fpn_state(teacher), strict=False)``.
    """
    return {
        name: value
        for name, value in teacher.fpn.state_dict().items()
        if not name.startswith("bottom_up.")
    }


def _with_label_maps(fpn: FPN, num_classes: int) -> FPN:
    """A copy of the student's FPN, with weights of its own, on a :class:`LabelMapBackbone`."""
    names = [*fpn.in_features, getattr(fpn.top_block, "in_feature", None)]
    shapes = {name: x for name, x in fpn.bottom_up.output_shape().items() if name in names}
    bottom_up = LabelMapBackbone(num_classes=num_classes, shapes=shapes)
    # Neither the student's bottom-up is copied nor what others have hung on the pyramid.
    memo: dict[int, object] = {id(fpn.bottom_up): bottom_up}
    for hooks in (fpn._forward_hooks, fpn._forward_pre_hooks):
        memo[id(hooks)] = type(hooks)()
    copied = copy.deepcopy(fpn, memo)
    kept = set(bottom_up.modules())
    for module in copied.modules():
        if module not in kept:
            _reset(module)
    return copied.requires_grad_().train().to(next(fpn.parameters()).device)


@torch.no_grad()
def _reset(module: nn.Module) -> None:
    """Puts a module of an FPN, without its children, back to where Detectron2 starts it."""
    if isinstance(module, nn.Conv2d):
        c2_xavier_fill(module)
    elif hasattr(module, "reset_parameters"):
        module.reset_parameters()
    else:
        # Detectron2's FrozenBatchNorm2d and LayerNorm have no such method.
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        starts = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0}
        starts["running_var"] = 1.0 - getattr(module, "eps", 0.0)
        for name, tensor in tensors:
            if name in starts:
                tensor.fill_(starts[name])
