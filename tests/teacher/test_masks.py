"""Masks as the places of objects: which cells are theirs, and what the teacher makes of them."""

import copy
import pickle

import numpy as np
import pytest
import torch

from sssd.teacher import image_cells, object_cells, pad_objects
from sssd.teacher.masks import MaskedObjects, mask_cells, polygon_cells, with_masks
from tests.teacher.mask_scenes import masked_scene, rectangle
from tests.teacher.scenes import (
    NUM_CLASSES,
    STRIDES,
    assert_pyramids_close,
    pyramid,
    scene,
    small_teacher,
)

# ---- Cells of the batch ----


def test_the_rules_for_cells_hold_for_masks():
    # Stride 8, an image of 28 x 28 (3 cells: the centre 28 is on its border, so a fourth) in a
    # batch padded to 40 x 40.
    boxes = torch.tensor([[0.0, 0, 28, 28], [13, 5, 15, 7], [0, 0, 28, 16], [1, 1, 20, 20]])
    polygons = [
        [rectangle(0, 0, 100, 20)],  # reaches over the image's border
        [rectangle(13, 5, 15, 7)],  # smaller than a cell
        [rectangle(0, 0, 28, 3)],  # above all centres
        [],  # no mask at all
    ]
    objects = pad_objects([boxes], [torch.zeros(4).long()], [(28, 28)], num_classes=1)
    masked = with_masks(objects, [polygon_cells(polygons, (28, 28), {"p": 8})], {"p": 8})
    cells = mask_cells(masked, "p", (5, 5), 8)[0]
    assert cells[0].nonzero().tolist() == [[row, column] for row in (0, 1) for column in range(4)]
    # Else the cell under the centre of the box: (14, 6), (14, 8) and (10.5, 10.5).
    assert [x.nonzero().tolist() for x in cells[1:]] == [[[0, 1]], [[1, 1]], [[1, 1]]]


@pytest.mark.parametrize("seed", range(3))
def test_every_object_owns_a_cell_and_none_lies_off_its_image(seed):
    objects = masked_scene(20, 6, 0, seed=seed)
    for level, stride in STRIDES.items():
        size = (-(-80 // stride), -(-96 // stride))
        cells = mask_cells(objects, level, size, stride)
        assert torch.equal(cells.flatten(2).any(2), objects.valid)
        on_image = image_cells(objects.image_sizes, size, stride)[:, None]
        assert not (cells & ~on_image).any()
        # An ellipse is in its box.
        assert not (cells & ~object_cells(objects, size, stride)).any()


def test_maps_larger_and_smaller_than_the_masks():
    objects = masked_scene(6)
    cells = mask_cells(objects, "lateral0", (8, 12), 8)
    larger = mask_cells(objects, "lateral0", (16, 16), 8)
    assert torch.equal(larger[..., :8, :12], cells) and larger.sum() == cells.sum()
    smaller = mask_cells(objects, "lateral0", (8, 9), 8)
    has_one = smaller.flatten(2).any(2) & cells[..., :9].flatten(2).any(2)
    assert torch.equal(smaller[has_one], cells[..., :9][has_one])


def test_masks_of_different_images_are_padded():
    sizes, strides = [(16, 24), (32, 8), (8, 8)], {"p": 8}
    boxes = [torch.zeros(count, 4) for count in (2, 1, 0)]
    objects = pad_objects(boxes, [torch.zeros(len(b)).long() for b in boxes], sizes, num_classes=1)
    masks = [
        {"p": torch.ones(2, 2, 3, dtype=torch.bool)},
        {"p": torch.ones(1, 4, 1, dtype=torch.bool)},
        {},
    ]
    padded = with_masks(objects, masks, strides).masks["p"]
    assert padded.shape == (3, 2, 4, 3)
    assert padded.sum((2, 3)).tolist() == [[6, 6], [4, 0], [0, 0]]
    assert padded[0, 0, :2].all() and padded[1, 0, :, 0].all()


def test_the_context_box_covers_the_image():
    objects = masked_scene(2, 0).with_context_box(NUM_CLASSES)
    assert objects.valid.tolist() == [[True, True, True], [False, False, True]]
    for level, stride in STRIDES.items():
        size = (-(-128 // stride), -(-128 // stride))
        cells = mask_cells(objects, level, size, stride)
        assert torch.equal(cells[:, -1], image_cells(objects.image_sizes, size, stride))
        before = mask_cells(masked_scene(2, 0), level, size, stride)
        assert torch.equal(cells[:, :-1], before)


def test_objects_with_masks_are_objects():
    objects = masked_scene(3, 1)
    boxes, classes, valid, _ = objects  # for all who take the four tensors
    assert valid.sum() == 4
    moved = objects.to(torch.device("meta"))
    assert isinstance(moved, MaskedObjects)
    assert {x.device.type for x in (*moved, *moved.masks.values())} == {"meta"}
    other = objects._replace(classes=classes + 1)
    assert isinstance(other, MaskedObjects) and other.masks.keys() == STRIDES.keys()
    assert torch.equal(other.classes, classes + 1)
    for again in (copy.copy(objects), copy.deepcopy(objects), pickle.loads(pickle.dumps(objects))):
        assert isinstance(again, MaskedObjects) and torch.equal(again.boxes, boxes)
        assert all(torch.equal(again.masks[level], x) for level, x in objects.masks.items())


def test_no_value_is_read_back_from_the_device():
    objects = masked_scene(3, 1).to(torch.device("meta")).with_context_box(NUM_CLASSES)
    assert mask_cells(objects, "lateral0", (12, 10), 8).shape == (2, 4, 12, 10)


# ---- The teacher ----


def masked_teacher(**options):
    return small_teacher(regions="mask", **options)


def test_masks_that_fill_their_boxes_give_the_maps_of_boxes():
    objects, features = scene(5, 2, 0), pyramid(3)
    masks = {
        level: object_cells(objects, features[level].shape[-2:], stride)
        for level, stride in STRIDES.items()
    }
    maps = masked_teacher()(features, MaskedObjects(objects, masks))
    expected = small_teacher()(features, objects)
    assert all(torch.equal(maps[level], expected[level]) for level in STRIDES)


def test_the_mask_matters_and_the_box_still_describes():
    # An L in place of its bounding box; and the same L under another box.
    teacher, features = masked_teacher(), pyramid(1)
    objects = scene(1, sizes=[(80, 96)])._replace(boxes=torch.tensor([[[9.0, 9, 73, 73]]]))
    outlines = {
        "L": np.array([9, 9, 25, 9, 25, 57, 73, 57, 73, 73, 9, 73.0]),
        "box": rectangle(9, 9, 73, 73),
    }
    maps = {
        name: teacher(
            features,
            with_masks(objects, [polygon_cells([[outline]], (80, 96), STRIDES)], STRIDES),
        )
        for name, outline in outlines.items()
    }
    assert_pyramids_close(maps["box"], small_teacher()(features, objects))
    assert (maps["L"]["lateral0"] - maps["box"]["lateral0"]).abs().max() > 1e-2
    ell = with_masks(objects, [polygon_cells([[outlines["L"]]], (80, 96), STRIDES)], STRIDES)
    other = teacher(features, ell._replace(boxes=objects.boxes / 2))
    assert (other["lateral0"] - maps["L"]["lateral0"]).abs().max() > 1e-3


@pytest.mark.parametrize("context", [False, True])
def test_a_batch_gives_what_each_image_gives_alone(context):
    teacher, features = masked_teacher(add_context_box=context), pyramid(3)
    objects = masked_scene(6, 1, 0)
    batched = teacher(features, objects)
    for index in range(3):
        count, image = max(int(objects.valid[index].sum()), 1), slice(index, index + 1)
        alone = MaskedObjects(
            pad_objects(
                [objects.boxes[index][objects.valid[index]]],
                [objects.classes[index][objects.valid[index]]],
                [tuple(int(v) for v in objects.image_sizes[index])],
                num_classes=NUM_CLASSES,
            ),
            {level: x[image, :count] for level, x in objects.masks.items()},
        )
        maps = teacher({level: x[image] for level, x in features.items()}, alone)
        assert_pyramids_close({level: x[image] for level, x in batched.items()}, maps)


@pytest.mark.parametrize("counts", [(3, 1), (2, 0), (0, 0)])
@pytest.mark.parametrize("context", [False, True])
def test_every_parameter_gets_a_finite_gradient(counts, context):
    teacher = masked_teacher(add_context_box=context)
    maps = teacher(pyramid(2), masked_scene(*counts))
    weight = torch.randn(16, 1, 1, generator=torch.Generator().manual_seed(3))
    sum((x * weight).sum() for x in maps.values()).backward()
    for name, parameter in teacher.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert counts != (3, 1) or parameter.grad.abs().max() > 0, name


def test_masks_change_no_parameter():
    with_boxes, with_polygons = small_teacher(), masked_teacher()
    assert with_boxes.mask_strides == {} and with_polygons.mask_strides == STRIDES
    others = with_polygons.state_dict()
    assert all(torch.equal(x, others[name]) for name, x in with_boxes.state_dict().items())


def test_wrong_regions_and_missing_masks_are_errors():
    with pytest.raises(ValueError, match="REGIONS is 'polygon'; use one of box, mask"):
        small_teacher(regions="polygon")
    with pytest.raises(ValueError, match="none for the level lateral0; add them with .*with_masks"):
        masked_teacher()(pyramid(1), scene(1))
    objects = masked_scene(1)
    del objects.masks["extra"]
    with pytest.raises(ValueError, match="none for the level extra"):
        masked_teacher()(pyramid(1), objects)
