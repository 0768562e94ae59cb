"""What makes the teacher cheaper: lower precision, activation checkpointing."""

import pytest
import torch
from detectron2.modeling import build_model

from sssd.meta_arch.precision import _warn_if_slow, computing_in
from tests.detectors import DETECTORS, build, losses_at, tiny_config, training_batch

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


@pytest.mark.parametrize("detector", DETECTORS)
def test_activation_checkpointing_computes_the_same(detector):
    plain, expected = losses_with(detector=detector)
    model, losses = losses_with(ACTIVATION_CHECKPOINT, True, detector=detector)
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


def test_an_unknown_precision_is_named():
    sentence = "TEACHER.PRECISION is 'float16': it has to be one of float32, bf"
    with pytest.raises(ValueError, match=sentence):
        build_model(tiny_config(PRECISION, "float16"))
