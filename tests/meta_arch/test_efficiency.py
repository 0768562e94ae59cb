"""What makes the teacher cheaper: taking part seldom, and fewer RoIs in its pass."""

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model

from sssd.engine import build_optimizer
from sssd.meta_arch import Phases
from tests.detectors import DETECTORS, build, losses_at, tiny_config, training_batch

PERIOD = "MODEL.SSSD.PHASES.PERIOD"
ROI_FRACTION = "MODEL.SSSD.TEACHER.ROI_FRACTION"


def losses_with(*opts, iteration=0, detector="faster_rcnn", distilled=True):
    model = build(tiny_config(*opts, detector=detector, distilled=distilled))
    torch.manual_seed(3)
    with torch.jit.optimized_execution(False):
        losses, storage = losses_at(model, iteration, training_batch(detector=detector))
    return model, losses, storage


def test_the_teacher_takes_part_in_every_so_many_iterations():
    phases = Phases(max_iter=10, period=3)
    assert [i for i in range(10) if phases.has_teacher(i)] == [0, 3, 6, 9]
    scaled = Phases.scaled(
        90_000, no_distill_iters=4, freeze_backbone_iters=2, distill_off_iters=0, period=3
    )
    assert (scaled.no_distill_iters, scaled.period) == (2, 3)
    assert all(Phases(max_iter=10).has_teacher(i) for i in range(10))


def test_where_the_teacher_takes_part_it_counts_as_many_times():
    _, once, _ = losses_with()
    _, thrice, _ = losses_with(PERIOD, 3)
    assert set(once) == set(thrice)
    for name, value in once.items():
        factor = 3 if name.startswith("teacher_") or name == "loss_distill" else 1
        torch.testing.assert_close(thrice[name], factor * value)


def test_a_controlled_share_is_that_of_the_whole_cycle():
    options = (
        "MODEL.SSSD.COEFFICIENT.SCHEDULE", "share", "MODEL.SSSD.COEFFICIENT.VALUES", [0.0, 1e6],
        "MODEL.SSSD.COEFFICIENT.SHARE", 0.4, PERIOD, 3,
    )  # fmt: skip
    _, losses, _ = losses_with(*options)
    own = sum(x for name, x in losses.items() if name.startswith("loss_") and "distill" not in name)
    cycle = sum(losses.values()) + 2 * own  # and two iterations of the student alone
    assert (losses["loss_distill"] / cycle).item() == pytest.approx(0.4, rel=1e-5)


@pytest.mark.parametrize("detector", DETECTORS)
def test_an_iteration_without_the_teacher_is_the_plain_detectors(detector):
    plain, expected, _ = losses_with(detector=detector, distilled=False)
    model, losses, storage = losses_with(PERIOD, 2, iteration=1, detector=detector)
    assert list(losses) == list(expected)
    for name, value in expected.items():
        assert torch.equal(losses[name], value), name
    assert not any(name.startswith("teacher") for name in storage.latest())

    # (The scripted focal loss rounds otherwise in its first calls.)
    with torch.jit.optimized_execution(False):
        sum(expected.values()).backward()
        sum(losses.values()).backward()
    gradients = dict(model.student.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(gradients[name].grad, parameter.grad), name
    # DistributedDataParallel waits for all gradients.
    assert all(not p.grad.any() for p in model.training_parts.parameters() if p.requires_grad)


def test_an_iteration_without_the_teacher_leaves_its_parts_as_they_are():
    cfg = tiny_config(PERIOD, 2, "SOLVER.WEIGHT_DECAY", 0.1)
    model = build(cfg)
    optimizer = build_optimizer(cfg, model)
    seen = []

    def remember():
        parts = {n: p.detach().clone() for n, p in model.training_parts.named_parameters()}
        seen.append((parts, model.student.backbone.bottom_up.stem.conv1.weight.detach().clone()))

    class Trainer(SimpleTrainer):
        def after_step(self):
            super().after_step()
            remember()

    remember()
    Trainer(model, [training_batch(i) for i in range(4)], optimizer).train(0, 4)
    for iteration in range(4):
        (parts, stem), (later, later_stem) = seen[iteration], seen[iteration + 1]
        same = {name: torch.equal(value, later[name]) for name, value in parts.items()}
        assert all(same.values()) if iteration % 2 else not any(same.values()), iteration
        assert not torch.equal(stem, later_stem)


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
        ([PERIOD, 0], "PERIOD must be >= 1, got 0"),
        ([ROI_FRACTION, 0.0], "ROI_FRACTION must be above 0 and at most 1, got 0.0"),
        ([ROI_FRACTION, 1.5], "ROI_FRACTION must be above 0 and at most 1, got 1.5"),
    ],
)
def test_bad_values_are_named(opts, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_model(tiny_config(*opts))
