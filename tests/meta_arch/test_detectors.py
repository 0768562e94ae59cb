"""What holds for every detector with a pyramid, through the one SelfDistiller."""

import pytest
import torch
from detectron2.engine.hooks import PreciseBN
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage, get_event_storage
from torch import nn

from sssd import Phases, distill
from sssd.losses import coefficient_schedule
from sssd.meta_arch.build import check_calls_backbone
from sssd.meta_arch.passes import AnchorMatching
from tests.detectors import (
    DETECTORS,
    build,
    losses_at,
    tiny_config,
    train,
    training_batch,
    training_input,
)

DENSE = ("retinanet", "fcos")


def batch_with_empty_image(detector, seed=0):
    return [*training_batch(seed, detector), training_input(0, 70, 90, seed, detector=detector)]


@pytest.mark.parametrize("detector", DETECTORS)
def test_student_losses_are_the_stock_ones_and_every_parameter_learns(detector):
    plain = build(tiny_config(detector=detector, distilled=False))
    model = build(tiny_config(detector=detector))
    assert type(model.student) is type(plain)
    batch = batch_with_empty_image(detector)
    torch.manual_seed(3)
    expected, _ = losses_at(plain, batch=batch)
    torch.manual_seed(3)
    losses, _ = losses_at(model, batch=batch)

    assert set(losses) == {*expected, *(f"teacher_{k}" for k in expected), "loss_distill"}
    for name, value in expected.items():
        assert torch.equal(losses[name], value), name
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    # from its own loss, not from a term of weight zero
    assert all(p.grad.abs().sum() > 0 for p in model.teacher.painter.refinement.parameters())


@pytest.mark.parametrize("detector", DETECTORS)
def test_wrapping_a_built_detector_is_the_same_as_building_from_yacs(detector):
    model = build(tiny_config(detector=detector))
    detector_alone = build(tiny_config(detector=detector, distilled=False))
    wrapped = distill(
        detector_alone,
        coefficient=coefficient_schedule("constant", values=[10.0]),
        phases=Phases(max_iter=100),
    ).train()
    results = []
    for m in (model, wrapped):
        torch.manual_seed(3)
        results.append(losses_at(m, batch=training_batch(detector=detector))[0])
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


@pytest.mark.parametrize("detector", DETECTORS)
def test_evaluation_is_bit_equal_to_the_stock_detector(detector):
    plain = build(tiny_config(detector=detector, distilled=False)).eval()
    model = build(tiny_config(detector=detector)).eval()
    low = {"test_score_thresh": 0.0}  # so that an untrained dense detector detects something
    for m in (plain, model.student):
        m.__dict__.update({k: v for k, v in low.items() if k in m.__dict__})
    inputs = [{k: v for k, v in training_input(2).items() if k != "instances"}]
    with torch.no_grad():
        (a,), (b,) = plain(inputs), model(inputs)
    assert len(a["instances"]) > 0 and a.keys() == b.keys()
    fields = a["instances"].get_fields()
    assert fields.keys() == b["instances"].get_fields().keys()
    for name, value in fields.items():
        other = b["instances"].get(name)
        value, other = getattr(value, "tensor", value), getattr(other, "tensor", other)
        assert torch.equal(value, other), name


@pytest.mark.parametrize(("key", "value"), [("LOSS_WEIGHT", 0.0), ("TRAINS_HEADS", False)])
@pytest.mark.parametrize("detector", DENSE)
def test_switched_off_distillation_equals_plain_detectron2_bit_for_bit(detector, key, value):
    batches = [batch_with_empty_image(detector, i % 4) for i in range(18)]
    batches[3] = batches[7] = [training_input(0), training_input(0, 80, 64)]
    off = ["MODEL.SSSD.COEFFICIENT.VALUES", [0.0], f"MODEL.SSSD.TEACHER.{key}", value]
    cfg = tiny_config(detector=detector, distilled=False)
    plain = train(cfg, batches)
    switched_off = train(tiny_config(*off, detector=detector), batches)
    initial = build(cfg, seed=1).state_dict()
    state = switched_off.state_dict()
    assert list(state) == list(plain.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(state[name], value), name
    assert not torch.equal(state["head.cls_score.weight"], initial["head.cls_score.weight"])
    assert switched_off.student.loss_normalizer == plain.loss_normalizer


# ---- The replayed pass leaves no trace ----


@pytest.mark.parametrize("detector", DENSE)
def test_loss_normaliser_moves_once_an_iteration(detector):
    plain = build(tiny_config(detector=detector, distilled=False))
    model = build(tiny_config(detector=detector))
    for seed in range(3):
        for m in (plain, model):
            losses_at(m, batch=training_batch(seed))
        assert model.student.loss_normalizer == plain.loss_normalizer


def test_statistics_of_batchnorm_in_the_head_see_the_student_pass_only():
    # One BatchNorm for each level, taken in turn: the turn is state as well.
    opts = ["MODEL.RETINANET.NORM", "BN"]
    plain = build(tiny_config(*opts, detector="retinanet", distilled=False))
    model = build(tiny_config(*opts, detector="retinanet"))
    for m in (plain, model):
        losses, _ = losses_at(m)
        sum(losses.values()).backward()
    buffers = dict(model.student.named_buffers())
    for name, value in plain.named_buffers():
        assert torch.equal(value, buffers[name]), name
    norm = plain.head.cls_subnet[1]
    assert not torch.equal(norm[0].running_mean, torch.zeros(64))


@pytest.mark.parametrize(
    ("detector", "method"),
    [
        ("faster_rcnn", "proposal_generator.label_and_sample_anchors"),
        ("retinanet", "label_anchors"),
        ("fcos", "label_anchors"),
    ],
)
def test_anchors_are_matched_once(detector, method, monkeypatch):
    model = build(tiny_config(detector=detector))
    *path, name = method.split(".")
    owner = model.student.get_submodule(".".join(path))
    original, calls = getattr(type(owner), name), []

    def counted(self, *args):
        calls.append(1)
        return original(self, *args)

    monkeypatch.setattr(type(owner), name, counted)
    first, _ = losses_at(model, batch=batch_with_empty_image(detector))
    assert len(calls) == 1
    assert name not in vars(owner)

    # What is shared is what would have been computed.
    monkeypatch.setattr(type(owner), name, original)
    monkeypatch.setattr("sssd.meta_arch.passes.AnchorMatching.METHODS", ())
    if detector != "faster_rcnn":  # the RPN's sample is random
        alone, _ = losses_at(
            build(tiny_config(detector=detector)), batch=batch_with_empty_image(detector)
        )
        for loss in first:
            if "teacher" in loss:
                model.student.__dict__.pop("loss_normalizer", None)
                assert torch.equal(first[loss], alone[loss]), loss


def test_only_matching_with_the_ground_truth_alone_is_shared():
    class Dense(nn.Module):
        def label_anchors(self, anchors, gt_instances, scores=()):
            return object()

    dense, gt = Dense(), [training_input(2)["instances"]]
    anchors, others = [Boxes(torch.rand(5, 4))], [Boxes(torch.rand(6, 4))]
    matching = AnchorMatching(dense)
    with matching.recorded():
        first, second = dense.label_anchors(anchors, gt), dense.label_anchors(others, gt)
        predicted = dense.label_anchors(anchors, gt, [torch.rand(5, 3)])
    with matching.answered():
        assert dense.label_anchors(anchors, gt, [torch.rand(5, 3)]) is not predicted
        assert dense.label_anchors(anchors, gt) is first
        assert dense.label_anchors(anchors, gt) is not second  # of other anchors
        assert dense.label_anchors(others, gt) is second
    assert vars(dense).keys() == vars(Dense()).keys()


class _Drawing(nn.Module):
    """A part of a detector that logs whatever VIS_PERIOD says."""

    def forward(self, x):
        storage = get_event_storage()
        storage.put_image("features", torch.zeros(3, 2, 2))
        storage.put_histogram("values", torch.arange(4.0))
        storage.put_scalar("count", 1.0)
        return x


def test_nothing_is_logged_twice_under_one_name():
    model = build(tiny_config("VIS_PERIOD", 1))
    model.student.roi_heads.box_head.add_module("drawing", _Drawing())
    _, storage = losses_at(model)
    names = [name for name, *_ in storage._vis_data]
    assert len(names) == len(set(names)) == 2  # the detector's own picture is the other
    assert [h["tag"] for h in storage._histograms] == ["values"]
    for name in ("count", "teacher/count"):
        assert len(storage.history(name).values()) == 1
    assert model.student.vis_period == 1


def test_precise_bn_gets_the_statistics_of_the_plain_detector():
    # In a storage of its own, at iteration 0, where the phases freeze the backbone.
    frozen = ["MODEL.SSSD.PHASES.FREEZE_BACKBONE_ITERS", 100]
    models = [build(tiny_config(distilled=False)), build(tiny_config(*frozen))]
    for model in models:
        with EventStorage(50) as storage:
            hook = PreciseBN(1, model, [training_batch(i) for i in range(4)], 3)
            hook.trainer = type("Trainer", (), {"iter": 0, "max_iter": 1, "storage": storage})
            hook.update_stats()
            assert storage.latest() == {}
    buffers = dict(models[1].student.named_buffers())
    for name, value in models[0].named_buffers():
        assert torch.equal(value, buffers[name]), name
    assert buffers["backbone.bottom_up.stem.conv1.norm.running_mean"].abs().sum() > 0


@pytest.mark.parametrize("detector", ["faster_rcnn", "cascade_rcnn"])
def test_teacher_maps_that_are_not_finite_are_named(detector):
    model = build(tiny_config(detector=detector))
    with torch.no_grad():
        model.teacher.painter.object_projection.bias[0] = torch.inf
    with pytest.raises(FloatingPointError, match=r"teacher's maps p2, p3.* infinite or NaN"):
        losses_at(model)


# ---- What cannot be wrapped ----


def test_a_detector_that_never_calls_its_backbone_is_refused_when_it_is_built():
    class Direct(nn.Module):
        def __init__(self, student):
            super().__init__()
            self.backbone = student.backbone

        def forward(self, batched_inputs):
            return self.backbone.bottom_up(batched_inputs[0]["image"][None].float())

    direct = Direct(build(tiny_config(distilled=False)))
    with pytest.raises(ValueError, match=r"Direct does not call its backbone as a module"):
        check_calls_backbone(direct)
    assert direct.training and not direct.backbone._forward_pre_hooks


def test_looking_whether_the_backbone_is_called_changes_nothing():
    plain = build(tiny_config(distilled=False))
    before = {k: v.clone() for k, v in plain.state_dict().items()}
    plain.backbone.bottom_up.stem.eval()
    check_calls_backbone(plain)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, before[name])
    assert plain.training and not plain.backbone.bottom_up.stem.training


def test_backbone_that_returns_no_dict_is_named():
    model = build(tiny_config())
    forward = model.student.backbone.forward
    model.student.backbone.forward = lambda x: tuple(forward(x).values())
    with pytest.raises(TypeError, match="The backbone FPN returns a tuple"):
        losses_at(model)


# ---- FCOS from yacs ----


def test_fcos_is_detectron2s_own_class_with_its_own_defaults():
    cfg = tiny_config("MODEL.SSSD.FCOS.NUM_CONVS", 2, detector="fcos", distilled=False)
    model = META_ARCH_REGISTRY.get("Detectron2FCOS")(cfg)
    assert type(model) is FCOS
    assert model.backbone.top_block.in_feature == "p5"
    assert model.head_in_features == ["p3", "p4", "p5", "p6", "p7"]
    assert isinstance(model.head.cls_subnet[1], nn.GroupNorm)
    settings = (model.test_score_thresh, model.test_nms_thresh, model.center_sampling_radius)
    assert settings == (0.2, 0.6, 1.5)

    cfg.MODEL.SSSD.FCOS.TOP_BLOCK_IN_FEATURE = "res5"
    explicit = META_ARCH_REGISTRY.get("Detectron2FCOS")(cfg)
    cfg.MODEL.SSSD.FCOS.TOP_BLOCK_IN_FEATURE = ""
    as_built = META_ARCH_REGISTRY.get("Detectron2FCOS")(cfg)
    assert explicit.backbone.top_block.in_feature == "res5"
    assert {k: v.shape for k, v in explicit.state_dict().items()} == {
        k: v.shape for k, v in as_built.state_dict().items()
    }


def test_fcos_with_another_backbone_needs_the_key_cleared():
    cfg = tiny_config("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", detector="fcos")
    with pytest.raises(ValueError, match=r"TOP_BLOCK_IN_FEATURE works with.*set the key to ''"):
        build(cfg)


@pytest.mark.parametrize("source", ["p4", "res4", "p6", " "])
def test_fcos_makes_its_top_levels_of_the_coarsest_map(source):
    cfg = tiny_config("MODEL.SSSD.FCOS.TOP_BLOCK_IN_FEATURE", source, detector="fcos")
    with pytest.raises(ValueError, match=rf"TOP_BLOCK_IN_FEATURE is '{source}': .* 'p5' or 'res5'"):
        build(cfg)
