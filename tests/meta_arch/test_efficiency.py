"""What makes the teacher cheaper: learning seldom, and fewer RoIs in its pass."""

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model

from sssd.engine import build_optimizer
from sssd.meta_arch import Phases
from tests.detectors import DETECTORS, build, losses_at, tiny_config, training_batch

PERIOD = "MODEL.SSSD.PHASES.TEACHER_PERIOD"
ROI_FRACTION = "MODEL.SSSD.TEACHER.ROI_FRACTION"


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


@pytest.mark.parametrize(("fraction", "count"), [(0.25, 4), (0.5, 8), (0.01, 1)])
def test_the_teachers_pass_samples_a_fraction_of_the_rois(fraction, count):
    # 16 an image, of which as many as there are show objects up to a quarter.
    model, losses, storage = losses_with(ROI_FRACTION, fraction)
    _, expected, _ = losses_with()
    latest = {name: value for name, (value, _) in storage.latest().items()}
    assert latest["roi_head/num_fg_samples"] + latest["roi_head/num_bg_samples"] == 16
    of_teacher = [latest[f"teacher/roi_head/num_{kind}_samples"] for kind in ("fg", "bg")]
    assert sum(of_teacher) == count
    for name in ("loss_cls", "loss_box_reg", "teacher_loss_rpn_cls", "loss_distill"):
        assert torch.equal(losses[name], expected[name]), name
    assert "batch_size_per_image" in vars(model.student.roi_heads)
    assert model.student.roi_heads.batch_size_per_image == 16


def test_a_detector_without_rois_takes_no_notice():
    _, losses, _ = losses_with(ROI_FRACTION, 0.25, detector="retinanet")
    _, expected, _ = losses_with(detector="retinanet")
    for name, value in expected.items():
        assert torch.equal(losses[name], value), name


@pytest.mark.parametrize(
    ("opts", "sentence"),
    [
        ([PERIOD, 0], "TEACHER_PERIOD must be >= 1, got 0"),
        ([ROI_FRACTION, 0.0], "ROI_FRACTION must be above 0 and at most 1, got 0.0"),
        ([ROI_FRACTION, 1.5], "ROI_FRACTION must be above 0 and at most 1, got 1.5"),
    ],
)
def test_bad_values_are_named(opts, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_model(tiny_config(*opts))
