"""What makes the teacher cheaper: learning seldom, lower precision, activation checkpointing."""

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model

from sssd.engine import build_optimizer
from sssd.meta_arch import Phases
from sssd.meta_arch.precision import _warn_if_slow, computing_in
from tests.detectors import DETECTORS, build, losses_at, tiny_config, training_batch

PERIOD = "MODEL.SSSD.PHASES.TEACHER_PERIOD"
PRECISION = "MODEL.SSSD.TEACHER.PRECISION"
ACTIVATION_CHECKPOINT = "MODEL.SSSD.TEACHER.ACTIVATION_CHECKPOINT"


def losses_with(*opts, iteration=0, detector="faster_rcnn", distilled=True):
    model = build(tiny_config(*opts, detector=detector, distilled=distilled))
    torch.manual_seed(3)
    with torch.jit.optimized_execution(False):
        losses, storage = losses_at(model, iteration, training_batch(detector=detector))
    return model, losses, storage


def test_the_teacher_learns_in_every_so_many_iterations():
    phases = Phases(max_iter=10, teacher_period=3)
    assert [i for i in range(10) if phases.teaches(i)] == [0, 3, 6, 9]
    scaled = Phases.scaled(
        90_000, no_distill_iters=4, freeze_backbone_iters=2, distill_off_iters=0, teacher_period=3
    )
    assert (scaled.no_distill_iters, scaled.teacher_period) == (2, 3)
    assert all(Phases(max_iter=10).teaches(i) for i in range(10))


@pytest.mark.parametrize("detector", DETECTORS)
def test_where_the_teacher_does_not_learn_the_student_learns_from_it_as_it_is(detector):
    faithful, expected, _ = losses_with(detector=detector)
    model, losses, storage = losses_with(PERIOD, 2, iteration=1, detector=detector)
    assert list(losses) == [name for name in expected if not name.startswith("teacher_")]
    for name, value in losses.items():
        assert torch.equal(value, expected[name]), name
    assert not any(name.startswith("teacher") for name in storage.latest())

    # The gradients are those of a faithful step without the losses of the teacher's pass.
    with torch.jit.optimized_execution(
        False
    ):  # (the scripted focal loss rounds otherwise at first)
        sum(losses.values()).backward()
        sum(expected[name] for name in losses).backward()
    of_expected = dict(faithful.named_parameters())
    for name, parameter in model.named_parameters():
        if not name.startswith("training_parts.teacher.") and parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, of_expected[name].grad, msg=name)
    # DistributedDataParallel waits for all gradients.
    assert all(not p.grad.any() for p in model.teacher.parameters() if p.requires_grad)


def test_a_controlled_share_is_that_of_the_whole_cycle():
    controller = {
        "MODEL.SSSD.COEFFICIENT.SCHEDULE": "share", "MODEL.SSSD.COEFFICIENT.SHARE": 0.4,
        "MODEL.SSSD.COEFFICIENT.VALUES": [0.0, 1e6], PERIOD: 2,
    }  # fmt: skip
    model = build(tiny_config(*(x for pair in controller.items() for x in pair)))
    totals = []
    for iteration in range(400):  # 2 % of each go into the averages
        with torch.no_grad():
            detection = 3.0 if model.phases.teaches(iteration) else 1.0
            coefficient = model.training_parts["coefficient"](*map(torch.tensor, (detection, 0.5)))
        totals.append((detection, coefficient.item() * 0.5))
    detection, distillation = map(sum, zip(*totals[-50:], strict=True))
    assert distillation / (detection + distillation) == pytest.approx(0.4, abs=2e-3)


def test_where_the_teacher_does_not_learn_it_stays_as_it_is():
    cfg = tiny_config(PERIOD, 2, "SOLVER.WEIGHT_DECAY", 0.1)
    model = build(cfg)
    optimizer = build_optimizer(cfg, model)
    seen = []

    def remember():
        parts = {n: p.detach().clone() for n, p in model.teacher.named_parameters()}
        others = (
            model.student.backbone.bottom_up.stem.conv1,
            model.training_parts["distillation"].adapter[0],
        )
        seen.append((parts, [layer.weight.detach().clone() for layer in others]))

    class Trainer(SimpleTrainer):
        def after_step(self):
            super().after_step()
            remember()

    remember()
    Trainer(model, [training_batch(i) for i in range(4)], optimizer).train(0, 4)
    for iteration in range(4):
        (parts, others), (later, others_later) = seen[iteration], seen[iteration + 1]
        same = {name: torch.equal(value, later[name]) for name, value in parts.items()}
        assert all(same.values()) if iteration % 2 else not any(same.values()), iteration
        assert not any(map(torch.equal, others, others_later))


def gradients(model, losses):
    sum(losses.values()).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("detector", DETECTORS)
def test_bfloat16_leaves_the_students_pass_alone(detector):
    plain, expected, _ = losses_with(detector=detector)
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


@pytest.mark.parametrize("period", [1, 2])
@pytest.mark.parametrize("detector", DETECTORS)
def test_activation_checkpointing_computes_the_same(detector, period):
    plain, expected, _ = losses_with(PERIOD, period, iteration=1, detector=detector)
    model, losses, _ = losses_with(
        PERIOD, period, ACTIVATION_CHECKPOINT, True, iteration=1, detector=detector
    )
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
        ([PERIOD, 0], "TEACHER_PERIOD must be >= 1, got 0"),
        ([PRECISION, "float16"], "TEACHER.PRECISION is 'float16': it has to be one of float32, bf"),
    ],
)
def test_bad_values_are_named(opts, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_model(tiny_config(*opts))
