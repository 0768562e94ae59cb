"""SIGTERM, the end of the time and a full disk, in the middle of a training."""

import argparse
import glob
import json
import os
import resource
import signal
import time

import pytest
import torch
from tensorboard.summary.writer.record_writer import RecordWriter

from sssd.engine import CheckpointError, Trainer
from sssd.engine.scripts import argument_parser, duration
from sssd.engine.signals import limit_time
from tests.coco_files import register_coco
from tests.detectors import tiny_config


@pytest.fixture
def cfg(tmp_path):
    name = register_coco("stopped_coco", tmp_path / "data")
    (tmp_path / "output").mkdir()
    return tiny_config(
        "DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,), "DATALOADER.NUM_WORKERS", 0,
        "INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MIN_SIZE_TEST", 64, "SOLVER.MAX_ITER", 4,
        "SOLVER.CHECKPOINT_PERIOD", 100, "TEST.EVAL_PERIOD", 2, "SEED", 3,
        "OUTPUT_DIR", str(tmp_path / "output"),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def handlers():
    numbers = (signal.SIGTERM, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def saved(cfg, name):
    return torch.load(os.path.join(cfg.OUTPUT_DIR, name), weights_only=True)


def stop(trainer, act):
    """Trains, and calls ``act`` in the second iteration; returns the exit status."""
    trainer._trainer.model.register_forward_pre_hook(
        lambda *args: act() if trainer.iter == 1 and trainer._trainer.model.training else None
    )
    with pytest.raises(SystemExit) as ended:
        trainer.train()
    return ended.value.code


def test_sigterm_saves_after_the_iteration_and_exits(cfg):
    before = signal.getsignal(signal.SIGTERM)
    trainer = Trainer(cfg)
    assert stop(trainer, lambda: os.kill(os.getpid(), signal.SIGTERM)) == 143
    assert signal.getsignal(signal.SIGTERM) == before
    checkpoint = saved(cfg, "model_interrupted.pth")
    assert checkpoint["iteration"] == checkpoint["trainer"]["iteration"] == 1
    # The evaluation of that iteration is left to the resume, which begins with it.
    assert not hasattr(trainer, "_last_eval_results")
    resumed = Trainer(cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 2
    evaluated = []
    resumed.test = lambda *args: evaluated.append(resumed.iter) or {"bbox": {"AP": 1.0}}
    resumed.train()
    assert evaluated == [1, 4]


def test_sigterm_breaks_off_an_evaluation(cfg):
    trainer = Trainer(cfg)

    def test(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the evaluation goes on")

    trainer.test = test
    with pytest.raises(SystemExit) as ended:
        trainer.train()
    assert ended.value.code == 143
    assert saved(cfg, "model_interrupted.pth")["iteration"] == 1


def test_sigterm_in_the_last_evaluation_leaves_the_final_checkpoint(cfg):
    trainer = Trainer(cfg)
    trainer.test = lambda *args: trainer.iter == 4 and os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit):
        trainer.train()
    assert saved(cfg, "model_final.pth")["iteration"] == 3
    assert not os.path.exists(os.path.join(cfg.OUTPUT_DIR, "model_interrupted.pth"))


def test_the_end_of_the_time_stops_in_order(cfg):
    trainer = Trainer(cfg)

    def pass_time():
        signal.setitimer(signal.ITIMER_REAL, 1e-3)
        while signal.getitimer(signal.ITIMER_REAL)[0]:
            pass

    assert stop(trainer, pass_time) == 75
    assert saved(cfg, "model_interrupted.pth")["iteration"] == 1


def test_the_end_of_the_time_outside_of_a_training_exits_at_once():
    with pytest.raises(SystemExit) as ended:
        limit_time(1e-3)
        while True:
            pass
    assert ended.value.code == 75


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("1:30", 90), ("2:00:05", 7205), ("1-00:00:10", 86410), ("0.5", 0.5)],
)
def test_times(text, seconds):
    assert duration(text) == seconds
    assert argument_parser().parse_args(["--time-limit", text]).time_limit == seconds


@pytest.mark.parametrize("text", ["", "soon", "1:2:3:4", "0", "-5", "inf", "nan"])
def test_what_is_no_time_is_said(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"{text!r} is no time"):
        duration(text)


def test_an_evaluation_of_averaged_weights_is_broken_off_with_the_trained_ones(cfg):
    cfg.MODEL.SSSD.AVERAGING.DECAY = 0.9
    trainer = Trainer(cfg)
    model, evaluated = trainer.checkpointer.model, {}

    def test(*args):
        evaluated.update({key: value.clone() for key, value in model.state_dict().items()})
        os.kill(os.getpid(), signal.SIGTERM)

    trainer.test = test  # first with the average in place
    with pytest.raises(SystemExit):
        trainer.train()
    checkpoint = saved(cfg, "model_interrupted.pth")
    for key, value in model.state_dict().items():
        assert torch.equal(checkpoint["model"][key], value), key
        assert torch.equal(checkpoint["averaged"][key], evaluated[key]), key
    assert any(not torch.equal(checkpoint["model"][key], x) for key, x in evaluated.items())


def test_what_breaks_an_evaluation_costs_no_iteration(cfg):
    trainer = Trainer(cfg)

    def test(*args):
        raise KeyError("an evaluator with a bug")

    trainer.test = test
    with pytest.raises(KeyError):
        trainer.train()
    assert saved(cfg, "model_interrupted.pth")["iteration"] == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_tensorboard_cannot_write_in_the_end_is_said(cfg, monkeypatch):
    trainer = Trainer(cfg)
    write = RecordWriter.write

    def write_slowly(*args):
        time.sleep(0.2)
        write(*args)

    def test(*args):
        if trainer.iter == 4:
            (path,) = glob.glob(os.path.join(cfg.OUTPUT_DIR, "events*"))
            os.symlink("/dev/full", path + ".full")
            os.replace(path + ".full", path)  # at once: TensorBoard's thread makes a missing file
            monkeypatch.setattr(RecordWriter, "write", write_slowly)
        return {"bbox": {"AP": 1.0}}

    trainer.test = test
    sentence = r"TensorboardXWriter\) cannot be written .*: make room, and .* iteration 3, which is"
    with pytest.raises(SystemExit, match=sentence):
        trainer.train()
    assert saved(cfg, "model_final.pth")["iteration"] == 3


def test_a_longer_run_takes_away_the_line_in_which_the_run_before_was_killed(cfg):
    Trainer(cfg).train()
    path = os.path.join(cfg.OUTPUT_DIR, "metrics.json")
    with open(path, "a") as f:
        f.write('{"bbox/AP')
    cfg.SOLVER.MAX_ITER = 6
    resumed = Trainer(cfg)
    resumed.resume_or_load(resume=True)
    resumed.train()
    with open(path) as f:
        assert [json.loads(line)["iteration"] for line in f] == [3, 1, 4, 5, 6]


def test_a_full_disk_is_a_sentence_and_harms_no_checkpoint(cfg):
    cfg.SOLVER.CHECKPOINT_PERIOD = 1
    trainer = Trainer(cfg)
    files = {}

    def read(name):
        with open(os.path.join(cfg.OUTPUT_DIR, name), "rb") as f:
            return f.read()

    def fill_the_disk():
        names = {
            name for name in os.listdir(cfg.OUTPUT_DIR) if "checkpoint" in name or ".p" in name
        }
        files.update((name, read(name)) for name in names)
        # No file may grow beyond half of a checkpoint.
        size = len(files["model_0000000.pth"]) // 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    trainer._trainer.model.register_forward_pre_hook(
        lambda *args: fill_the_disk() if trainer.iter == 1 else None
    )
    sentence = r"model_0000001.pth cannot be written \(.*File too large\): make room"
    try:
        with pytest.raises(CheckpointError, match=sentence):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert set(files) == {"model_0000000.pth", "last_checkpoint", "checkpoints.json"}
    assert {name for name in os.listdir(cfg.OUTPUT_DIR) if ".pth" in name} == {"model_0000000.pth"}
    assert all(read(name) == content for name, content in files.items())
    resumed = Trainer(cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 1
