import copy
import json
import math
import os

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.modeling import build_model

from sssd import SelfDistiller
from sssd.engine import CheckpointError, Trainer
from sssd.engine.setup import check_resumed_config, describe_distillation
from sssd.evaluation import ground_truth_mapper
from tests.coco_files import register_coco
from tests.detectors import tiny_config


@pytest.fixture
def config(tmp_path):
    """Makes configs for training on six pictures of 96x64 pixels."""
    name = register_coco("tiny_coco", tmp_path / "data")

    def make(*opts, distilled=True):
        return tiny_config(
            "DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,), "DATALOADER.NUM_WORKERS", 0,
            "INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MIN_SIZE_TEST", 64, "SOLVER.MAX_ITER", 4,
            "SOLVER.STEPS", (), "SOLVER.CHECKPOINT_PERIOD", 2, "SEED", 3,
            "OUTPUT_DIR", str(tmp_path / "output"), *opts, distilled=distilled,
        )  # fmt: skip

    return make


def run(cfg, resume=False):
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    torch.manual_seed(0)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def metrics(cfg):
    with open(os.path.join(cfg.OUTPUT_DIR, "metrics.json")) as f:
        return [json.loads(line) for line in f]


def last_checkpoint(cfg):
    with open(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")) as f:
        return f.read()


def load(cfg, name):
    return torch.load(os.path.join(cfg.OUTPUT_DIR, name), weights_only=True)


def test_a_run_leaves_metrics_evaluation_and_checkpoints(config):
    cfg = config("SOLVER.MAX_ITER", 20)
    trainer = run(cfg)
    line = next(x for x in metrics(cfg) if "loss_distill" in x)
    assert line["loss_distill/coefficient"] == 10.0
    # medians over the same 20 iterations, of values that move together
    assert line["loss_distill"] == pytest.approx(10 * line["loss_distill/distance"], rel=1e-6)
    assert 0 < line["loss_distill/share"] < 1
    assert line["iteration"] == 19
    results = trainer._last_eval_results["bbox"]
    assert 0 <= results["AP"] <= 100
    for name in ("model_0000001.pth", "model_final.pth", "model_best.pth", "last_checkpoint"):
        assert os.path.isfile(os.path.join(cfg.OUTPUT_DIR, name)), name
    assert any(n.startswith("events.out.tfevents") for n in os.listdir(cfg.OUTPUT_DIR))


def test_the_share_is_that_of_the_distillation_term_in_the_total_loss(config):
    cfg = config("SOLVER.MAX_ITER", 1)
    trainer = run(cfg)
    latest = {k: v[0] for k, v in trainer.storage.latest().items()}
    losses = [v for k, v in latest.items() if k.split("teacher_")[-1].startswith("loss_")
              and "/" not in k]  # fmt: skip
    assert latest["total_loss"] == pytest.approx(sum(losses))
    assert latest["loss_distill/share"] == pytest.approx(latest["loss_distill"] / sum(losses))


def test_the_checkpoint_is_a_stock_detector_with_the_rest_beside_it(config):
    cfg = config()
    trainer = run(cfg)
    checkpoint = load(cfg, "model_final.pth")
    assert set(checkpoint) == {"model", "sssd", "trainer", "iteration"}
    stock = build_model(config(distilled=False))
    stock.load_state_dict(checkpoint["model"], strict=True)
    model = trainer.checkpointer.model
    for name, value in model.training_parts.state_dict().items():
        assert torch.equal(checkpoint["sssd"][name], value), name
    assert {name.split(".")[0] for name in checkpoint["sssd"]} == {"teacher", "distillation"}


def test_stock_checkpointer_fills_the_wrapper_and_the_wrapper_fills_the_stock_detector(config):
    cfg = config()
    trainer = run(cfg)
    path = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    trained = trainer.checkpointer.model.state_dict()
    for model in (build_model(cfg), build_model(config(distilled=False))):
        DetectionCheckpointer(model).load(path)
        assert all(torch.equal(v, trained[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("schedule", ["constant", "share"])
def test_resume_restores_optimizer_training_parts_and_iteration(config, schedule):
    values = {"constant": [10.0], "share": [0.0, 100.0]}[schedule]
    opts = ["MODEL.SSSD.COEFFICIENT.SCHEDULE", schedule, "MODEL.SSSD.COEFFICIENT.VALUES", values]
    first = run(config(*opts))
    torch.manual_seed(99)
    resumed = Trainer(config(*opts, "SOLVER.MAX_ITER", 6))
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 4  # also when the last file saved is the best checkpoint
    before, after = (t._trainer.optimizer.state_dict()["state"] for t in (first, resumed))
    assert before.keys() == after.keys() and before
    for key, state in before.items():
        assert torch.equal(state["momentum_buffer"], after[key]["momentum_buffer"])
    parts = resumed.checkpointer.model.training_parts.state_dict()
    for name, value in first.checkpointer.model.training_parts.state_dict().items():
        assert torch.equal(parts[name], value), name
    assert any(name.startswith("coefficient.") for name in parts) == (schedule == "share")
    resumed.train()
    assert resumed.iter == 6


def test_the_best_value_survives_a_resume(config):
    cfg = config("TEST.EVAL_PERIOD", 2)
    trainer = run(cfg)
    best = next(h for h in trainer._hooks if type(h).__name__ == "BestCheckpointer")
    # Of iteration 1: that of the last is found after its checkpoint is saved.
    saved = load(cfg, "model_0000003.pth")["trainer"]["hooks"]["BestCheckpointer"]
    resumed = Trainer(config("TEST.EVAL_PERIOD", 2, "SOLVER.MAX_ITER", 6))
    resumed.resume_or_load(resume=True)
    again = next(h for h in resumed._hooks if type(h).__name__ == "BestCheckpointer")
    assert again.best_metric is not None and best.best_metric is not None
    assert (again.best_metric, again.best_iter) == (saved["best_metric"], saved["best_iter"])
    assert again.best_iter == 1


@pytest.mark.parametrize("lost", ["sssd", "trainer"])
def test_a_resume_that_lacks_training_state_is_an_error(config, lost):
    cfg = config()
    run(cfg)
    name = last_checkpoint(cfg)
    checkpoint = load(cfg, name)
    del checkpoint[lost]
    torch.save(checkpoint, os.path.join(cfg.OUTPUT_DIR, name))
    trainer = Trainer(cfg)
    with pytest.raises(CheckpointError, match=f"cannot resume from .*{name}: it lacks {lost}"):
        trainer.resume_or_load(resume=True)


def truncate(cfg, *names):
    for name in names:
        path = os.path.join(cfg.OUTPUT_DIR, name)
        with open(path, "r+b") as f:
            f.truncate(os.path.getsize(path) // 2)


def test_a_resume_goes_on_from_the_newest_checkpoint_that_is_whole(config, caplog):
    cfg = config("SOLVER.MAX_ITER", 6)
    run(cfg)
    truncate(cfg, "model_final.pth", "model_best.pth", "model_0000005.pth")
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 4
    assert "model_0000005.pth cannot be read" in caplog.text and "the one before" in caplog.text
    truncate(cfg, "model_0000001.pth", "model_0000003.pth")
    with pytest.raises(CheckpointError, match=r"^None of the checkpoints in .* can be read"):
        Trainer(cfg).resume_or_load(resume=True)


def test_a_truncated_checkpoint_to_start_from_is_named(config):
    cfg = config()
    run(cfg)
    truncate(cfg, "model_final.pth")
    path = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    with pytest.raises(CheckpointError, match=r"model_final\.pth cannot be read: it is truncated"):
        Trainer(config("MODEL.WEIGHTS", path)).resume_or_load(resume=False)


def test_a_run_that_begins_anew_leaves_nothing_to_resume_of_the_one_before(config, caplog):
    cfg = config()
    run(cfg)
    lines = len(metrics(cfg))
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    assert "checkpoints of an earlier run" in caplog.text
    assert not trainer.checkpointer.has_checkpoint()
    trainer.train()
    assert len(metrics(cfg)) == lines  # in a file of its own


def test_weights_of_another_architecture_are_refused(config):
    cfg = config()
    run(cfg)
    path = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    deeper = config("MODEL.RESNETS.DEPTH", 34, "MODEL.WEIGHTS", path)
    checkpointer = Trainer(deeper).checkpointer
    with pytest.raises(CheckpointError, match=r"another architecture.*res2\.2.*is not in the file"):
        checkpointer.load(path, checkpointables=[], whole=True)
    saved = torch.load(path, weights_only=True)
    saved["model"] = {k: v for k, v in saved["model"].items() if "backbone" not in k}
    heads = os.path.join(cfg.OUTPUT_DIR, "heads.pth")
    torch.save({"model": saved["model"]}, heads)
    with pytest.raises(CheckpointError, match=r"backbone.* is not in the file"):
        checkpointer.load(heads, checkpointables=[])
    wider = Trainer(config("MODEL.FPN.OUT_CHANNELS", 32)).checkpointer
    with pytest.raises(CheckpointError, match=r"is \(16, \d+, 1, 1\) in the file and \(32"):
        wider.load(path, checkpointables=[])


def test_other_heads_may_start_from_a_trained_backbone(config):
    cfg = config()
    trained = run(cfg).checkpointer.model.state_dict()
    path = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    model = build_model(config("MODEL.ROI_HEADS.NUM_CLASSES", 9))
    from sssd.engine import Checkpointer

    Checkpointer(model).load(path, checkpointables=[])
    name = "backbone.bottom_up.stem.conv1.weight"
    assert torch.equal(model.state_dict()[name], trained[name])


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("nowhere/model.pth", r"nowhere/model\.pth does not exist"),
        ("detectron2://ImageNetPretrained/none.pkl", r"cannot be fetched.*MODEL\.WEIGHTS"),
    ],
)
def test_weights_that_cannot_be_had_are_named_before_training(config, path, sentence, monkeypatch):
    from detectron2.utils.file_io import PathManager

    def unreachable(url, **kwargs):
        if "://" in url:
            raise OSError("no network")
        return url

    monkeypatch.setattr(PathManager, "get_local_path", unreachable)
    trainer = Trainer(config("MODEL.WEIGHTS", path))
    with pytest.raises(CheckpointError, match=sentence):
        trainer.resume_or_load(resume=False)


def test_a_loss_that_is_not_finite_stops_with_its_name_after_saving_the_last_good_state(config):
    cfg = config("SOLVER.MAX_ITER", 8, "SOLVER.CHECKPOINT_PERIOD", 100)
    os.makedirs(cfg.OUTPUT_DIR)
    trainer = Trainer(cfg)
    model = trainer.checkpointer.model
    good = {}

    def remember(module, inputs):
        if trainer.iter == 3 and not good:
            good.update({k: v.clone() for k, v in model.state_dict().items()})

    def poison(module, inputs, losses):
        if trainer.iter == 3:
            # BatchNorm has seen the bad batch by the time that the loss is looked at.
            module.backbone.bottom_up.stem.conv1.norm.running_mean.data.fill_(float("nan"))
            losses["loss_cls"] = losses["loss_cls"] * float("nan")

    model.student.register_forward_pre_hook(remember)
    model.student.register_forward_hook(poison)
    sentence = (
        r"not finite in iteration 3: loss_cls, teacher_loss_cls, grad_norm \(images \d, \d\)\. "
        r"The state before is saved as .*model_last_good\.pth"
    )
    with pytest.raises(FloatingPointError, match=sentence):
        trainer.train()
    saved = load(cfg, "model_last_good.pth")
    assert saved["iteration"] == 2
    assert all(torch.equal(saved["model"][k], v) for k, v in good.items())
    assert all(v.isfinite().all() for v in saved["model"].values())
    resumed = Trainer(cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 3


def test_a_resume_with_another_config_is_refused(config):
    cfg = config()
    run(cfg)
    with open(os.path.join(cfg.OUTPUT_DIR, "config.yaml"), "w") as f:
        f.write(cfg.dump())
    check_resumed_config(cfg)
    check_resumed_config(config("SOLVER.MAX_ITER", 100))  # longer is fine
    check_resumed_config(config("MODEL.SSSD.TEST.TEACHER_WITH_GROUND_TRUTH", True))
    # What errors advise, where the data lie now, and what the schedule implies.
    check_resumed_config(config("MODEL.SSSD.SOLVER.MAX_SKIPPED", 3))
    check_resumed_config(config("MODEL.SSSD.SOLVER.BATCH_PARTS", 2))
    check_resumed_config(config("MODEL.SSSD.COEFFICIENT.MILESTONES", [3]))
    with pytest.raises(CheckpointError, match=r"MODEL\.SSSD\.DISTANCE\.NAME was js and is mse"):
        check_resumed_config(config("MODEL.SSSD.DISTANCE.NAME", "mse"))
    with pytest.raises(CheckpointError, match=r"MODEL\.META_ARCHITECTURE was SelfDistiller"):
        check_resumed_config(config(distilled=False))


def test_class_count_that_differs_from_the_annotations_stops_before_training(config):
    from sssd.data import AnnotationError

    with pytest.raises(AnnotationError, match=r"3 classes.*NUM_CLASSES"):
        Trainer(config("MODEL.ROI_HEADS.NUM_CLASSES", 4))


def test_the_line_at_the_start_says_what_is_distilled(config):
    cfg = config(
        "MODEL.SSSD.COEFFICIENT.SCHEDULE", "step", "MODEL.SSSD.COEFFICIENT.VALUES", [75.0, 100.0],
        "SOLVER.STEPS", (60,), "SOLVER.MAX_ITER", 90, "MODEL.SSSD.PHASES.NO_DISTILL_ITERS", 15,
        "MODEL.SSSD.PHASES.DISTILL_OFF_ITERS", 5, "MODEL.SSSD.PHASES.FREEZE_BACKBONE_ITERS", 10,
    )  # fmt: skip
    line = describe_distillation(build_model(cfg))
    assert line == (
        "Self-distillation of GeneralizedRCNN: levels p2, p3, p4, p5, p6, distance js (channel, "
        "element_mean), gradient to the student in iterations 15 to 85 of 90, coefficient 75 from "
        "iteration 0, 100 from iteration 60, backbone frozen until iteration 10."
    )


def test_plain_detectors_train_with_the_same_trainer(config):
    cfg = config(distilled=False)
    trainer = run(cfg)
    checkpoint = load(cfg, "model_final.pth")
    assert "sssd" not in checkpoint
    assert not any("distill" in key for line in metrics(cfg) for key in line)
    assert math.isfinite(trainer._last_eval_results["bbox"]["AP"])


def test_the_teacher_is_evaluated_with_ground_truth_under_a_name_of_its_own(config):
    cfg = config("MODEL.SSSD.TEST.TEACHER_WITH_GROUND_TRUTH", True)
    run(cfg)
    line = next(x for x in reversed(metrics(cfg)) if "bbox/AP" in x)
    assert {"bbox/AP", "teacher_with_ground_truth/bbox/AP"} <= set(line)
    # It is the teacher's pyramid that is evaluated, on every picture, and with its objects.
    model = build_model(cfg)
    seen = []
    model.detect_from_teacher = lambda inputs: (
        seen.append(len(inputs[0]["instances"])),
        SelfDistiller.detect_from_teacher(model, inputs),
    )[1]
    results = Trainer.test(cfg, model)
    assert {"bbox", "teacher_with_ground_truth/bbox"} <= results.keys()
    records = DatasetCatalog.get(cfg.DATASETS.TEST[0])
    assert seen == [len(record["annotations"]) for record in records]


def test_evaluation_alone_takes_the_teacher_from_the_checkpoint(config):
    trained = run(config()).checkpointer.model
    path = os.path.join(config().OUTPUT_DIR, "model_final.pth")
    opts = ("MODEL.WEIGHTS", path, "MODEL.SSSD.TEST.TEACHER_WITH_GROUND_TRUTH", True)
    model = Trainer.load_for_evaluation(config(*opts))
    for ours, theirs in ((model, trained), (model.training_parts, trained.training_parts)):
        state, expected = ours.state_dict(), theirs.state_dict()
        assert all(torch.equal(state[key], value) for key, value in expected.items())

    torch.save({"model": trained.state_dict()}, path)  # as exported: the detector alone
    with pytest.raises(CheckpointError, match=r"lacks sssd: .*TEACHER_WITH_GROUND_TRUTH to False"):
        Trainer.load_for_evaluation(config(*opts))
    Trainer.load_for_evaluation(config("MODEL.WEIGHTS", path))


def test_the_mapper_with_ground_truth_resizes_as_at_test_time(config):
    cfg = config("INPUT.MIN_SIZE_TEST", 48)
    record = DatasetCatalog.get(cfg.DATASETS.TEST[0])[0]
    kept = ground_truth_mapper(cfg)(copy.deepcopy(record))
    dropped = DatasetMapper(cfg, is_train=False)(copy.deepcopy(record))
    assert torch.equal(kept["image"], dropped["image"])
    assert len(kept["instances"]) == len(record["annotations"]) and "instances" not in dropped


def test_a_first_iteration_that_a_detector_gives_up_can_be_skipped(config):
    cfg = config("MODEL.SSSD.SOLVER.MAX_SKIPPED", 1, "SOLVER.CHECKPOINT_PERIOD", 100)
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    trainer = Trainer(cfg)
    student = trainer.checkpointer.model.student
    forward, calls = student.forward, []

    def give_up_once(batch):
        calls.append(trainer.iter)
        if len(calls) == 1:
            raise FloatingPointError("Predicted boxes or scores contain Inf/NaN.")
        return forward(batch)

    student.forward = give_up_once
    trainer.train()
    assert calls[:7] == [0, 1, 1, 2, 2, 3, 3]  # both passes of those that were not skipped


def test_a_skipped_iteration_has_no_share(config):
    trainer = Trainer(config("MODEL.SSSD.SOLVER.MAX_SKIPPED", 1, "SOLVER.CHECKPOINT_PERIOD", 100))
    student = trainer.checkpointer.model.student
    forward = student.forward

    def give_up_in_third(batch):
        if trainer.iter == 2:
            raise FloatingPointError("Predicted boxes or scores contain Inf/NaN.")
        return forward(batch)

    student.forward = give_up_in_third
    trainer.train()
    for name in ("loss_distill/share", "loss_distill/distance"):
        logged = [iteration for _, iteration in trainer.storage.history(name).values()]
        assert logged == [0, 1, *range(3, trainer.max_iter)]


def test_phases_follow_the_schedule_that_is_scaled_to_the_workers(config):
    opts = (
        "SOLVER.REFERENCE_WORLD_SIZE", 2, "MODEL.SSSD.PHASES.NO_DISTILL_ITERS", 2,
        "MODEL.SSSD.PHASES.FREEZE_BACKBONE_ITERS", 1, "MODEL.SSSD.COEFFICIENT.SCHEDULE", "step",
        "MODEL.SSSD.COEFFICIENT.VALUES", [1.0, 2.0], "MODEL.SSSD.COEFFICIENT.MILESTONES", [3],
        "SOLVER.IMS_PER_BATCH", 4,
    )  # fmt: skip
    trainer = Trainer(config(*opts))  # one worker, so twice as many iterations of half the batch
    model = trainer.checkpointer.model
    assert trainer.max_iter == model.phases.max_iter == 8
    assert (model.phases.no_distill_iters, model.phases.freeze_backbone_iters) == (4, 2)
    assert [model.schedule(i) for i in (5, 6)] == [1.0, 2.0]
    scaled = Trainer(config(*opts, "MODEL.SSSD.PHASES.SCALE_TO_MAX_ITER", True,
                            "MODEL.SSSD.PHASES.NO_DISTILL_ITERS", 90000))  # fmt: skip
    assert scaled.checkpointer.model.phases.no_distill_iters == 4  # by itself, and once


def test_precise_bn_measures_the_student_alone(config):
    trainer = Trainer(config())
    parts = {id(module) for module in trainer.running_parts().modules()}
    model = trainer.checkpointer.model
    assert {id(module) for module in model.student.modules()} <= parts
    assert not {id(module) for module in model.teacher.modules()} & parts
