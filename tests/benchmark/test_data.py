"""Generated batches, random weights that behave, and configs that share both."""

import math

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.structures import BitMasks

import sssd  # noqa: F401  (before Detectron2: it applies the compatibility layer)
from sssd.benchmark.data import GeneratedData, generate_batches
from sssd.benchmark.jobs import Job, Setting
from sssd.benchmark.training import TrainingInTurns
from sssd.benchmark.weights import calibrate_normalisation
from tests.detectors import build, tiny_config, training_batch

DATA = GeneratedData(height=64, width=96, objects=3, num_batches=2)


def tiny_job(*opts, data=DATA, **kwargs):
    return Job("tiny", "tiny.yaml", "", tiny_config(*opts, **kwargs), Setting(data=data))


def boxes_of(batches):
    return torch.stack([x["instances"].gt_boxes.tensor for batch in batches for x in batch])


def test_batches_have_the_size_and_the_objects_that_were_asked_for():
    data = GeneratedData(height=128, width=320, objects=50, num_batches=3)
    batches = generate_batches(data, batch_size=2, num_classes=4)
    assert [len(batch) for batch in batches] == [2, 2, 2]
    images = [x for batch in batches for x in batch]
    assert {(x["image"].dtype, x["image"].shape) for x in images} == {(torch.uint8, (3, 128, 320))}
    assert len({x["image"].sum().item() for x in images}) == 6
    classes = torch.cat([x["instances"].gt_classes for x in images])
    assert len(classes) == 300 and classes.unique().tolist() == [0, 1, 2, 3]
    boxes = boxes_of(batches)
    assert boxes.min() >= 0 and (boxes <= torch.tensor([320, 128, 320, 128])).all()
    sides = (boxes[..., 2:] - boxes[..., :2]) / torch.tensor([320, 128])
    assert sides.min() > 1 / 16 - 1e-4 and sides.max() < 1 / 2 + 1e-4
    # Log-uniform: the median is the geometric mean of the ends.
    assert sides.median().log().item() == pytest.approx(math.log(1 / 32) / 2, abs=0.2)


def test_images_depend_on_neither_batch_size_nor_classes_nor_masks():
    twos = generate_batches(DATA, batch_size=2, num_classes=3)
    ones = generate_batches(DATA, batch_size=1, num_classes=80, mask_format="polygon")
    assert torch.equal(twos[0][0]["image"], ones[0][0]["image"])
    assert torch.equal(twos[0][1]["image"], ones[1][0]["image"])
    assert torch.equal(boxes_of(twos)[:2], boxes_of(ones))
    again = generate_batches(DATA, batch_size=2, num_classes=3)
    assert torch.equal(boxes_of(twos), boxes_of(again))
    assert not torch.equal(boxes_of(twos)[:2], boxes_of(twos)[2:])


def test_masks_fill_their_boxes():
    kinds = {}
    for kind in ("polygon", "bitmask"):
        ((image,),) = generate_batches(
            GeneratedData(64, 96, 3, num_batches=1), batch_size=1, num_classes=1, mask_format=kind
        )
        kinds[kind] = image["instances"]
    polygons, bitmasks = kinds["polygon"].gt_masks, kinds["bitmask"].gt_masks
    area = kinds["polygon"].gt_boxes.area()
    assert torch.allclose(torch.as_tensor(polygons.area()).float(), area, rtol=1e-4)
    assert isinstance(bitmasks, BitMasks) and bitmasks.tensor.shape == (3, 64, 96)
    assert torch.allclose(bitmasks.tensor.sum((1, 2)).float(), area, rtol=0.25)


def test_configs_see_the_same_batches_and_start_from_the_same_student():
    norm = ("MODEL.RESNETS.NORM", "FrozenBN")
    seen, states = {}, {}
    for distilled in (False, True):
        with TrainingInTurns(tiny_job(*norm, distilled=distilled)) as training:
            calls = seen[distilled] = []
            model = training.model
            model.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(args[0]))
            states[distilled] = {k: v.clone() for k, v in model.state_dict().items()}
            assert training.run(3)["batch_size"] == 2
    fresh = generate_batches(DATA, batch_size=2, num_classes=3)
    for batches in seen.values():
        assert batches[2] is batches[0]  # gone through again and again
        for batch, expected in zip(batches, fresh, strict=False):
            for x, y in zip(batch, expected, strict=True):
                assert torch.equal(x["image"], y["image"])
                for name in ("gt_boxes", "gt_classes"):
                    a, b = x["instances"].get(name), y["instances"].get(name)
                    assert torch.equal(getattr(a, "tensor", a), getattr(b, "tensor", b))
    assert states[False].keys() == states[True].keys()
    for name, value in states[False].items():
        assert torch.equal(value, states[True][name]), name


def test_frozen_normalisation_gives_unit_variance_once_it_is_calibrated():
    model = build(tiny_config("MODEL.RESNETS.NORM", "FrozenBN", distilled=False))
    random_state = torch.get_rng_state()
    batch = training_batch()[:1]
    count = calibrate_normalisation(model, batch)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training
    layers = [m for m in model.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert len(layers) < count  # that of the FPN is not frozen
    spread = []
    for layer in layers:
        layer.register_forward_hook(
            lambda _, inputs, out: spread.append((out.mean().item(), out.std().item()))
        )
    model.eval()
    model(batch)
    assert len(spread) == len(layers)
    for mean, std in spread:
        assert abs(mean) < 1e-3 and std == pytest.approx(1, abs=0.02)


def test_the_parts_of_a_batch_make_one_step():
    with TrainingInTurns(tiny_job("MODEL.SSSD.SOLVER.BATCH_PARTS", 2)) as training:
        sizes = []
        training.model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
        assert training.run(2)["batch_size"] == 2
        assert sizes == [1, 1, 1, 1] and training.batches.take() == []


def test_float16_is_warmed_up_until_its_loss_scale_stays():
    precision = ("SOLVER.AMP.ENABLED", True, "MODEL.SSSD.SOLVER.AMP_PRECISION", "float16")
    data = GeneratedData(height=64, width=64, objects=1, num_batches=1)
    job = tiny_job(*precision, distilled=False, data=data)
    with TrainingInTurns(job) as training:
        scaler = training.trainer._trainer.scaler
        scaler._init_scale = 2.0**20  # overflows
        training.warm_up(1)
        warm = scaler.get_scale()
        assert warm < 2.0**20
        training.run(1)
        assert scaler.get_scale() == warm
