"""Averaged weights: by hand, in evaluation, through a resume, and exported."""

import os
from types import SimpleNamespace

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from sssd.engine import CheckpointError, ClassificationTrainer, Trainer, export_student
from sssd.engine.averaging import AveragedWeights, UpdateAverage, with_averaged
from tests.coco_files import register_coco
from tests.detectors import tiny_config


def test_the_average_by_hand():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    weight = model[0].weight
    nn.init.constant_(weight, 1.0)
    averaged = AveragedWeights(model, decay=0.25)
    hook = UpdateAverage(averaged)
    hook.trainer = SimpleNamespace(start_iter=0, iter=0)
    nn.init.constant_(weight, 2.0)  # weights that were loaded
    hook.before_train()
    assert averaged.state_dict()["0.weight"].item() == 2.0
    nn.init.constant_(weight, 12.0)
    hook.after_step()  # decay (1 + 0) / (10 + 0): 0.1 * 2 + 0.9 * 12
    assert averaged.state_dict()["0.weight"].item() == pytest.approx(11.0)
    nn.init.constant_(weight, 3.0)
    hook.trainer.iter = 5  # (1 + 5) / (10 + 5) is more than 0.25: 0.25 * 11 + 0.75 * 3
    hook.after_step()
    assert averaged.state_dict()["0.weight"].item() == pytest.approx(5.0)
    model[1].running_mean.fill_(7.0)
    assert averaged.state_dict()["1.running_mean"].item() == 7.0
    assert averaged.state_dict().keys() == model.state_dict().keys()
    with averaged.in_place():
        assert model[0].weight is weight and weight.item() == pytest.approx(5.0)
    assert weight.item() == 3.0


@pytest.mark.parametrize("decay", [1.0, -0.1, 1.5])
def test_a_decay_out_of_its_range_is_a_sentence(decay):
    with pytest.raises(ValueError, match=rf"AVERAGING.DECAY must be .* it is {decay}"):
        AveragedWeights(nn.Linear(1, 1), decay)


def test_results_stand_beside_those_of_the_weights():
    one = with_averaged({"bbox": {"AP": 1.0}}, {"bbox": {"AP": 2.0}}, several=False)
    assert one == {"bbox": {"AP": 1.0}, "averaged/bbox": {"AP": 2.0}}
    two = {"a": {"bbox": {"AP": 1.0}}, "b": {}}
    found = with_averaged(two, {"a": {"bbox": {"AP": 3.0}}, "b": {}}, several=True)
    assert found == {"a": {"bbox": {"AP": 1.0}, "averaged/bbox": {"AP": 3.0}}, "b": {}}


@pytest.fixture
def train(tmp_path):
    name = register_coco("averaged_coco", tmp_path / "data")

    def train(folder, *opts, resume=False):
        cfg = tiny_config(
            "DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,), "DATALOADER.NUM_WORKERS", 0,
            "INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MIN_SIZE_TEST", 64, "SOLVER.MAX_ITER", 4,
            "SEED", 3, "OUTPUT_DIR", str(tmp_path / folder), *opts,
        )  # fmt: skip
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
        torch.manual_seed(3)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume)
        trainer.train()
        return cfg, trainer

    return train


AVERAGE = ("MODEL.SSSD.AVERAGING.DECAY", 0.9)


def saved(cfg, name="model_final.pth"):
    return torch.load(os.path.join(cfg.OUTPUT_DIR, name), weights_only=True)


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_averaging_is_saved_evaluated_and_leaves_the_training_alone(train, tmp_path):
    plain, _ = train("plain")
    cfg, trainer = train("averaged", *AVERAGE)
    checkpoint = saved(cfg)
    assert_same(checkpoint["model"], saved(plain)["model"])
    average = checkpoint["averaged"]
    assert average.keys() == checkpoint["model"].keys()
    name = "backbone.fpn_output2.weight"
    assert not torch.equal(average[name], checkpoint["model"][name])
    assert {"bbox", "averaged/bbox"} <= trainer._last_eval_results.keys()
    # What was evaluated is what is exported.
    with open(os.path.join(cfg.OUTPUT_DIR, "config.yaml"), "w") as f:
        f.write(cfg.dump())
    export_student(
        os.path.join(cfg.OUTPUT_DIR, "model_final.pth"), f.name, str(tmp_path / "student"), True
    )
    student = torch.load(tmp_path / "student" / "model.pth", weights_only=True)["model"]
    assert_same(student, average)
    model = build_model(cfg)
    model.load_state_dict(average)
    assert Trainer.test(cfg, model)["bbox"] == pytest.approx(
        trainer._last_eval_results["averaged/bbox"], nan_ok=True
    )
    with pytest.raises(CheckpointError, match="has no averaged weights"):
        export_student(
            os.path.join(plain.OUTPUT_DIR, "model_final.pth"), f.name, str(tmp_path / "x"), True
        )


def test_the_average_goes_on_after_a_resume(train):
    whole, _ = train("whole", *AVERAGE)
    train("parts", *AVERAGE, "SOLVER.MAX_ITER", 2)
    parts, _ = train("parts", *AVERAGE, resume=True)
    assert_same(saved(parts)["averaged"], saved(whole)["averaged"])


def test_a_classifier_is_averaged_too(tmp_path):
    pytest.importorskip("timm", reason="timm is not installed")
    from tests.classifiers import TINY
    from tests.classifiers import tiny_config as tiny_classifier

    cfg = tiny_classifier("ce", tmp_path, "DATASETS.TEST", (TINY,), *AVERAGE)
    trainer = ClassificationTrainer(cfg)
    trainer.train()
    assert {"classification", "averaged/classification"} <= trainer._last_eval_results.keys()
    # Heads and branches have no averaged weights, so nothing of them is reported as averaged.
    heads = ClassificationTrainer(
        tiny_classifier("byot", tmp_path / "byot", "DATASETS.TEST", (TINY,), *AVERAGE)
    )
    heads.train()
    averaged = [task for task in heads._last_eval_results if task.startswith("averaged/")]
    assert averaged == ["averaged/classification"] and "head1" in heads._last_eval_results
    path = tmp_path / "config.yaml"
    path.write_text(cfg.dump())
    export_student(str(tmp_path / "model_final.pth"), str(path), str(tmp_path / "student"), True)
    student = torch.load(tmp_path / "student" / "model.pth", weights_only=True)
    assert_same(student, saved(cfg)["averaged"])
