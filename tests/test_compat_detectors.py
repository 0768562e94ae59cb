"""The shims that concern single detectors: FCOS without objects, deformable convolutions.

Positions in a map are (y, x), counted from the centre of its first cell.
"""

import copy
import inspect
from itertools import product
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import DeformConv, ModulatedDeformConv, ShapeSpec
from detectron2.layers import deform_conv as module
from detectron2.modeling import build_backbone
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

import sssd_compat

from .detectors import training_input
from .test_compat import run, write_package

NUM_CLASSES = 3


def needs(name: str) -> pytest.MarkDecorator:
    needed = name in sssd_compat.apply()
    return pytest.mark.skipif(not needed, reason=f"this Detectron2 does not need {name!r}")


# --- FCOS on images without objects --------------------------------------------------------


@pytest.fixture(scope="module")
def fcos() -> FCOS:
    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res4", "res5"]
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    torch.manual_seed(0)
    head = FCOSHead(
        input_shape=[ShapeSpec(channels=16)] * 3, num_classes=NUM_CLASSES, conv_dims=[16]
    )
    return FCOS(
        backbone=build_backbone(cfg),
        head=head,
        num_classes=NUM_CLASSES,
        pixel_mean=[120.0] * 3,
        pixel_std=[60.0] * 3,
    )


@pytest.fixture(scope="module")
def anchors(fcos) -> list[Boxes]:
    strides = [shape.stride for shape in fcos.backbone.output_shape().values()]
    maps = [torch.zeros(1, 16, 64 // stride, 96 // stride) for stride in strides]
    return fcos.anchor_generator(maps)


def boxes_tensor(boxes: Boxes | torch.Tensor) -> torch.Tensor:
    """v0.6 keeps the matched boxes of an image as Boxes, main as their tensor."""
    return boxes.tensor if isinstance(boxes, Boxes) else boxes


@pytest.mark.parametrize("counts", [(0, 3, 0, 1), (0, 0), (0,)])
def test_images_without_objects_are_background(fcos, anchors, counts):
    images = [training_input(count, seed=i)["instances"] for i, count in enumerate(counts)]
    labels, boxes = fcos.label_anchors(anchors, images)
    assert len(labels) == len(boxes) == len(counts)
    total = sum(len(level) for level in anchors)
    for image, of_image, matched in zip(images, labels, boxes, strict=True):
        assert of_image.dtype == torch.int64 and of_image.shape == (total,)
        if len(image):  # as if the image were alone
            alone, alone_boxes = fcos.label_anchors(anchors, [image])
            assert torch.equal(of_image, alone[0]) and (of_image < NUM_CLASSES).any()
            assert torch.equal(boxes_tensor(matched), boxes_tensor(alone_boxes[0]))
        else:
            assert (of_image == NUM_CLASSES).all()
            assert torch.equal(boxes_tensor(matched), torch.zeros(total, 4))


@needs("fcos-empty-images")
def test_images_with_objects_are_labelled_as_before(fcos, anchors):
    original = inspect.unwrap(FCOS.label_anchors)
    images = [training_input(count, seed=count)["instances"] for count in (3, 1, 8)]
    with torch.no_grad():
        before, before_boxes = original(fcos, anchors, images)
        labels, boxes = fcos.label_anchors(anchors, images)
    for i in range(len(images)):
        assert torch.equal(labels[i], before[i])
        assert isinstance(boxes[i], Boxes) and torch.equal(boxes[i].tensor, before_boxes[i].tensor)
    with pytest.raises(IndexError), torch.no_grad():  # what the shim is for
        original(fcos, anchors, [training_input(0)["instances"]])


@pytest.mark.parametrize("counts", [(0, 0), (2, 0)])
def test_fcos_trains_on_images_without_objects(fcos, counts):
    fcos.train().zero_grad()
    with EventStorage():
        losses = fcos([training_input(count, seed=i) for i, count in enumerate(counts)])
        sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values()), losses
    assert losses["loss_fcos_cls"] > 0
    if not any(counts):
        assert losses["loss_fcos_loc"] == losses["loss_fcos_ctr"] == 0
    for name, parameter in fcos.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fcos_trains_under_autocast(fcos, dtype):
    fcos.train()
    inputs = [training_input(3, seed=i) for i in range(2)]
    with EventStorage():  # the other one keeps its average of positive anchors
        expected = copy.deepcopy(fcos)(inputs)
    with EventStorage(), torch.autocast("cpu", dtype):
        losses = fcos(inputs)
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expected[name].item(), rel=0.05), name


@needs("giou-mixed-precision")
def test_the_giou_loss_of_two_precisions_is_that_of_the_higher():
    from detectron2.modeling import box_regression

    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0]] * 2), torch.tensor([[0.0, 0.0, 1.0, 2.0]] * 2)
    # Half of the area in common, no gap: 1 - 1/2, of both boxes.
    for first in (boxes[0], boxes[0].bfloat16()):
        loss = box_regression.giou_loss(first, boxes[1])
        assert loss.dtype == torch.float32 and loss.tolist() == pytest.approx([0.5, 0.5], abs=1e-6)
    double = box_regression.giou_loss(*(x.double() for x in boxes))
    assert double.dtype == torch.float64 and double.tolist() == pytest.approx([0.5, 0.5], abs=1e-6)


# --- deformable convolutions ---------------------------------------------------------------

deformable = needs("deformable-convolution")


@deformable
def test_bilinear_interpolation_by_hand():
    """One kernel position, weight 1: the output is the map read at (y, x) + offset.

    The map is      so that at (y, x) it is 1 + x + 3 y inside; outside it is 0:
        1 2 3
        4 5 6       (0, 0) + (0.5, 0.25)  ->  1 + 0.25 + 3 * 0.5  =  2.75
                    (0, 1) + (0.25, 0.5)  ->  1 + 1.5 + 3 * 0.25  =  3.25
                    (0, 2) + (0, 0.5)     ->  half way from 3 to outside  =  1.5
                    (1, 0) + (0.25, 0)    ->  a quarter from 4 to outside  =  3
                    (1, 1) + (0, -2.25)   ->  more than one cell outside  =  0
                    (1, 2) + (-0.5, 0.5)  ->  (3 + 6 + 0 + 0) / 4  =  2.25
    """
    image = torch.tensor([[[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]])
    y = torch.tensor([[0.5, 0.25, 0.0], [0.25, 0.0, -0.5]])
    x = torch.tensor([[0.25, 0.5, 0.5], [0.0, -2.25, 0.5]])
    offset = torch.stack([y, x])[None]
    expected = torch.tensor([[[[2.75, 3.25, 1.5], [3.0, 0.0, 2.25]]]])
    weight = torch.ones(1, 1, 1, 1)
    assert torch.equal(module.deform_conv(image, offset, weight), expected)
    # The mask scales what is read, and the bias is added after it.
    mask = torch.tensor([[[[0.0, 1.0, 2.0], [0.5, 1.0, 4.0]]]])
    output = module.modulated_deform_conv(image, offset, mask, weight, torch.tensor([10.0]))
    assert torch.equal(output, torch.tensor([[[[10.0, 13.25, 13.0], [11.5, 10.0, 19.0]]]]))


@deformable
def test_channels_of_the_offsets_by_hand():
    """A 1 x 2 kernel and two deformable groups: group, kernel position, y before x.

    Both channels of the input are the map of the case above; only the cell (0, 0) is computed.
    """
    image = torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]).repeat(1, 2, 1, 1)
    weight = torch.tensor([[[[1.0, 10.0]], [[100.0, 1000.0]]]])
    offset = torch.zeros(1, 8, 2, 2)
    offset[0, :, 0, 0] = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 2.0, 1.0, -1.0])
    # Group 0 reads (0, 0) + (1, 0) = 4 and (0, 1) + (0, 1) = 3; group 1 reads (0, 0) + (0, 2) = 3
    # and (0, 1) + (1, -1) = 4.
    output = module.deform_conv(image, offset, weight, 1, 0, 1, 1, 2)
    assert output[0, 0, 0, 0] == 4 + 10 * 3 + 100 * 3 + 1000 * 4
    mask = torch.ones(1, 4, 2, 2)
    mask[0, :, 0, 0] = torch.tensor([1.0, 2.0, 3.0, 0.0])
    output = module.modulated_deform_conv(image, offset, mask, weight, None, 1, 0, 1, 1, 2)
    assert output[0, 0, 0, 0] == 1 * 4 + 2 * 10 * 3 + 3 * 100 * 3


@deformable
@pytest.mark.parametrize(
    "stride, padding, dilation, groups, deformable_groups",
    [(1, 0, 1, 1, 1), (2, 1, 1, 1, 1), (1, 2, 2, 1, 1), (2, 2, 2, 2, 1), (1, 1, 1, 2, 4)],
)
def test_without_offsets_it_is_a_convolution(stride, padding, dilation, groups, deformable_groups):
    torch.manual_seed(0)
    settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    plain = DeformConv(4, 6, 3, **settings, deformable_groups=deformable_groups)
    modulated = ModulatedDeformConv(4, 6, 3, **settings, deformable_groups=deformable_groups)
    torch.nn.init.normal_(modulated.bias)
    image = torch.randn(2, 4, 7, 9)
    expected = torch.nn.functional.conv2d(image, plain.weight, **settings)
    size = expected.shape[2:]
    offset = torch.zeros(2, 18 * deformable_groups, *size)
    torch.testing.assert_close(plain(image, offset), expected)

    mask = torch.ones(2, 9 * deformable_groups, *size)
    expected = torch.nn.functional.conv2d(image, modulated.weight, modulated.bias, **settings)
    torch.testing.assert_close(modulated(image, offset, mask), expected)
    half = modulated(image, offset, 0.5 * mask) - modulated.bias.view(1, -1, 1, 1)
    whole = expected - modulated.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(half, 0.5 * whole)


@deformable
def test_whole_offsets_shift_the_map():
    torch.manual_seed(0)
    conv = DeformConv(2, 3, 3, padding=1)
    image = torch.randn(1, 2, 8, 8)
    for dy, dx in product((-1, 0, 2), (-2, 0, 1)):
        offset = torch.tensor([dy, dx] * 9).float().view(1, 18, 1, 1).expand(1, 18, 8, 8)
        shifted = torch.zeros_like(image)
        for y, x in product(range(8), range(8)):
            if 0 <= y + dy < 8 and 0 <= x + dx < 8:
                shifted[..., y, x] = image[..., y + dy, x + dx]
        # The inside, where no kernel reaches over a border of the shifted map.
        expected = conv(shifted, torch.zeros(1, 18, 8, 8))[..., 3:5, 3:5]
        torch.testing.assert_close(conv(image, offset)[..., 3:5, 3:5], expected)


@deformable
def test_gradients():
    torch.manual_seed(0)
    generated = {
        "input": torch.randn(2, 4, 4, 5),
        # Away from the kinks of the interpolation, which lie at whole positions.
        "offset": torch.randint(-1, 2, (2, 36, 2, 3)) + 0.2 + 0.6 * torch.rand(2, 36, 2, 3),
        "mask": torch.rand(2, 18, 2, 3),
        "weight": torch.randn(2, 2, 3, 3),
        "bias": torch.randn(2),
    }
    x, offset, mask, weight, bias = (t.double().requires_grad_() for t in generated.values())
    settings = (2, 1, 1, 2, 2)
    assert torch.autograd.gradcheck(
        lambda *t: module.modulated_deform_conv(*t, *settings), (x, offset, mask, weight, bias)
    )
    assert torch.autograd.gradcheck(
        lambda *t: module.deform_conv(*t, *settings), (x, offset, weight)
    )


@deformable
def test_parameters_and_defaults():
    plain, modulated = DeformConv(4, 6, 3, groups=2), ModulatedDeformConv(4, 6, (3, 1))
    assert {k: v.shape for k, v in plain.state_dict().items()} == {"weight": (6, 2, 3, 3)}
    state = {k: v.shape for k, v in modulated.state_dict().items()}
    assert state == {"weight": (6, 4, 3, 1), "bias": (6,)}
    assert list(ModulatedDeformConv(4, 6, 3, bias=False).state_dict()) == ["weight"]
    assert plain.bias is None and (modulated.bias == 0).all()
    for conv in (plain, modulated):
        assert type(conv).__module__ == "detectron2.layers.deform_conv"
        assert conv.deformable_groups == 1 and conv.norm is None and conv.activation is None
    with pytest.raises(AssertionError):
        DeformConv(4, 6, 3, bias=True)


@deformable
def test_norm_activation_and_empty_batch():
    norm = torch.nn.BatchNorm2d(2)
    conv = DeformConv(1, 2, 3, stride=2, norm=norm, activation=torch.nn.functional.relu)
    image, offset = torch.randn(2, 1, 7, 9), torch.zeros(2, 18, 3, 4)
    expected = torch.relu(norm(torch.nn.functional.conv2d(image, conv.weight, stride=2)))
    torch.testing.assert_close(conv(image, offset), expected)
    empty = torch.zeros(0, 1, 7, 9, requires_grad=True)
    output = conv(empty, offset[:0])
    assert output.shape == (0, 2, 3, 4)
    output.sum().backward()
    assert empty.grad.shape == empty.shape


@deformable
def test_mixed_precision():
    """The result has the type of the input and the accuracy of float32."""
    torch.manual_seed(0)
    conv = ModulatedDeformConv(4, 4, 3, padding=1)
    image, offset = torch.randn(1, 4, 6, 6).bfloat16(), torch.randn(1, 18, 6, 6)
    mask = torch.rand(1, 9, 6, 6)
    expected = conv(image.float(), offset, mask).bfloat16()
    assert torch.equal(conv(image, offset, mask), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        offset_conv = torch.nn.Conv2d(4, 27, 3, padding=1)
        predicted = offset_conv(image.float())
        assert predicted.dtype == torch.bfloat16
        output = conv(image, predicted[:, :18], predicted[:, 18:].float().sigmoid())
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    for parameter in (*offset_conv.parameters(), *conv.parameters()):
        assert parameter.grad.dtype == torch.float32 and parameter.grad.abs().sum() > 0


@deformable
def test_wrong_shapes_are_named():
    conv = DeformConv(4, 4, 3, padding=1)
    with pytest.raises(ValueError, match=r"The offset .* \(1, 36, 6, 6\).* and 18 channels\.$"):
        conv(torch.zeros(1, 4, 6, 6), torch.zeros(1, 36, 6, 6))
    with pytest.raises(ValueError, match=r"The input .* \(1, 8, 6, 6\).* and 4 channels\.$"):
        conv(torch.zeros(1, 8, 6, 6), torch.zeros(1, 18, 6, 6))
    with pytest.raises(ValueError, match=r"The input .* need 4 dimensions"):
        conv(torch.zeros(4, 6, 6), torch.zeros(18, 6, 6))


@deformable
@pytest.mark.parametrize("modulated, groups", [(False, 1), (True, 2)])
def test_resnet_with_deformable_stages_trains(modulated, groups):
    cfg = get_cfg()
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 8
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 8
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 16
    cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False, False, True, True]
    cfg.MODEL.RESNETS.DEFORM_MODULATED = modulated
    cfg.MODEL.RESNETS.DEFORM_NUM_GROUPS = groups
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    torch.manual_seed(0)
    backbone = build_backbone(cfg)
    blocks = {name for name, m in backbone.named_modules() if hasattr(m, "conv2_offset")}
    assert blocks == {f"res4.{i}" for i in range(6)} | {f"res5.{i}" for i in range(3)}
    channels = groups * (27 if modulated else 18)
    state = backbone.state_dict()
    assert state["res4.0.conv2_offset.weight"].shape == (channels, 32, 3, 3)
    assert state["res4.0.conv2.weight"].shape == (32, 32, 3, 3)
    assert "res4.0.conv2.bias" not in state and "res4.0.conv2.norm.weight" in state

    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.01)
    image = torch.randn(2, 3, 64, 64)
    output = backbone(image)["res5"]
    output.square().mean().backward()
    for name in blocks:
        offset_conv = backbone.get_submodule(name).conv2_offset
        assert torch.isfinite(offset_conv.weight.grad).all()
        assert offset_conv.weight.grad.abs().sum() > 0, name
    optimizer.step()
    assert not torch.equal(backbone(image)["res5"], output)


# --- which Detectron2 gets the deformable convolutions -------------------------------------

V06 = """
from detectron2 import _C
class DeformConv:
    real = True
ModulatedDeformConv = type("ModulatedDeformConv", (), {"real": True})
deform_conv = _C.deform_conv_forward
modulated_deform_conv = _C.modulated_deform_conv_forward
"""
MAIN = """
class DeformConv:
    real = True
ModulatedDeformConv = type("ModulatedDeformConv", (), {"real": True})
deform_conv = modulated_deform_conv = "a Function"
try:
    from detectron2 import _C
except ImportError:
    DeformConv = type("dummy", (), {"real": False})
    ModulatedDeformConv = type("dummy", (), {"real": False})
    deform_conv = object()
    modulated_deform_conv = object()
else:
    deform_conv = _C.deform_conv_forward
"""
LAYERS = "from .deform_conv import DeformConv, ModulatedDeformConv\n"
EXTENSION = "deform_conv_forward = modulated_deform_conv_forward = 'compiled'\n"
REPORT = """
import json, sys
import detectron2.layers, detectron2.layers.deform_conv as module
functions = [module.deform_conv, module.modulated_deform_conv]
replaced = [getattr(f, "__module__", None) == "sssd_compat" for f in functions]
real = [x.real for x in (module.DeformConv, module.ModulatedDeformConv,
        detectron2.layers.DeformConv, detectron2.layers.ModulatedDeformConv)]
print(json.dumps([applied, replaced, real, "torchvision" in sys.modules,
      type(sys.modules.get("detectron2._C")).__name__]))
"""
APPLY = "import sssd_compat\napplied = 'deformable-convolution' in sssd_compat.apply()\n"


def package(folder: Path, source: str, **more: str) -> Path:
    files = {"__init__.py": "", "layers/__init__.py": LAYERS, "layers/deform_conv.py": source}
    return write_package(folder, {**files, **more})


@pytest.mark.parametrize("source, stays", [(V06, "_MissingExtension"), (MAIN, "NoneType")])
def test_unbuilt_detectron2_keeps_its_classes(tmp_path, source, stays):
    """And torchvision is not imported for it, and on main no extension is left behind."""
    report = run(APPLY + REPORT, package(tmp_path, source))
    assert report == [True, [True, True], [True] * 4, False, stays]


def test_main_imported_before(tmp_path):
    """Whoever has imported a dummy from Detectron2 has the class afterwards."""
    folder = package(tmp_path, MAIN, **{"user.py": "from detectron2.layers import DeformConv\n"})
    before = "import detectron2.user as user\nassert not user.DeformConv.real\n"
    after = "assert user.DeformConv.real\n"
    report = run(before + APPLY + after + REPORT, folder)
    assert report == [True, [True, True], [True] * 4, False, "NoneType"]


@pytest.mark.parametrize("source", [V06, MAIN])
def test_compiled_detectron2_is_left_alone(tmp_path, source):
    folder = package(tmp_path, source, **{"_C.py": EXTENSION})
    assert run(APPLY + REPORT, folder) == [False, [False, False], [True] * 4, False, "module"]


@deformable
@pytest.mark.parametrize(
    "torchvision",
    [
        {},  # an old one: no such function
        {"deform_conv2d": "lambda *args, **kwargs: None"},  # built without its operators
    ],
)
def test_missing_operator_of_torchvision(tmp_path, torchvision):
    """A torchvision of Python files alone, as far as Detectron2's layers import it."""
    names = {name: "None" for name in ("RoIPool", "roi_align", "boxes", "nms", "batched_nms")}
    definitions = "\n".join(f"{k} = {v}" for k, v in {**names, **torchvision}.items())
    folder = tmp_path / "torchvision"
    folder.mkdir()
    (folder / "__init__.py").write_text("__version__ = '0.1'\n")
    (folder / "ops.py").write_text(definitions)
    sentence = run(
        "import json, sssd_compat, torch\n"
        "try:\n"
        "    sssd_compat._deform_conv(torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2, 2),"
        " torch.zeros(1, 1, 1, 1))\n"
        "except NotImplementedError as error:\n"
        "    print(json.dumps(str(error)))\n",
        tmp_path,
    )
    assert "'deform_conv2d', which is missing here" in sentence
    assert f"torch {torch.__version__}" in sentence and "compiled Detectron2" in sentence
    assert sentence.count(". ") == 0 and sentence.endswith(".")
