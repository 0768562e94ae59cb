"""Interaction patterns and mask regions of the teacher, from the config to a training step."""

import numpy as np
import pycocotools.mask
import pytest
import torch
from detectron2.config import LazyCall, instantiate
from detectron2.data import DatasetMapper
from detectron2.structures import BitMasks, Instances, PolygonMasks, ROIMasks

from sssd.meta_arch.ground_truth import ground_truth_objects
from sssd.teacher import LabelEncodingTeacher
from sssd.teacher.fusion import INTERACTIONS
from sssd.teacher.masks import MaskedObjects, mask_cells
from tests.detectors import build, losses_at, tiny_config, training_batch, training_input

REGIONS, INTERACTION = "MODEL.SSSD.TEACHER.REGIONS", "MODEL.SSSD.TEACHER.INTERACTION"
STRIDES = {"p2": 4, "p4": 16, "p6": 64}


def masked_batch(kind="polygon"):
    """An image with three objects, one with one, and one without objects and without the field."""
    batch = [*training_batch(detector="mask_rcnn"), training_input(0, 48, 96)]
    for inputs in batch[:2]:
        instances = inputs["instances"]
        # Triangles, which own fewer cells than their boxes.
        instances.gt_masks = PolygonMasks([[p[0][:6]] for p in instances.gt_masks.polygons])
        if kind == "bitmap":
            instances.gt_masks = bitmaps(instances)
    return batch


def bitmaps(instances):
    return BitMasks.from_polygon_masks(instances.gt_masks, *instances.image_size)


def star_shaped(count, height, width, seed=0):
    """Instances with outlines that go once around a centre, and their bounding boxes."""
    random = np.random.default_rng(seed)
    polygons = []
    for _ in range(count):
        angles = np.sort(random.uniform(0, 2 * np.pi, 12))
        radii = random.uniform(0.2, 1, 12) * random.uniform(2, 60)
        centre = random.uniform(0, 1, 2) * (width, height)
        corners = centre + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        polygons.append([corners.clip(0, (width, height)).ravel()])
    instances = Instances((height, width))
    instances.gt_masks = PolygonMasks(polygons)
    instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
    instances.gt_classes = torch.zeros(count, dtype=torch.int64)
    return instances


def distance_to_outline(points, polygon):
    """(K,) distances of (K, 2) points to the edges of an outline."""
    start = polygon.reshape(-1, 2)
    edge = np.roll(start, -1, axis=0) - start
    offset = points[:, None] - start
    share = (offset * edge).sum(-1) / np.maximum((edge**2).sum(-1), 1e-12)
    nearest = share.clip(0, 1)[..., None] * edge
    return np.linalg.norm(offset - nearest, axis=-1).min(axis=1)


# ---- Interaction ----


@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("detector", ["faster_rcnn", "retinanet"])
def test_a_training_step_gives_every_parameter_a_gradient(interaction, detector):
    model = build(tiny_config(INTERACTION, interaction, detector=detector))
    assert model.teacher.relation_adapter.interaction == interaction
    for batch in (None, [training_input(0), training_input(0, 80, 64)]):
        model.zero_grad()
        losses, _ = losses_at(model, batch=batch)
        total = sum(losses.values())
        assert total.isfinite()
        total.backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all(), name


def test_an_unknown_pattern_is_an_error_when_the_model_is_built():
    with pytest.raises(ValueError, match="INTERACTION is 'attention'; use one of student_guided"):
        build(tiny_config(INTERACTION, "attention"))


def test_the_default_is_the_teacher_of_lgd():
    default, named = build(tiny_config()), build(tiny_config(INTERACTION, "student_guided"))
    parts, others = default.teacher.state_dict(), named.teacher.state_dict()
    assert parts.keys() == others.keys()
    assert all(torch.equal(x, others[name]) for name, x in parts.items())
    assert default.teacher.regions == "box"


def test_a_lazy_config_takes_the_same_options():
    teacher = instantiate(
        LazyCall(LabelEncodingTeacher)(
            num_classes=3, channels=16, strides=STRIDES, interaction="label_fill", regions="mask"
        )
    )
    assert teacher.mask_strides == STRIDES and teacher.appearance_encoder is None


# ---- Masks ----


@pytest.mark.parametrize("kind", ["polygon", "bitmap"])
@pytest.mark.parametrize("detector", ["faster_rcnn", "retinanet", "fcos"])
def test_a_training_step_with_masks(kind, detector):
    model = build(tiny_config(REGIONS, "mask", detector=detector))
    batch = masked_batch(kind)
    losses, _ = losses_at(model, batch=batch)
    sum(losses.values()).backward()
    assert all(x.isfinite() for x in losses.values())
    assert all(p.grad is not None for p in model.teacher.parameters())

    # With the boxes, the same weights make other maps, and so another distance.
    again, _ = losses_at(model, batch=batch)
    model.teacher.regions = "box"
    with_boxes, _ = losses_at(model, batch=batch)
    torch.testing.assert_close(again["loss_distill"], losses["loss_distill"])
    assert (with_boxes["loss_distill"] - losses["loss_distill"]).abs() > 1e-4


def test_a_mask_rcnn_distills_with_its_own_masks_and_shows_them_to_the_teacher():
    model = build(tiny_config(REGIONS, "mask", detector="mask_rcnn"))
    losses, _ = losses_at(model, batch=training_batch(detector="mask_rcnn"))
    assert {"loss_mask", "teacher_loss_mask", "loss_distill"} < losses.keys()
    model.eval()
    found = model.detect_from_teacher(training_batch(detector="mask_rcnn"))
    assert len(found) == 2


def test_the_masks_of_a_batch():
    batch = masked_batch()
    objects = ground_truth_objects(batch, 3, STRIDES)
    assert isinstance(objects, MaskedObjects)
    plain = ground_truth_objects(batch, 3)
    assert not isinstance(plain, MaskedObjects)
    assert all(torch.equal(a, b) for a, b in zip(plain, objects, strict=True))
    # As many rows and columns as the largest image needs: 80 x 96 pixels.
    assert {level: x.shape for level, x in objects.masks.items()} == {
        "p2": (3, 3, 20, 24),
        "p4": (3, 3, 5, 6),
        "p6": (3, 3, 2, 2),
    }
    assert torch.equal(objects.masks["p2"].flatten(2).any(2), objects.valid)


@pytest.mark.parametrize("stride", [4, 8, 32])
def test_cells_differ_from_cocos_rasteriser_on_the_outline_alone(stride):
    # It rounds corners to a fifth of a cell. Polygons scaled to cells, as one would call it.
    height, width = 128, 160
    instances = star_shaped(40, height, width)
    objects = ground_truth_objects([{"instances": instances}], 1, {"p": stride})
    differences = 0
    for (polygon,), cells in zip(instances.gt_masks.polygons, objects.masks["p"][0], strict=True):
        rle = pycocotools.mask.frPyObjects([polygon / stride], *cells.shape)
        different = (pycocotools.mask.decode(rle)[..., 0] != cells.numpy()).nonzero()
        centres = (np.stack(different[::-1], axis=1) + 0.5) * stride
        differences += len(centres)
        if len(centres):
            assert distance_to_outline(centres, polygon).max() < 0.3 * stride
    assert differences < 0.05 * objects.masks["p"].numel()
    assert objects.masks["p"].any()


def test_bitmaps_and_polygons_agree_up_to_a_pixel():
    instances = star_shaped(40, 128, 160)
    polygons = instances.gt_masks.polygons
    of_polygons = ground_truth_objects([{"instances": instances}], 1, STRIDES).masks
    instances.gt_masks = bitmaps(instances)
    of_bitmaps = ground_truth_objects([{"instances": instances}], 1, STRIDES).masks
    for level, stride in STRIDES.items():
        different = (of_polygons[level] != of_bitmaps[level])[0].nonzero().numpy()
        for index, row, column in different:
            centre = (np.array([[column, row]]) + 0.5) * stride
            # The middle of the sampled pixel is half a pixel further along both axes.
            assert distance_to_outline(centre, polygons[index][0])[0] < 1.2


def test_objects_smaller_than_a_cell_have_one():
    instances = star_shaped(40, 128, 160, seed=1)
    objects = ground_truth_objects([{"instances": instances}], 1, STRIDES)
    is_lost = ~objects.masks["p6"].flatten(2).any(2)
    assert is_lost.sum() > 5
    for level, stride in STRIDES.items():
        cells = mask_cells(objects, level, (-(-128 // stride), -(-160 // stride)), stride)
        assert cells.flatten(2).any(2).all()
        if level == "p6":
            assert (cells[is_lost].flatten(1).sum(1) == 1).all()


def test_crowd_regions_are_left_out_with_their_masks():
    inputs = training_input(3, detector="mask_rcnn")
    inputs["instances"].gt_iscrowd = torch.tensor([0, 1, 0])
    objects = ground_truth_objects([inputs], 3, STRIDES)
    kept = ground_truth_objects([{"instances": inputs["instances"][[0, 2]]}], 3, STRIDES)
    assert torch.equal(objects.masks["p2"], kept.masks["p2"])


def test_ground_truth_without_masks_is_an_error_in_the_first_batch():
    model = build(tiny_config(REGIONS, "mask"))
    batch = training_batch()
    batch[0]["file_name"] = "dog.jpg"
    message = (
        'MODEL.SSSD.TEACHER.REGIONS is "mask", but the objects of dog.jpg have no gt_masks: '
        ".*MODEL.MASK_ON True.*or set REGIONS to"
    )
    with pytest.raises(KeyError, match=message):
        losses_at(model, batch=batch)
    # No object, no mask, no error: Detectron2's mapper leaves the field out.
    losses_at(model, batch=[training_input(0), training_input(0)])


def test_what_the_error_advises_keeps_the_masks():
    cfg = tiny_config(REGIONS, "mask")
    assert not DatasetMapper(cfg, is_train=True).use_instance_mask
    assert DatasetMapper(cfg, use_instance_mask=True).use_instance_mask
    cfg.MODEL.MASK_ON = True
    assert DatasetMapper(cfg, is_train=True).use_instance_mask


def test_masks_of_another_kind_are_an_error():
    inputs = training_input(2)
    inputs["instances"].gt_masks = ROIMasks(torch.zeros(2, 28, 28))
    with pytest.raises(
        TypeError, match="cannot read the ROIMasks of an image; .*INPUT.MASK_FORMAT"
    ):
        ground_truth_objects([inputs], 3, STRIDES)


def test_a_teacher_that_knows_nothing_of_masks_gets_none():
    model = build(tiny_config("MODEL.SSSD.TEACHER.NAME", "label_map", REGIONS, "mask"))
    losses, _ = losses_at(model)
    assert losses["loss_distill"].isfinite()
