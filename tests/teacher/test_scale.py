"""Many classes, one class; hundreds of objects in an image."""

import pytest
import torch

from sssd.teacher import LabelEncodingTeacher
from sssd.teacher.fusion import INTERACTIONS
from tests.teacher.memory import NewBytes
from tests.teacher.scenes import (
    STRIDES,
    assert_pyramids_close,
    one_image,
    pyramid,
    scene,
    small_teacher,
)

SIZES = [(64, 96), (80, 50), (80, 96)]


def loss_of(maps):
    # Not the plain sum: the maps end in a normalisation, which keeps that constant.
    generator = torch.Generator().manual_seed(5)
    weights = {level: torch.randn(x.shape[1:], generator=generator) for level, x in maps.items()}
    return sum((x * weights[level]).sum() for level, x in maps.items())


def gradients_of(teacher, maps):
    teacher.zero_grad()
    loss_of(maps).backward()
    return {name: p.grad.clone() for name, p in teacher.named_parameters()}


# ---- Classes ----


def test_lvis_classes_add_less_than_half_a_million_parameters_to_those_of_coco():
    # Fault: a spatial transformer with a matrix of (4 + classes)^2 entries; 1.5 million for LVIS,
    # made by a linear layer of 256 inputs.
    sizes = {}
    for num_classes in (80, 1203):
        teacher = LabelEncodingTeacher(num_classes=num_classes, channels=256, strides=STRIDES)
        sizes[num_classes] = sum(p.numel() for p in teacher.parameters())
    assert 0 < sizes[1203] - sizes[80] <= 500_000
    # All of it is the table of classes, and no layer is wider for it.
    assert sizes[1203] - sizes[80] == (1203 - 80) * 60


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_one_class(interaction):
    teacher = small_teacher(num_classes=1, interaction=interaction, add_context_box=True)
    objects = scene(4, 1, 0)
    objects = objects._replace(classes=torch.where(objects.valid, 0, 1))
    features = pyramid(3)
    maps = teacher(features, objects)
    gradients = gradients_of(teacher, maps)
    for name, gradient in gradients.items():
        assert gradient.isfinite().all() and gradient.abs().max() > 0, name
    # The class is told from "no class", which the context box has.
    others = teacher(features, objects._replace(classes=torch.ones_like(objects.classes)))
    differ = (maps["lateral0"] - others["lateral0"])[0].abs().max() > 1e-4
    assert differ == (interaction != "student_fill")


# ---- Objects ----


@pytest.mark.parametrize("interaction", ["student_guided", "label_guided"])
@pytest.mark.parametrize("counts", [(0, 1, 500), (500, 0, 1)])
def test_a_crowd_beside_empty_images_gives_what_each_image_gives_alone(counts, interaction):
    # In float64: the gradients sum up hundreds of objects, in another order.
    teacher = small_teacher(interaction=interaction, add_context_box=True).double()
    objects = scene(*counts, sizes=SIZES)
    objects = objects._replace(
        boxes=objects.boxes.double(), image_sizes=objects.image_sizes.double()
    )
    features = {level: x.double() for level, x in pyramid(3).items()}
    maps = teacher(features, objects)
    gradients = gradients_of(teacher, maps)
    summed = dict.fromkeys(gradients, 0)
    for index in range(3):
        image = slice(index, index + 1)
        alone = teacher(
            {level: x[image] for level, x in features.items()}, one_image(objects, index)
        )
        assert_pyramids_close({level: x[image] for level, x in maps.items()}, alone)
        for name, gradient in gradients_of(teacher, alone).items():
            summed[name] = summed[name] + gradient
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
        torch.testing.assert_close(gradient, summed[name], msg=lambda m, name=name: f"{name}: {m}")


def test_gradients_of_a_crowd_are_finite_in_single_precision():
    teacher = small_teacher(detach_appearance=False)
    features = {level: x.requires_grad_() for level, x in pyramid(3).items()}
    maps = teacher(features, scene(0, 1, 500, sizes=SIZES))
    gradients = gradients_of(teacher, maps)
    assert all(x.isfinite().all() for x in (*maps.values(), *gradients.values()))
    assert all(x.grad.isfinite().all() for x in features.values())


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_memory_grows_linearly_with_the_objects_of_an_image(interaction, backward):
    # With the fused attention of torch not even the matrix of objects by objects is ever there.
    # Wider maps than elsewhere, so that they are not small beside the label encoder.
    made = {}
    for count in (1, 100, 200):
        teacher = small_teacher(interaction=interaction, detach_appearance=False)
        features = {
            level: x.requires_grad_() for level, x in pyramid(1, height=320, width=320).items()
        }
        objects = scene(count, sizes=[(320, 320)])
        with NewBytes() as new:
            maps = teacher(features, objects)
            if backward:
                loss_of(maps).backward()
        made[count] = new
    constant = made[1].largest
    assert made[200].largest <= 2 * made[100].largest + constant
    # All tensors together: twice the objects, twice the bytes beyond those of one object.
    per_object = {n: (made[n].total - made[1].total) / (n - 1) for n in (100, 200)}
    assert per_object[200] == pytest.approx(per_object[100], rel=0.01)
