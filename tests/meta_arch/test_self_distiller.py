import copy

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from sssd.meta_arch.build import build_phases
from sssd.meta_arch.ground_truth import CROWD_FIELDS, ground_truth_objects
from tests.detectors import build, losses_at, tiny_config, train, training_batch, training_input


def grads(model_part):
    return [p.grad for p in model_part.parameters()]


def has_gradient(module):
    return any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


# ---- The loss dict ----


def test_loss_dict_names_and_weighting():
    model = build(tiny_config())
    losses, _ = losses_at(model)
    own = {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
    assert set(losses) == own | {f"teacher_{name}" for name in own} | {"loss_distill"}
    # weighted exactly once
    assert losses["loss_distill"].item() == pytest.approx(10 * float(model.last_distance))


def test_student_losses_are_those_of_the_stock_detector():
    plain = build(tiny_config(distilled=False))
    model = build(tiny_config())
    torch.manual_seed(3)
    expected, _ = losses_at(plain)
    torch.manual_seed(3)
    losses, _ = losses_at(model)
    for name, value in expected.items():
        assert torch.equal(losses[name], value), name


def test_teacher_loss_weight_scales_the_teacher_losses():
    results = []
    for weight in (1.0, 0.25):
        torch.manual_seed(0)
        model = build(tiny_config("MODEL.SSSD.TEACHER.LOSS_WEIGHT", weight))
        torch.manual_seed(3)
        results.append(losses_at(model)[0])
    for name in results[0]:
        factor = 0.25 if name.startswith("teacher_") else 1.0
        assert results[1][name].item() == pytest.approx(factor * results[0][name].item()), name


# ---- Distillation off equals plain Detectron2 ----


# With the second, the teacher learns all the same; but nothing of it reaches the student.
@pytest.mark.parametrize(("key", "value"), [("LOSS_WEIGHT", 0.0), ("TRAINS_HEADS", False)])
def test_switched_off_distillation_equals_plain_detectron2_bit_for_bit(key, value):
    plain = train(tiny_config(distilled=False))
    off = train(
        tiny_config("MODEL.SSSD.COEFFICIENT.VALUES", [0.0], f"MODEL.SSSD.TEACHER.{key}", value)
    )
    initial = build(tiny_config(distilled=False), seed=1)
    state = off.state_dict()
    assert list(state) == list(plain.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(state[name], value), name
    moved = [
        n
        for n, p in plain.named_parameters()
        if not torch.equal(p, dict(initial.named_parameters())[n])
    ]
    assert moved  # the comparison is of trained weights


def test_distillation_on_does_change_the_student():
    plain = train(tiny_config(distilled=False), steps=2)
    on = train(tiny_config(), steps=2)
    name = "backbone.bottom_up.res4.0.conv1.weight"
    assert not torch.equal(on.state_dict()[name], plain.state_dict()[name])


# ---- Gradient paths ----


def distill_gradients(cfg, iteration=0):
    model = build(cfg)
    losses, _ = losses_at(model, iteration)
    losses["loss_distill"].backward()
    return model


def test_distance_trains_student_and_adapter_but_neither_teacher_nor_heads():
    model = distill_gradients(tiny_config())
    assert has_gradient(model.student.backbone)
    assert has_gradient(model.training_parts["distillation"])
    assert all(g is None for g in grads(model.teacher))
    assert all(g is None for g in grads(model.student.roi_heads))


def test_without_distillation_phase_trains_the_adapter_only():
    cfg = tiny_config("MODEL.SSSD.PHASES.NO_DISTILL_ITERS", 5)
    before = distill_gradients(cfg, iteration=4)
    assert all(g is None for g in grads(before.student))
    assert has_gradient(before.training_parts["distillation"])
    after = distill_gradients(cfg, iteration=5)
    assert has_gradient(after.student.backbone)


def test_last_iterations_without_distillation():
    cfg = tiny_config("MODEL.SSSD.PHASES.DISTILL_OFF_ITERS", 10, "SOLVER.MAX_ITER", 100)
    assert has_gradient(distill_gradients(cfg, iteration=89).student.backbone)
    assert all(g is None for g in grads(distill_gradients(cfg, iteration=90).student))


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("detach", [True, False])
def test_teacher_loss_reaches_what_it_may(detach, heads):
    model = build(
        tiny_config(
            "MODEL.SSSD.TEACHER.DETACH_APPEARANCE", detach, "MODEL.SSSD.TEACHER.TRAINS_HEADS", heads
        )
    )
    losses, _ = losses_at(model)
    teacher_loss = sum(v for k, v in losses.items() if k.startswith("teacher_"))
    teacher_loss.backward(retain_graph=True)
    assert has_gradient(model.teacher)
    for head in (model.student.proposal_generator, model.student.roi_heads):
        assert has_gradient(head) is heads
    assert has_gradient(model.student.backbone) is not detach
    sum(losses.values()).backward()  # those of the student reach all that is trained
    assert all(p.grad is not None for p in model.student.parameters() if p.requires_grad)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_heads_that_the_teacher_does_not_train_give_it_the_same_losses_and_gradients(precision):
    found = []
    for heads in (True, False):
        torch.manual_seed(0)
        opts = ["MODEL.SSSD.TEACHER.PRECISION", precision]
        model = build(tiny_config("MODEL.SSSD.TEACHER.TRAINS_HEADS", heads, *opts))
        torch.manual_seed(3)
        losses, _ = losses_at(model)
        sum(losses.values()).backward()
        found.append((losses, grads(model.teacher), grads(model.student.backbone.bottom_up.res4)))
    (losses, *gradients), (expected_losses, *expected_gradients) = found
    assert losses.keys() == expected_losses.keys()
    for name, value in losses.items():
        assert torch.equal(value, expected_losses[name]), name
    for part, expected in zip(gradients, expected_gradients, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(part, expected, strict=True))


def test_an_error_in_the_teacher_pass_leaves_the_parameters_trainable():
    model = build(tiny_config("MODEL.SSSD.TEACHER.TRAINS_HEADS", False))
    before = [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        next(model.teacher.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="The teacher's maps"):
        losses_at(model)
    assert [p.requires_grad for p in model.parameters()] == before


def test_every_parameter_is_in_the_graph_of_every_iteration():
    cfg = tiny_config(
        "MODEL.SSSD.PHASES.NO_DISTILL_ITERS", 2, "MODEL.SSSD.PHASES.FREEZE_BACKBONE_ITERS", 1,
        "MODEL.SSSD.PHASES.DISTILL_OFF_ITERS", 1, "SOLVER.MAX_ITER", 4,
    )  # fmt: skip
    model = build(cfg)
    batches = [
        training_batch(),
        [training_input(0)],
        [training_input(0), training_input(2)],
        [training_input(1)],
    ]
    for iteration, batch in enumerate(batches):
        model.zero_grad()
        losses, _ = losses_at(model, iteration, batch)
        sum(losses.values()).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, (iteration, name)
            assert parameter.grad.isfinite().all(), (iteration, name)


# ---- The frozen backbone ----


@pytest.mark.parametrize("clipping", ["none", "value", "norm"])
def test_frozen_backbone_moves_nothing_and_then_trains(clipping):
    cfg = tiny_config(
        "SOLVER.CLIP_GRADIENTS.ENABLED", clipping != "none",
        "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", clipping.replace("none", "value"),
        "MODEL.SSSD.PHASES.FREEZE_BACKBONE_ITERS", 2, "SOLVER.WEIGHT_DECAY", 0.1,
        "SOLVER.MOMENTUM", 0.9,
    )  # fmt: skip
    from sssd.engine import hold_frozen_parameters

    torch.manual_seed(0)
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    hold_frozen_parameters(optimizer, model)
    trainer = SimpleTrainer(model, [training_batch(i) for i in range(3)], optimizer)
    bottom_up = model.student.backbone.bottom_up
    before = copy.deepcopy(bottom_up.state_dict())
    lateral = model.student.backbone.fpn_lateral3.weight.clone()

    trainer.train(0, 2)
    for name, value in bottom_up.state_dict().items():
        assert torch.equal(value, before[name]), name  # running statistics among them
    assert not torch.equal(model.student.backbone.fpn_lateral3.weight, lateral)

    trainer.train(2, 3)
    after = bottom_up.state_dict()
    assert not torch.equal(after["res4.0.conv1.weight"], before["res4.0.conv1.weight"])
    assert not torch.equal(
        after["stem.conv1.norm.running_mean"], before["stem.conv1.norm.running_mean"]
    )


def test_frozen_backbone_computes_without_a_graph_and_in_evaluation_mode():
    model = build(tiny_config("MODEL.SSSD.PHASES.FREEZE_BACKBONE_ITERS", 1))
    seen = []
    bottom_up = model.student.backbone.bottom_up
    handle = bottom_up.register_forward_hook(
        lambda module, inputs, output: seen.append({k: v.requires_grad for k, v in output.items()})
    )
    losses_at(model, 0)
    losses_at(model, 1)
    handle.remove()
    assert not any(seen[0].values()) and all(seen[1].values())
    assert bottom_up.training and all(m.training for m in bottom_up.modules())


def test_what_the_config_freezes_stays_frozen_after_the_phase():
    cfg = tiny_config("MODEL.BACKBONE.FREEZE_AT", 2, "MODEL.SSSD.PHASES.FREEZE_BACKBONE_ITERS", 1)
    model = build(cfg)
    losses, _ = losses_at(model, 1)
    sum(losses.values()).backward()
    stem = model.student.backbone.bottom_up.stem
    assert all(not p.requires_grad and p.grad is None for p in stem.parameters())


# ---- The replayed pass leaves no trace ----


def test_scalars_of_the_teacher_pass_have_a_scope_of_their_own():
    _, storage = losses_at(build(tiny_config()))
    names = set(storage.latest())
    assert {"rpn/num_pos_anchors", "teacher/rpn/num_pos_anchors"} <= names
    history = storage.history("rpn/num_pos_anchors").values()
    assert len(history) == 1


def test_pictures_are_drawn_once():
    model = build(tiny_config("VIS_PERIOD", 1))
    _, storage = losses_at(model)
    assert len(storage._vis_data) == 1
    assert model.student.vis_period == 1


def test_running_statistics_of_the_heads_see_the_student_pass_only():
    opts = [
        "MODEL.ROI_BOX_HEAD.NUM_CONV", 1, "MODEL.ROI_BOX_HEAD.CONV_DIM", 16,
        "MODEL.ROI_BOX_HEAD.NORM", "BN",
    ]  # fmt: skip
    plain, model = build(tiny_config(*opts, distilled=False)), build(tiny_config(*opts))
    torch.manual_seed(3)
    losses_at(plain)
    torch.manual_seed(3)
    losses, _ = losses_at(model)
    sum(losses.values()).backward()
    for (name, a), b in zip(plain.named_buffers(), model.student.buffers(), strict=True):
        assert torch.equal(a, b), name


def test_random_stream_continues_as_without_the_teacher():
    plain, model = build(tiny_config(distilled=False)), build(tiny_config())
    for m in (plain, model):
        torch.manual_seed(3)
        losses_at(m)
        m.next_number = torch.rand(1)
    assert torch.equal(plain.next_number, model.next_number)


def test_building_the_teacher_leaves_the_random_stream_alone():
    build(tiny_config(distilled=False), seed=5)
    expected = torch.rand(3)
    build(tiny_config(), seed=5)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("own_forward", [False, True])
def test_forward_is_put_back_even_after_an_exception(own_forward):
    model = build(tiny_config("VIS_PERIOD", 100, "MODEL.SSSD.PHASES.FREEZE_BACKBONE_ITERS", 1))
    student = model.student
    backbone = student.backbone
    if own_forward:  # as torch.compile or a user's patch may have set it
        backbone.forward = backbone.forward
    before = dict(backbone.__dict__)
    calls = []

    def fail_in_second_pass(*args):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("in the replayed pass")

    student.roi_heads.register_forward_pre_hook(fail_in_second_pass)
    with pytest.raises(RuntimeError, match="in the replayed pass"):
        losses_at(model)
    assert backbone.__dict__.get("forward") is before.get("forward")
    assert ("forward" in backbone.__dict__) is own_forward
    assert "forward" not in backbone.bottom_up.__dict__
    assert not backbone._forward_hooks
    assert student.vis_period == 100


# ---- Evaluation is the student ----


class RecordedOperators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_evaluation_is_bit_equal_to_the_stock_detector_and_runs_the_same_operators():
    plain, model = build(tiny_config(distilled=False)).eval(), build(tiny_config()).eval()
    inputs = [{k: v for k, v in training_input(2).items() if k != "instances"}]
    outputs, operators = [], []
    for m in (plain, model):
        with torch.no_grad(), RecordedOperators() as recorded:
            outputs.append(m(inputs)[0]["instances"].get_fields())
        operators.append(recorded.names)
    assert operators[0] == operators[1] and len(operators[0]) > 100
    assert len(outputs[0]["scores"]) > 0
    for name in ("scores", "pred_classes"):
        assert torch.equal(outputs[0][name], outputs[1][name])
    assert torch.equal(outputs[0]["pred_boxes"].tensor, outputs[1]["pred_boxes"].tensor)


def test_evaluation_never_calls_the_training_parts():
    model = build(tiny_config()).eval()

    def poison(*args):
        raise AssertionError("the teacher was called")

    for module in model.training_parts.modules():
        module.register_forward_pre_hook(poison)
    with torch.no_grad():
        model([training_input(2)])
    with pytest.raises(AssertionError, match="the teacher was called"):
        losses_at(model.train())


# ---- The state dict is the student's ----


def test_state_dict_speaks_stock_keys_in_both_directions():
    plain, model = build(tiny_config(distilled=False), seed=1), build(tiny_config(), seed=2)
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict(), strict=True)
    for name, value in plain.state_dict().items():
        assert torch.equal(model.student.state_dict()[name], value)
    build(tiny_config(distilled=False), seed=3).load_state_dict(model.state_dict(), strict=True)
    with pytest.raises(RuntimeError, match=r"backbone\.fpn_lateral2\.weight"):
        state = plain.state_dict()
        del state["backbone.fpn_lateral2.weight"]
        model.load_state_dict(state)


def test_state_dict_through_an_enclosing_module():
    model = build(tiny_config())
    around = torch.nn.Sequential(model)
    assert list(around.state_dict()) == [f"0.{name}" for name in model.state_dict()]
    with pytest.raises(RuntimeError, match=r"load it into the SelfDistiller itself"):
        around.load_state_dict(around.state_dict())


def test_training_parts_hold_what_the_state_dict_leaves_out():
    model = build(tiny_config())
    inside = {id(p) for p in model.student.parameters()}
    beside = {id(p) for p in model.training_parts.parameters()}
    assert not inside & beside
    assert inside | beside == {id(p) for p in model.parameters()}


# ---- What is refused ----


def test_tracing_scripting_and_export_are_refused_with_the_way_out():
    model = build(tiny_config()).eval()
    inputs = training_input(1)
    with pytest.raises(RuntimeError, match=r"tools/export_student\.py"):
        torch.jit.trace(lambda image: model([{"image": image}]), inputs["image"])
    with pytest.raises(RuntimeError, match=r"tools/export_student\.py"):
        torch.jit.script(model)


@pytest.mark.parametrize(
    ("opts", "sentence"),
    [
        (["MODEL.SSSD.STUDENT", "FasterRCNN"], "'FasterRCNN'.*GeneralizedRCNN"),
        (["MODEL.SSSD.STUDENT", "SelfDistiller"], "'SelfDistiller'.*GeneralizedRCNN"),
        (["MODEL.SSSD.DISTANCE.NAME", "l2"], "distance 'l2'.*js, kl, mse"),
        (["MODEL.SSSD.DISTANCE.AXIS", "batch"], "axis 'batch'"),
        (["MODEL.SSSD.DISTANCE.LEVEL_WEIGHTS", [1.0, 2.0]], "2 values for the 5 levels"),
        (["MODEL.SSSD.COEFFICIENT.SCHEDULE", "stepwise"], "'stepwise'.*constant, step"),
        (["MODEL.SSSD.COEFFICIENT.VALUES", [1.0, 2.0]], r"'constant'.*got 2: \[1.0, 2.0\]"),
        (["MODEL.SSSD.COEFFICIENT.VALUES", [-1.0]], ">= 0, got -1.0"),
        (["MODEL.SSSD.LEVELS", ["p3", "p9"]], "p9.*p2, p3, p4, p5, p6"),
        (["MODEL.SSSD.PHASES.NO_DISTILL_ITERS", -1], "NO_DISTILL_ITERS must be >= 0, got -1"),
        (["MODEL.SSSD.TEACHER.EMBED_DIM", 20], "20 is not a multiple of its 8"),
    ],
)
def test_bad_settings_are_named_when_the_model_is_built(opts, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_model(tiny_config(*opts))


def test_backbone_without_a_pyramid_is_refused():
    cfg = tiny_config(
        "MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.OUT_FEATURES", ["res4"],
        "MODEL.RPN.IN_FEATURES", ["res4"], "MODEL.ROI_HEADS.IN_FEATURES", ["res4"],
        "MODEL.ANCHOR_GENERATOR.SIZES", [[32]],
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"gives no pyramid, only res4.*build_resnet_fpn_backbone"):
        build_model(cfg)


def test_levels_of_unequal_width_are_refused():
    cfg = tiny_config(
        "MODEL.BACKBONE.NAME", "build_resnet_backbone",
        "MODEL.RESNETS.OUT_FEATURES", ["res3", "res4"], "MODEL.RPN.IN_FEATURES", ["res4"],
        "MODEL.ROI_HEADS.IN_FEATURES", ["res4"], "MODEL.ANCHOR_GENERATOR.SIZES", [[32]],
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"differ in width \(res3: 128, res4: 256\)"):
        build_model(cfg)


def test_training_input_without_ground_truth_is_refused():
    inputs = training_input(1)
    del inputs["instances"]
    with pytest.raises(KeyError, match="has no 'instances'"):
        losses_at(build(tiny_config()), batch=[inputs])


def test_a_class_beyond_the_config_is_named():
    with pytest.raises(ValueError, match=r"\[7\].*3 classes 0 to 2"):
        inputs = training_input(1)
        inputs["instances"].gt_classes[:] = 7
        losses_at(build(tiny_config()), batch=[inputs])


# ---- Settings ----


def test_chosen_levels_only_are_taught_and_compared():
    model = build(tiny_config("MODEL.SSSD.LEVELS", ["p4", "p3"]))
    assert list(model.teacher.strides.items()) == [("p3", 8), ("p4", 16)]
    losses, _ = losses_at(model)
    losses["loss_distill"].backward()
    assert model.student.backbone.fpn_output3.weight.grad is not None
    assert model.student.backbone.fpn_output5.weight.grad is None


def test_class_count_is_the_students_unless_given():
    assert build(tiny_config()).teacher.num_classes == 3
    assert build(tiny_config("MODEL.SSSD.NUM_CLASSES", 7)).teacher.num_classes == 7


def test_step_schedule_switches_at_the_first_solver_step():
    cfg = tiny_config(
        "MODEL.SSSD.COEFFICIENT.SCHEDULE", "step", "MODEL.SSSD.COEFFICIENT.VALUES", [75.0, 100.0],
        "SOLVER.STEPS", (120000, 160000), "SOLVER.MAX_ITER", 180000,
    )  # fmt: skip
    schedule = build(cfg).schedule
    assert [schedule(i) for i in (0, 119_999, 120_000, 160_000, 179_999)] == [75, 75, 100, 100, 100]


def test_phases_scale_to_the_length_of_the_run():
    cfg = tiny_config(
        "MODEL.SSSD.PHASES.NO_DISTILL_ITERS", 30000, "MODEL.SSSD.PHASES.SCALE_TO_MAX_ITER", True,
        "MODEL.SSSD.PHASES.FREEZE_BACKBONE_ITERS", 20000, "SOLVER.MAX_ITER", 18000,
    )  # fmt: skip
    phases = build(cfg).phases
    assert (phases.no_distill_iters, phases.freeze_backbone_iters) == (3000, 2000)


@pytest.mark.parametrize(
    ("phases", "missing"),
    [
        ((30000, 20000, 0), "the distance never trains the student and the backbone stays frozen"),
        ((60, 0, 40), "the distance never trains the student"),
        ((0, 100, 0), "the backbone stays frozen"),
        ((60, 99, 39), None),
    ],
)
def test_a_schedule_too_short_for_its_phases_is_told(phases, missing, caplog):
    names = ("NO_DISTILL_ITERS", "FREEZE_BACKBONE_ITERS", "DISTILL_OFF_ITERS")
    keys = [x for n, v in zip(names, phases, strict=True) for x in (f"MODEL.SSSD.PHASES.{n}", v)]
    build_phases(tiny_config("SOLVER.MAX_ITER", 100, *keys))
    said = [r.getMessage() for r in caplog.records if "SCALE_TO_MAX_ITER" in r.getMessage()]
    if missing is None:
        assert not said
    else:
        assert len(said) == 1
        assert said[0].startswith(f"In the 100 iterations of this training {missing}: ")


def test_share_controller_holds_the_share_of_the_total_loss():
    cfg = tiny_config(
        "MODEL.SSSD.COEFFICIENT.SCHEDULE", "share", "MODEL.SSSD.COEFFICIENT.VALUES", [0.0, 1e6],
        "MODEL.SSSD.COEFFICIENT.SHARE", 0.3,
    )  # fmt: skip
    model = build(cfg)
    losses, _ = losses_at(model)
    share = losses["loss_distill"] / sum(losses.values())
    assert share.item() == pytest.approx(0.3, abs=1e-3)
    assert "coefficient.averages" in model.training_parts.state_dict()


# ---- Ground truth ----


@pytest.mark.parametrize("field", CROWD_FIELDS)
def test_crowd_regions_are_left_out_of_the_teacher(field):
    inputs = training_input(3)
    inputs["instances"].set(field, torch.tensor([0, 1, 0]))
    objects = ground_truth_objects([inputs], num_classes=3)
    kept = inputs["instances"].gt_boxes.tensor[[0, 2]]
    assert torch.equal(objects.boxes[0][objects.valid[0]], kept)
