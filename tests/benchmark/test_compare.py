"""Trainings are compared in turns, and the table says what was measured."""

import itertools
import json
import os
import re
import runpy
import signal
import subprocess
import sys

import pytest
import torch

import sssd  # noqa: F401  (before Detectron2: it applies the compatibility layer)
from sssd.benchmark.compare import measure, summarise, take_turns
from sssd.benchmark.compile import compile_parts
from sssd.benchmark.jobs import BenchmarkError, plan_jobs
from sssd.benchmark.training import TrainingInTurns
from sssd.benchmark.worker import Worker
from sssd.classification import build_network
from sssd.engine import ConfigError
from tests.conftest import REPOSITORY
from tests.detectors import build, losses_at, tiny_config

SMALL = ["SOLVER.IMS_PER_BATCH", "4"]


def digits(method):
    return str(REPOSITORY / f"configs/Classification/{method}_cifar_resnet8_digits.yaml")


def job(method, opts=(), **kwargs):
    return plan_jobs([digits(method)], [*SMALL, *opts], **kwargs)[0]


def call(folder, *args, tool="benchmark"):
    return subprocess.run(
        [sys.executable, REPOSITORY / f"tools/{tool}.py", *map(str, args)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def turn(seconds, memory=(100, 300), data=0.5):
    return {
        "step_seconds": seconds,
        "data_seconds": [data] * len(seconds),
        "batch_size": 8,
        "memory": dict(zip(("before", "peak"), memory, strict=True)),
        "began": 0.0,
        "ended": 1.0,
    }


def test_trainings_take_turns():
    calls = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def run(self, count):
            calls.append((self.name, count))
            return {"of": self.name, "turn": len(calls)}

    turns = take_turns([Recorder("A"), Recorder("B"), Recorder("C")], rounds=2, steps=4)
    assert calls == [(name, 4) for name in "ABCABC"]
    assert [[x["turn"] for x in own] for own in turns] == [[1, 4], [2, 5], [3, 6]]


def test_ratios_are_those_of_the_same_round():
    # The machine is ten times slower in the last round: the ratios of the rounds are 2, 3 and 4.
    first = [turn([1.0, 1.0, 9.0]), turn([1.0]), turn([10.0])]
    other = [turn([2.0], (0, 0)), turn([3.0], (0, 0)), turn([40.0], (50, 150))]
    a, b = summarise([first, other])
    assert a["ratio"] == {"median": 1.0, "q1": 1.0, "q3": 1.0}
    assert b["ratio"] == {"median": 3.0, "q1": 2.5, "q3": 3.5}
    assert b["step_seconds"] == 3.0 and b["images_per_second"] == pytest.approx(8 / 3)
    assert a["memory"]["above"] == 200 and a["memory_ratio"] == 1.0
    assert b["memory"]["above"] == 100 and b["memory_ratio"] == 0.5
    assert b["data_seconds"] == 0.5


def test_memory_that_is_not_known_has_no_ratio():
    a, b = summarise([[turn([1.0], (None, None))], [turn([1.0], (None, None))]])
    assert a["memory_ratio"] is None and b["memory_ratio"] is None


def test_a_training_begins_in_the_middle_and_leaves_its_weights():
    with TrainingInTurns(job("kd", ["SOLVER.MAX_ITER", "6"])) as training:
        before = {name: p.clone() for name, p in training.model.named_parameters()}
        iterations = []
        run_step = training.trainer.run_step
        training.trainer.run_step = lambda: (iterations.append(training.trainer.iter), run_step())
        training.run(2)
        training.run(3)
        assert iterations == [3, 4, 5, 3, 4]
        for name, parameter in training.model.named_parameters():
            assert torch.equal(parameter, before[name]), name
        assert any(p.grad is not None and p.grad.any() for p in training.model.parameters())
        teacher = sum(p.numel() for p in training.model.teacher.parameters())
        assert training.describe()["training_only_parameters"] == teacher


def test_a_step_of_mutual_learning_updates_every_network():
    with TrainingInTurns(job("dml")) as training:
        learners = []
        training.model.register_forward_hook(lambda model, *_: learners.append(model.learner))
        training.run(2)
        assert learners == [0, 1, 0, 1]
        assert training.batches._ready == []  # a step uses what was loaded for it


def test_a_first_iteration_after_the_last_is_refused():
    with pytest.raises(ValueError, match=r"no iteration 200: it has SOLVER.MAX_ITER 200"):
        TrainingInTurns(job("ce"), first_iteration=200)


def test_a_stage_is_timed_in_the_configs_that_have_it():
    files = [digits("ce"), digits("fitnets")]
    last = plan_jobs(files)
    assert [(x.name, x.stage) for x in last] == [
        ("ce_cifar_resnet8_digits", "student"),
        ("fitnets_cifar_resnet8_digits", "student"),
    ]
    hint = plan_jobs(files, stage="hint")
    assert [x.name for x in hint] == [
        "ce_cifar_resnet8_digits",
        "fitnets_cifar_resnet8_digits (hint)",
    ]
    assert [term["name"] for term in hint[1].cfg.MODEL.SSSD.CLASSIFIER.TERMS] == ["hint"]


def test_overrides_may_follow_the_files_directly():
    parse = runpy.run_path(str(REPOSITORY / "tools/benchmark.py"))["parse"]
    args = parse(["--config-file", "A.yaml", "B.yaml", "SEED", "3"])
    assert args.config_file == ["A.yaml", "B.yaml"] and args.opts == ["SEED", "3"]
    args = parse(["--config-file", "A.yaml", "--rounds", "2", "SEED", "3"])
    assert args.config_file == ["A.yaml"] and args.opts == ["SEED", "3"]


@pytest.mark.parametrize(
    ("files", "options", "sentence"),
    [
        (["none.yaml"], {}, "The config none.yaml does not exist: correct --config-file."),
        ([digits("fitnets")], {"stage": "x"}, "the stages are teacher, hint, student."),
        ([digits("ce")], {"opts": ["SOLVER.NONE", "1"]}, "there is no key SOLVER.NONE"),
        ([digits("ce")], {"opts": ["SEED"]}, "The overrides SEED are no pairs"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_starts(files, options, sentence):
    with pytest.raises((BenchmarkError, ConfigError), match=re.escape(sentence)):
        plan_jobs(files, **options)


@pytest.mark.long
def test_a_training_that_fails_is_named_with_its_reason():
    jobs = [job("ce"), job("ce", ["DATASETS.TRAIN", "('absent',)"])]
    with pytest.raises(BenchmarkError, match=r"ce_cifar_resnet8_digits.yaml failed: .*'absent'"):
        measure(jobs, rounds=1, steps=1, warmup=1)


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_training_that_is_killed_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # it leaves its folder
    worker = Worker(job("ce"))
    try:
        os.kill(worker._process.pid, signal.SIGKILL)
        with pytest.raises(BenchmarkError, match=r"digits.yaml is gone: signal 9 ended it"):
            worker.run(1)
    finally:
        worker.close()


@pytest.mark.long
def test_the_table_says_what_the_json_holds(tmp_path):
    out = tmp_path / "results/step_time.json"
    result = call(
        tmp_path, "--config-file", digits("ce"), digits("kd"), "--rounds", 2, "--steps", 3,
        "--device", "cpu", "--json", out, *SMALL,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert sorted(os.listdir(tmp_path)) == ["results"]  # no output folder of a training

    report = json.loads(out.read_text())
    ce, kd = report["configs"]
    turns = [x for both in zip(ce["turns"], kd["turns"], strict=True) for x in both]
    assert len(turns) == 4 and all(len(x["step_seconds"]) == 3 for x in turns)
    for one, following in itertools.pairwise(turns):
        assert one["ended"] <= following["began"]
    assert ce["ratio"] == {"median": 1.0, "q1": 1.0, "q3": 1.0} and ce["memory_ratio"] == 1.0
    assert report["threads"] == 1 and report["versions"]["torch"] == torch.__version__
    assert "--rounds 2" in report["command"] and report["command"].startswith("OMP_NUM_THREADS=1")
    assert {x["batch_size"] for x in (ce, kd)} == {4}

    def count(name):
        network = build_network(name, num_classes=10, in_chans=1)
        return sum(p.numel() for p in network.parameters())

    assert ce["student_parameters"] == kd["student_parameters"] == count("cifar_resnet8")
    assert ce["training_only_parameters"] == 0
    assert kd["training_only_parameters"] == count("cifar_resnet20")

    rows = [line.split("|")[1:-1] for line in result.stdout.splitlines() if line.startswith("|")]
    assert len({len(line) for line in result.stdout.splitlines() if line.startswith("|")}) == 1
    rows = [[cell.strip() for cell in row] for row in rows]
    for row, config in zip(rows[2:], (ce, kd), strict=True):
        cells = dict(zip(rows[0], row, strict=True))
        assert cells["config"] == config["name"]
        assert float(cells["step, ms"]) == pytest.approx(config["step_seconds"] * 1e3, abs=0.06)
        assert float(cells["time ratio"]) == pytest.approx(config["ratio"]["median"], abs=0.006)
        assert int(cells["student, parameters"].replace(",", "")) == config["student_parameters"]
        above = config["memory"]["peak"] - config["memory"]["before"]
        assert float(cells["memory, MiB"]) == pytest.approx(above / 2**20, abs=0.51)
    assert "threads of each process: 1" in result.stdout


@pytest.mark.long
def test_detectors_are_compared_on_generated_batches_from_no_file(tmp_path):
    configs = [REPOSITORY / f"configs/Demo/faster_rcnn_R_18_FPN{x}.yaml" for x in ("", "_sssd")]
    result = call(
        tmp_path, "--config-file", *configs, "--variant", "mse", "MODEL.SSSD.DISTANCE.NAME", "mse",
        "--image-size", 64, 96, "--objects", 3, "--batch", 2, "--classes", 5, "--threads", 1,
        "--rounds", 2, "--steps", 1, "--breakdown", 1, "--inference", "--device", "cpu",
        "--json", "out.json", "--chart", "steps.svg", "DATASETS.TRAIN", "('absent',)",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads((tmp_path / "out.json").read_text())
    plain, distilled, mse = report["configs"]
    assert mse["name"] == "mse" and mse["student_parameters"] == plain["student_parameters"]
    assert report["data"]["objects"] == "3"
    assert {x["batch_size"] for x in report["configs"]} == {2}
    assert "teacher" in distilled["breakdown"]["parts"]
    assert "teacher" not in plain["breakdown"]["parts"]
    assert [x["largest_difference"] for x in report["inference"]] == [0.0] * 3
    assert "the same" in result.stdout and "64 x 96" in result.stdout
    assert "<svg" in (tmp_path / "steps.svg").read_text()


@pytest.mark.long
def test_compiled_parts_are_named_and_compute_the_same():
    model, compiled = (build(tiny_config()) for _ in range(2))
    parts = compile_parts(compiled)
    assert parts == ["backbone", "adapter", "teacher.appearance_encoder", "teacher.painter"]
    torch.manual_seed(0)
    expected, _ = losses_at(model)
    torch.manual_seed(0)
    losses, _ = losses_at(compiled)
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-3), name
