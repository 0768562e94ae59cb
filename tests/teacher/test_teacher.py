import pytest
import torch
import torch.nn.functional as F

from sssd.losses import PyramidDistillation
from sssd.teacher import LabelEncodingTeacher, image_cells
from tests.teacher.scenes import (
    NUM_CLASSES,
    STRIDES,
    assert_pyramids_close,
    pyramid,
    scene,
    small_teacher,
)


def total(maps):
    # Not the plain sum: the maps end in a normalisation, which keeps that constant.
    generator = torch.Generator().manual_seed(5)
    return sum((x * torch.randn(x.shape, generator=generator)).sum() for x in maps.values())


def test_maps_have_the_levels_and_shapes_of_the_student():
    features = {**pyramid(2), "untaught": torch.zeros(2, 7, 1, 1)}
    maps = small_teacher()(features, scene(3, 1))
    assert {level: x.shape for level, x in maps.items()} == {
        "lateral0": (2, 16, 10, 12),
        "lateral1": (2, 16, 5, 6),
        "extra": (2, 16, 2, 2),
    }
    assert list(maps) == list(STRIDES)


@pytest.mark.parametrize("channels", [64, 96, 100, 256])
def test_any_width(channels):
    strides = {"p5": 32}
    teacher = LabelEncodingTeacher(num_classes=NUM_CLASSES, channels=channels, strides=strides)
    width = teacher.label_encoder.output[0].out_features
    assert width % 8 == 0 and channels <= width < channels + 8
    features = {"p5": torch.randn(2, channels, 3, 3)}
    assert teacher(features, scene(2, 1))["p5"].shape == (2, channels, 3, 3)


def test_labels_matter():
    teacher, features, objects = small_teacher(), pyramid(1), scene(3, sizes=[(80, 96)])
    before = teacher(features, objects)
    others = objects._replace(classes=(objects.classes + 1) % NUM_CLASSES)
    smaller = objects._replace(boxes=objects.boxes / 2)
    for changed in (others, smaller):
        after = teacher(features, changed)
        assert all((after[level] - before[level]).abs().max() > 1e-3 for level in STRIDES)


def test_an_object_twice_is_the_object_once():
    # Fault: overlapping boxes add up. Max and softmax over two equal objects give those of one.
    teacher, features = small_teacher(), pyramid(1)
    once = scene(1, sizes=[(80, 96)])
    twice = type(once)(
        *(part.repeat_interleave(2, dim=1) for part in once[:3]), image_sizes=once.image_sizes
    )
    assert_pyramids_close(teacher(features, twice), teacher(features, once))


def test_small_and_degenerate_objects_are_on_every_level():
    # Fault: objects smaller than a cell had an empty mask, so that a level did not show them.
    teacher, features = small_teacher(), pyramid(1)
    nothing = teacher(features, scene(0, sizes=[(80, 96)]))
    for box in [(50.0, 40, 52, 42), (50, 40, 50, 40), (96, 80, 96, 80), (0, 0, 0, 0)]:
        objects = scene(1, sizes=[(80, 96)])._replace(boxes=torch.tensor([[box]]))
        painted = teacher(features, objects)
        for level in STRIDES:
            assert painted[level].isfinite().all()
            assert (painted[level] - nothing[level]).abs().max() > 1e-3


@pytest.mark.parametrize("counts", [(3, 1), (3, 0), (0, 0)])
@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("detach", [False, True])
def test_every_parameter_gets_a_finite_gradient(counts, context, detach):
    teacher = small_teacher(add_context_box=context, detach_appearance=detach)
    features = {level: x.requires_grad_() for level, x in pyramid(2).items()}
    maps = teacher(features, scene(*counts))
    assert all(x.isfinite().all() for x in maps.values())
    total(maps).backward()
    for name, parameter in teacher.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # With objects, each also learns: nothing hangs on by a factor of 0.
        assert counts != (3, 1) or parameter.grad.abs().max() > 0, name


def test_an_image_without_objects_shows_no_labels():
    teacher, features, objects = small_teacher(), pyramid(2), scene(3, 0)
    before = teacher(features, objects)
    with torch.no_grad():
        teacher.label_encoder.class_embedding.weight += 1
    after = teacher(features, objects)
    for level in STRIDES:
        assert torch.equal(after[level][1], before[level][1])
        assert not torch.allclose(after[level][0], before[level][0])


@pytest.mark.parametrize("detach", [False, True])
def test_detach_appearance_keeps_the_gradient_from_the_student(detach):
    teacher = small_teacher(detach_appearance=detach)
    features = {level: x.requires_grad_() for level, x in pyramid(2).items()}
    total(teacher(features, scene(3, 1))).backward()
    for x in features.values():
        assert (x.grad is None) if detach else (x.grad.abs().max() > 0)


def test_gradient_to_the_features():
    teacher = small_teacher(
        channels=2, embed_dim=4, strides={"p": 32}, add_context_box=True, detach_appearance=False
    ).double()
    objects = scene(2, sizes=[(64, 96)])
    objects = objects._replace(
        boxes=objects.boxes.double(), image_sizes=objects.image_sizes.double()
    )
    features = pyramid(1, channels=2)["extra"].double().requires_grad_()

    def function(x):
        return teacher({"p": x}, objects)["p"]

    assert torch.autograd.gradcheck(function, features)


def test_everything_happens_on_the_device_of_the_features():
    # Tensors on "meta" hold no values: a copy to the CPU, or reading a value, would raise.
    teacher = small_teacher(add_context_box=True).to("meta")
    features = {level: x.to("meta").requires_grad_() for level, x in pyramid(2).items()}
    maps = teacher(features, scene(3, 0).to(torch.device("meta")))
    assert all(x.device.type == "meta" for x in maps.values())
    sum(x.sum() for x in maps.values()).backward()


def test_mixed_precision():
    teacher, features, objects = small_teacher(), pyramid(2), scene(3, 1)
    expected = teacher(features, objects)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = teacher(features, objects)
    for level in STRIDES:
        assert F.cosine_similarity(maps[level].float(), expected[level], dim=1).mean() > 0.98


def test_evaluation_gives_what_training_gives():
    teacher, features, objects = small_teacher(add_context_box=True), pyramid(3), scene(4, 1, 0)
    expected = teacher(features, objects)
    with torch.no_grad():
        maps = teacher.eval()(features, objects)
    assert_pyramids_close(maps, expected)


def test_parameters_grow_linearly_with_the_classes():
    counts = {
        n: sum(p.numel() for p in small_teacher(num_classes=n).parameters()) for n in (1, 80, 1203)
    }
    assert counts[80] - counts[1] == 79 * 60
    assert counts[1203] - counts[80] == 1123 * 60


def test_single_cell_levels_train_with_the_distance():
    # Fault: InstanceNorm2d refuses a level of one cell. Images of 33 x 40 at strides 8 and 64.
    sizes, strides = [(33, 40)], {"fine": 8, "top": 64}
    teacher = small_teacher(strides=strides).train()
    features = {
        "fine": torch.randn(1, 16, 5, 5, requires_grad=True),
        "top": torch.randn(1, 16, 1, 1, requires_grad=True),
    }
    objects = scene(2, sizes=sizes)
    masks = {
        level: image_cells(objects.image_sizes, x.shape[-2:], strides[level])
        for level, x in features.items()
    }
    distillation = PyramidDistillation(channels=16)
    distance = distillation(features, teacher(features, objects), masks)
    distance.backward()
    assert 0 < distance.item() < 1
    assert all(x.grad.isfinite().all() for x in features.values())
    # The distance teaches the student, and not the teacher.
    assert all(p.grad is None for p in teacher.parameters())


def test_padded_cells_of_a_batch_are_left_out_of_the_distance():
    # Fault: the distance covered the padding of the batch.
    teacher, distillation = small_teacher(), PyramidDistillation(channels=16)
    distillation.adapter = torch.nn.Identity()
    features, objects = pyramid(2), scene(3, 1)
    maps = teacher(features, objects)
    masks = {
        level: image_cells(objects.image_sizes, x.shape[-2:], STRIDES[level])
        for level, x in maps.items()
    }
    assert not all(mask.all() for mask in masks.values())
    before = distillation(features, maps, masks)
    for x, mask in zip(maps.values(), masks.values(), strict=True):
        with torch.no_grad():
            x.masked_fill_(~mask[:, None], 100.0)
    torch.testing.assert_close(distillation(features, maps, masks), before)
