import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn

from sssd.teacher import pad_objects
from sssd.teacher.label_map_encoder import (
    LabelBlock,
    LabelMapBackbone,
    LabelMapTeacher,
    fpn_state,
)
from sssd.teacher.label_maps import LabelMaps, draw_label_maps, random_scales
from tests.detectors import build, tiny_config, training_input
from tests.teacher.scenes import NUM_CLASSES, assert_pyramids_close, one_image, scene

SIZES = [(61, 93), (70, 50), (33, 96)]  # padded to 96 x 96


class Pooled(Backbone):
    """A bottom-up with the widths and strides of another, and next to no work."""

    def __init__(self, widths, names=("res2", "res3", "res4", "res5"), first_stride=4):
        super().__init__()
        self._out_features = list(names)
        self._out_feature_channels = dict(zip(names, widths, strict=True))
        self._out_feature_strides = {name: first_stride << i for i, name in enumerate(names)}
        self.convs = nn.ModuleDict({name: nn.Conv2d(3, w, 1) for name, w in self.widths()})

    def widths(self):
        return self._out_feature_channels.items()

    def forward(self, x):
        return {
            name: conv(F.avg_pool2d(x, self._out_feature_strides[name]))
            for name, conv in self.convs.items()
        }


def student_fpn(kind="r18", norm=""):
    """The pyramids of Detectron2's base configs, a few channels wide."""
    torch.manual_seed(7)
    if kind == "retinanet":
        names = ("res3", "res4", "res5")
        bottom_up = Pooled((128, 256, 512), names, first_stride=8)
        return FPN(bottom_up, names, 4, norm, LastLevelP6P7(512, 4))
    widths = {"r18": (64, 128, 256, 512), "r50": (256, 512, 1024, 2048)}[kind]
    bottom_up = Pooled(widths)
    return FPN(bottom_up, list(bottom_up.convs), 6, norm, LastLevelMaxPool())


def teacher_for(fpn, seed=0, **options):
    torch.manual_seed(seed)
    return LabelMapTeacher(num_classes=NUM_CLASSES, fpn=fpn, **options)


def features_of(fpn, images, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return fpn(torch.randn(images, 3, 96, 96, generator=generator))


def backbone_for(num_classes=NUM_CLASSES, widths=(8, 12, 16, 20)):
    torch.manual_seed(0)
    shapes = {f"c{i}": ShapeSpec(channels=w, stride=4 << i) for i, w in enumerate(widths)}
    return LabelMapBackbone(num_classes=num_classes, shapes=shapes)


# ---- The encoder ----


def test_present_classes_alone_give_the_dense_computation():
    backbone, objects = backbone_for(), scene(2, 1, 0, sizes=SIZES, seed=3)
    drawing = draw_label_maps(objects, (96, 96))
    assert 1 < len(drawing.classes) < NUM_CLASSES
    every_class = torch.zeros(3, NUM_CLASSES, 96, 96)
    every_class[:, drawing.classes] = drawing.maps
    x = backbone.stem(every_class)
    for name, stage in zip(backbone.output_shape(), backbone.stages.values(), strict=True):
        x = stage(x)
        torch.testing.assert_close(backbone(drawing)[name], x, rtol=1e-4, atol=1e-6)


def labelenc_block(block, x, stride):
    """The residual block of LabelEnc's code, from the weights alone."""
    convs = (block.conv1, block.conv2, block.conv3)
    out = F.conv2d(x, convs[0].weight, convs[0].bias).relu()
    out = F.conv2d(out, convs[1].weight, convs[1].bias, stride, 1).relu()
    out = F.conv2d(out, convs[2].weight, convs[2].bias)
    if block.shortcut is not None:
        assert block.shortcut.bias is None
        x = F.conv2d(x, block.shortcut.weight, None, stride)
    return (out + x).relu()


def test_is_the_network_of_labelenc():
    # (in, between, out, stride) of the six blocks, by stage.
    stages = [
        [(128, 64, 256, 2)],
        [(256, 128, 512, 2), (512, 128, 512, 1)],
        [(512, 256, 1024, 2), (1024, 256, 1024, 1)],
        [(1024, 512, 2048, 2)],
    ]
    backbone = backbone_for(80, widths=(256, 512, 1024, 2048))
    parameters = 80 * 128 * 49 + 128
    for i, b, o, _ in (block for stage in stages for block in stage):
        parameters += i * b + b + 9 * b * b + b + b * o + o + (i * o if i != o else 0)
    assert sum(p.numel() for p in backbone.parameters()) == parameters

    x = torch.rand(1, 80, 64, 64)
    maps = backbone(LabelMaps(x, torch.arange(80)))
    x = F.conv2d(x, backbone.stem.weight, backbone.stem.bias, 2, 3)
    for blocks, name, stage in zip(stages, maps, backbone.stages.values(), strict=True):
        for (_, _, _, stride), block in zip(blocks, stage, strict=True):
            x = labelenc_block(block, x, stride)
            for conv in block.children():
                bound = math.sqrt(3 / conv.weight[0].numel())
                assert 0.99 * bound < conv.weight.abs().max() <= bound
        torch.testing.assert_close(maps[name], x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(96, 64), (61, 93), (33, 32)])
def test_maps_have_the_given_names_widths_and_strides(size):
    # No map at stride 4 and one at stride 64, as under other backbones than ResNet.
    names = {"a": (8, 8), "b": (10, 16), "c": (12, 32), "d": (14, 64)}
    shapes = {name: ShapeSpec(channels=w, stride=s) for name, (w, s) in names.items()}
    backbone = LabelMapBackbone(num_classes=2, shapes=shapes)
    assert {k: (v.channels, v.stride) for k, v in backbone.output_shape().items()} == names
    assert backbone.stages["stride4"][-1].out_channels == 4
    maps = backbone(LabelMaps(torch.rand(2, 1, *size), torch.tensor([1])))
    assert {name: tuple(x.shape) for name, x in maps.items()} == {
        name: (2, w, math.ceil(size[0] / s), math.ceil(size[1] / s))
        for name, (w, s) in names.items()
    }


def test_a_block_of_stride_2_may_keep_its_width():
    # As Swin-B's 128 channels at stride 4, after the encoder's own 128.
    assert LabelBlock(16, 16, stride=2)(torch.rand(1, 16, 9, 9)).shape == (1, 16, 5, 5)
    assert LabelBlock(16, 16, stride=1).shortcut is None


@pytest.mark.parametrize("strides", [(2, 4), (4, 4), (7, 14), (8, 24)])
def test_strides_that_halving_cannot_give_are_refused(strides):
    shapes = {f"c{i}": ShapeSpec(channels=4, stride=s) for i, s in enumerate(strides)}
    sentence = f"cannot give maps of the strides c0: {strides[0]}, c1: {strides[1]}; use a backbone"
    with pytest.raises(ValueError, match=sentence):
        LabelMapBackbone(num_classes=3, shapes=shapes)


@pytest.mark.parametrize("num_classes", [1, 80, 1203])
def test_an_object_starts_as_loud_among_many_classes(num_classes):
    # Fault: PyTorch's fan-in counts all classes, and with 80 of them an object moves by 0.02.
    backbone = backbone_for(num_classes, widths=(256,))
    assert backbone.stem.weight.std().item() == pytest.approx(1 / 7, rel=0.05)
    boxes, labels = torch.tensor([[10.0, 10, 50, 40]]), torch.tensor([num_classes - 1])
    objects = pad_objects([boxes], [labels], [(64, 64)], num_classes=num_classes)
    drawing = draw_label_maps(objects, (64, 64))
    empty = LabelMaps(torch.zeros_like(drawing.maps), drawing.classes)
    moved = backbone(drawing)["c0"] - backbone(empty)["c0"]
    assert 0.1 < moved[:, :, 3:9, 3:12].std() < 0.6


# ---- The teacher ----


@pytest.mark.parametrize("kind", ["r18", "r50", "retinanet"])
def test_maps_have_the_levels_and_shapes_of_the_student(kind):
    fpn = student_fpn(kind)
    teacher, features = teacher_for(fpn), features_of(fpn, 3)
    assert teacher.num_classes == NUM_CLASSES
    assert teacher.strides == {k: v.stride for k, v in fpn.output_shape().items()}
    maps = teacher(features, scene(3, 0, 1, sizes=SIZES))
    assert list(maps) == list(teacher.strides)
    assert {k: x.shape for k, x in maps.items()} == {k: x.shape for k, x in features.items()}


@pytest.mark.parametrize("detector", ["faster_rcnn", "retinanet"])
def test_fits_the_detectors_of_detectron2(detector):
    # Batches of sizes that are multiples of nothing, padded by the detector.
    student = build(tiny_config(distilled=False, detector=detector))
    teacher = LabelMapTeacher(num_classes=3, fpn=student.backbone)
    inputs = [training_input(4, 61, 97), training_input(0, 83, 70, seed=1)]
    with torch.no_grad():
        features = student.backbone(student.preprocess_image(inputs).tensor)
    truth = [x["instances"] for x in inputs]
    objects = pad_objects(
        [x.gt_boxes.tensor for x in truth],
        [x.gt_classes for x in truth],
        [x.image_size for x in truth],
        num_classes=3,
    )
    maps = teacher(features, objects)
    assert {k: x.shape for k, x in maps.items()} == {k: x.shape for k, x in features.items()}


@pytest.mark.parametrize("kind", ["r18", "retinanet"])
@pytest.mark.parametrize("levels", [(), ("p4",), ("p5", "p3")])
@pytest.mark.parametrize("counts", [(3, 1), (0, 2), (0, 0)])
def test_every_parameter_gets_a_gradient_in_every_batch(kind, levels, counts):
    fpn = student_fpn(kind).requires_grad_(False)  # a frozen student has a teacher that learns
    teacher = teacher_for(fpn, levels=levels)
    maps = teacher(features_of(fpn, 2), scene(*counts, sizes=SIZES[:2]))
    assert list(maps) == sorted(levels or fpn.output_shape())
    sum(x.square().sum() for x in maps.values()).backward()
    for name, parameter in teacher.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    stem = teacher.fpn.bottom_up.stem
    assert stem.bias.grad.abs().max() > 0  # not even then does the encoder stand still
    if counts == (3, 1) and not levels:
        assert all(p.grad.abs().max() > 0 for p in teacher.parameters())


def test_levels_that_are_not_taught_change_nothing():
    fpn = student_fpn()
    every = teacher_for(fpn)
    some = teacher_for(fpn, levels=("p5", "p3"))
    assert list(some.strides) == ["p3", "p5"]
    objects = scene(3, 1, sizes=SIZES[:2])
    features = features_of(fpn, 2)
    expected = every(features, objects)
    found = some({level: features[level] for level in some.strides}, objects)
    assert_pyramids_close(found, {level: expected[level] for level in some.strides})


def test_labels_matter_and_the_picture_and_batch_mates_do_not():
    fpn = student_fpn()
    teacher, objects = teacher_for(fpn), scene(3, 2, 0, sizes=SIZES)
    with torch.no_grad():
        before = teacher(features_of(fpn, 3), objects)
        assert_pyramids_close(teacher(features_of(fpn, 3, seed=1), objects), before)
        others = objects._replace(classes=(objects.classes + 1) % NUM_CLASSES)
        for changed in (others, objects._replace(boxes=objects.boxes / 2)):
            after = teacher(features_of(fpn, 3), changed)
            assert all((after[k] - before[k])[:2].abs().max() > 1e-3 for k in before)
            assert all(torch.allclose(after[k][2], before[k][2], atol=1e-6) for k in before)
        for i in range(3):
            alone = teacher(features_of(fpn, 1), one_image(objects, i))
            assert_pyramids_close(alone, {k: x[i : i + 1] for k, x in before.items()})


def wide_fpn(norm):
    """GroupNorm has 32 groups."""
    torch.manual_seed(7)
    bottom_up = Pooled((8, 8), ("res4", "res5"), first_stride=16)
    return FPN(bottom_up, ["res4", "res5"], 32, norm)


MAKERS = {
    "max pool": lambda: student_fpn("r18"),
    "P6P7": lambda: student_fpn("retinanet"),
    **{norm: partial(wide_fpn, norm) for norm in ("GN", "BN", "FrozenBN")},
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_the_fpn_starts_anew_and_the_student_stays_as_it_is(make):
    fpn, untrained = make(), make().state_dict()
    for tensor in (*fpn.parameters(), *fpn.buffers()):  # as after training
        tensor.data += (1 + torch.rand(tensor.shape)).to(tensor.dtype)
    fpn.register_forward_hook(lambda *args: pytest.fail("The teacher runs a hook of the student."))
    before = copy.deepcopy(fpn.state_dict())
    teacher = teacher_for(fpn)

    assert all(torch.equal(x, before[name]) for name, x in fpn.state_dict().items())
    assert len(fpn._forward_hooks) == 1 and isinstance(fpn.bottom_up, Pooled)
    assert fpn.bottom_up not in set(teacher.modules())
    own = {x.data_ptr() for x in (*teacher.parameters(), *teacher.buffers())}
    assert not own & {x.data_ptr() for x in (*fpn.parameters(), *fpn.buffers())}

    for name, x in fpn_state(teacher).items():
        if x.dim() == 4:  # c2_xavier_fill
            bound = math.sqrt(3 / x[0].numel())
            assert 0.8 * bound < x.abs().max() <= bound, name
            assert not torch.equal(x, untrained[name])
        else:
            assert torch.equal(x, untrained[name]), name

    teacher(features_of(make(), 1), scene(1, sizes=[(96, 96)]))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_its_fpn_initialises_a_student(make):
    teacher, student = teacher_for(make()), make()
    state = fpn_state(teacher)
    result = student.load_state_dict(state, strict=False)
    assert result.unexpected_keys == []
    bottom_up = [f"bottom_up.{name}" for name in student.bottom_up.state_dict()]
    assert sorted(result.missing_keys) == sorted(bottom_up)
    assert state and all(torch.equal(student.state_dict()[k], x) for k, x in state.items())
    # The lists that the FPN computes with hold what was loaded.
    for mine, loaded in zip(teacher.fpn.lateral_convs, student.lateral_convs, strict=True):
        assert torch.equal(mine.weight, loaded.weight)


# ---- Scales ----


def test_objects_are_scaled_in_training_only_and_if_asked_for():
    fpn = student_fpn()
    features, objects = features_of(fpn, 1), scene(4, sizes=SIZES[:1])
    plain, augmented = teacher_for(fpn), teacher_for(fpn, augment_scales=True)
    with torch.no_grad():
        expected = plain.train()(features, objects)
        assert_pyramids_close(augmented.eval()(features, objects), expected)
        augmented.train()
        first, second = (augmented(features, objects)["p2"] for _ in range(2))
        assert (first - expected["p2"]).abs().max() > 1e-3
        assert (first - second).abs().max() > 1e-3

        generator = torch.Generator().manual_seed(augmented._seed + 1)
        scales = random_scales((1, 4), generator)
        drawing = draw_label_maps(objects, (96, 96), scales=scales)
        torch.testing.assert_close(augmented.fpn(drawing)["p2"], first)


def test_scales_leave_the_random_stream_alone_and_go_on_after_resuming():
    fpn = student_fpn()
    features, objects = features_of(fpn, 1), scene(4, sizes=SIZES[:1])
    teacher, resumed = (teacher_for(fpn, augment_scales=True) for _ in range(2))
    with torch.no_grad():
        state = torch.get_rng_state()
        first = teacher(features, objects)
        assert torch.equal(torch.get_rng_state(), state)
        resumed.load_state_dict(teacher.state_dict())
        second = teacher(features, objects)
        assert_pyramids_close(resumed(features, objects), second)
        assert (first["p2"] - second["p2"]).abs().max() > 1e-3
    # What a checkpoint of a teacher without scales holds loads as well, as in the second step.
    teacher_for(fpn).load_state_dict(teacher.state_dict())


# ---- Sentences ----


def test_a_backbone_that_is_no_fpn_is_refused():
    with pytest.raises(ValueError, match="backbone is a Pooled, .* copies Detectron2's FPN; use"):
        LabelMapTeacher(num_classes=3, fpn=Pooled((4, 4), ("a", "b")))


def test_a_level_that_the_student_lacks_is_refused():
    with pytest.raises(ValueError, match="include p9, but .* gives p3, p4, p5, p6, p7; name"):
        teacher_for(student_fpn("retinanet"), levels=("p3", "p9"))


def test_maps_of_other_sizes_are_refused():
    fpn = student_fpn()
    teacher, features = teacher_for(fpn), features_of(fpn, 2)
    objects = scene(1, 1, sizes=SIZES[:2])
    cut = {level: x[..., :-1, :] for level, x in features.items()}
    with pytest.raises(ValueError, match="input is 92 x 96 pixels .* multiples of 32; pad"):
        teacher(cut, objects)
    for other in ({**features, "p4": cut["p4"]}, {**features, "p4": features["p4"][:1]}):
        with pytest.raises(ValueError, match="2 images of 96 x 96 .* on level 'p4', where the"):
            teacher(other, objects)
    with pytest.raises(ValueError, match="Image 0 of the batch is 61 x 93 pixels"):
        teacher({level: x[..., : x.shape[-1] // 3] for level, x in features.items()}, objects)


def test_half_precision():
    fpn = student_fpn()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = teacher_for(fpn, levels=("p3",))(features_of(fpn, 2), scene(3, 0, sizes=SIZES[:2]))
    assert maps["p3"].isfinite().all() and maps["p3"].std() > 0
