"""What makes the teacher cheaper: fewer images, lower precision, activation checkpointing."""

import copy

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import ImageList

from sssd.meta_arch.precision import _warn_if_slow, computing_in
from tests.detectors import DETECTORS, build, losses_at, tiny_config, training_batch, training_input

FRACTION = "MODEL.SSSD.TEACHER.IMAGE_FRACTION"
PRECISION = "MODEL.SSSD.TEACHER.PRECISION"
ACTIVATION_CHECKPOINT = "MODEL.SSSD.TEACHER.ACTIVATION_CHECKPOINT"


def losses_with(*opts, detector="faster_rcnn"):
    model = build(tiny_config(*opts, detector=detector))
    torch.manual_seed(3)
    with torch.jit.optimized_execution(False):
        losses, _ = losses_at(model, 0, training_batch(detector=detector))
    return model, losses


def gradients(model, losses):
    sum(losses.values()).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("detector", DETECTORS)
def test_the_teacher_learns_from_the_first_images(detector):
    _, expected = losses_with(detector=detector)
    model = build(tiny_config(FRACTION, 0.5, detector=detector))
    passes, taught = [], []
    student_forward, teacher_forward = model.student.forward, model.teacher.forward

    def student(batched_inputs):
        passes.append(len(batched_inputs))
        return student_forward(batched_inputs)

    def teacher(features, objects):
        taught.append((objects.boxes[:, 0], torch.is_grad_enabled()))
        return teacher_forward(features, objects)

    model.student.forward, model.teacher.forward = student, teacher
    batch, from_tensors = training_batch(detector=detector), ImageList.from_tensors
    torch.manual_seed(3)
    with torch.jit.optimized_execution(False):
        losses, _ = losses_at(model, 0, batch)
    assert passes == [2, 1] and ImageList.from_tensors is from_tensors
    for image, (boxes, learns), should in zip(batch, taught, (True, False), strict=True):
        assert torch.equal(boxes, image["instances"].gt_boxes.tensor[:1]) and learns == should
    # The student learns what it did.
    assert losses.keys() == expected.keys()
    for name, value in losses.items():
        if name == "loss_distill":
            torch.testing.assert_close(value, expected[name])
        elif not name.startswith("teacher_"):
            assert torch.equal(value, expected[name]), name


# (Faster R-CNN and its relatives draw other proposals of the two.)
@pytest.mark.parametrize("detector", ["retinanet", "fcos"])
def test_one_of_two_equal_images_teaches_what_both_do(detector):
    steps = []
    for fraction in (1.0, 0.5):
        model = build(tiny_config(FRACTION, fraction, detector=detector))
        image = training_input(3, detector=detector)
        with torch.jit.optimized_execution(False):
            losses, _ = losses_at(model, 0, [image, copy.deepcopy(image)])
            steps.append((losses, gradients(model, losses), model.student.loss_normalizer))
    (expected, theirs, their_normalizer), (losses, ours, normalizer) = steps
    assert normalizer == their_normalizer  # the pass of one image leaves no trace in it
    assert losses.keys() == expected.keys() and ours.keys() == theirs.keys()
    for name, value in losses.items():
        torch.testing.assert_close(value, expected[name], msg=name)
    for name, grad in ours.items():
        torch.testing.assert_close(grad, theirs[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("fraction", "images", "learns_from"), [(0.5, 3, 2), (0.5, 1, 1), (0.1, 2, 1)]
)
def test_the_teacher_learns_from_one_image_at_least(fraction, images, learns_from):
    model = build(tiny_config(FRACTION, fraction))
    passes, forward = [], model.student.forward
    model.student.forward = lambda inputs: passes.append(len(inputs)) or forward(inputs)
    losses_at(model, 0, [training_input(1, seed=i) for i in range(images)])
    assert passes == [images, learns_from]


@pytest.mark.parametrize("detector", DETECTORS)
def test_bfloat16_leaves_the_students_pass_alone(detector):
    plain, expected = losses_with(detector=detector)
    model = build(tiny_config(PRECISION, "bfloat16", detector=detector))
    seen = {"student.backbone": set(), "training_parts": set()}
    for part, dtypes in seen.items():
        for module in model.get_submodule(part).modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(
                    lambda module, inputs, output, dtypes=dtypes: dtypes.add(output.dtype)
                )
    torch.manual_seed(3)
    with torch.jit.optimized_execution(False):
        losses, _ = losses_at(model, 0, training_batch(detector=detector))
    assert seen == {"student.backbone": {torch.float32}, "training_parts": {torch.bfloat16}}
    for name, value in losses.items():
        if name.startswith("teacher_") or name == "loss_distill":
            torch.testing.assert_close(value.float(), expected[name], rtol=0.03, atol=0.01)
        else:
            assert torch.equal(value, expected[name]), name

    ours, theirs = gradients(model, losses), gradients(plain, expected)
    assert ours.keys() == theirs.keys()
    assert all(grad.dtype == torch.float32 for grad in ours.values())
    for part in ("student.", "training_parts.teacher.", "training_parts.distillation."):
        a, b = (
            torch.cat([g.flatten() for name, g in grads.items() if name.startswith(part)])
            for grads in (ours, theirs)
        )
        # (rounding moves the teacher's proposals, and with them what its pass samples)
        assert torch.cosine_similarity(a, b, dim=0) > 0.9, part


def test_mixed_precision_of_the_whole_step_takes_precedence():
    def losses(*opts):
        with torch.autocast("cpu", torch.float16):
            return losses_with(*opts)[1]

    expected = losses()
    for name, value in losses(PRECISION, "bfloat16").items():
        assert torch.equal(value, expected[name]), name


def test_a_device_without_bfloat16_is_named(monkeypatch, caplog):
    _warn_if_slow.cache_clear()
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    for _ in range(2):
        with computing_in("bfloat16", torch.device("cpu")):
            assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    _warn_if_slow.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        "MODEL.SSSD.TEACHER.PRECISION is bfloat16, for which this cpu has no instructions: it is "
        "no faster than float32 there."
    ]


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("detector", DETECTORS)
def test_activation_checkpointing_computes_the_same(detector, fraction):
    plain, expected = losses_with(FRACTION, fraction, detector=detector)
    model, losses = losses_with(FRACTION, fraction, ACTIVATION_CHECKPOINT, True, detector=detector)
    calls = []
    convolution = model.training_parts["distillation"].adapter[0]
    convolution.register_forward_hook(lambda *args: calls.append(args))
    for name, value in losses.items():
        assert torch.equal(value, expected[name]), name
    ours, theirs = gradients(model, losses), gradients(plain, expected)
    assert ours.keys() == theirs.keys()
    for name, grad in ours.items():
        assert torch.equal(grad, theirs[name]), name
    # A second time for the gradients, on each of the levels.
    assert len(calls) == len(model.teacher.strides)


@pytest.mark.parametrize(
    ("opts", "sentence"),
    [
        ([FRACTION, 0.0], "TEACHER.IMAGE_FRACTION has to be above 0 and at most 1, got 0.0"),
        ([FRACTION, 1.5], "TEACHER.IMAGE_FRACTION has to be above 0 and at most 1, got 1.5"),
        ([PRECISION, "float16"], "TEACHER.PRECISION is 'float16': it has to be one of float32, bf"),
    ],
)
def test_bad_values_are_named(opts, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_model(tiny_config(*opts))
