"""The command line with the recipes of image classification."""

import importlib.util
import json
import logging
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("timm", reason="timm is not installed")

from sssd.engine import CheckpointError, ClassificationTrainer, argument_parser
from tests.classifiers import CONFIGS, KEYS, TINY
from tests.conftest import REPOSITORY


@pytest.fixture
def train_net(monkeypatch):
    """tools/train_net.py with these arguments, in this process; what its main returns."""
    spec = importlib.util.spec_from_file_location("train_net", REPOSITORY / "tools/train_net.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def call(recipe, output, *args):
        path = CONFIGS / f"{recipe}_cifar_resnet8_digits.yaml"
        args = argument_parser().parse_args(
            [
                "--config-file", str(path), *args[: 1 if args and args[0].startswith("--") else 0],
                "DATASETS.TRAIN", f"('{TINY}',)", "DATASETS.TEST", f"('{TINY}',)",
                "SOLVER.MAX_ITER", "4", "SOLVER.STEPS", "()", "SOLVER.WARMUP_ITERS", "0",
                "SOLVER.IMS_PER_BATCH", "8", "SEED", "3", "OUTPUT_DIR", str(output),
                "SOLVER.CHECKPOINT_PERIOD", "1",
                *args[1 if args and args[0].startswith("--") else 0 :],
            ]
        )  # fmt: skip
        return script.main(args)

    yield call
    for name in ("detectron2", "fvcore", "sssd"):  # which setup gave handlers on files
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()
        logger.propagate = True


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        ("byot", ["classification", "head1", "head2", "ensemble"]),
        ("one", ["classification", "branch2", "branch3", "ensemble"]),
        ("dml", ["classification", "peer1", "ensemble_of_peers"]),
        ("fitnets", ["classification"]),
        ("born_again_cwtm", ["classification"]),
    ],
)
def test_evaluation_alone_reports_what_training_did(tmp_path, train_net, recipe, names):
    results = train_net(recipe, tmp_path)
    trained = list(results.values())[-1 if recipe != "born_again_cwtm" else -2]
    assert list(trained) == names
    weights = str(tmp_path / "model_final.pth")
    assert train_net(recipe, tmp_path, "--eval-only", "MODEL.WEIGHTS", weights) == trained


def test_a_plain_state_dict_is_enough_where_the_student_is_all_there_is(tmp_path, train_net):
    trained = train_net("kd", tmp_path)["student"]
    path = tmp_path / "plain.pth"
    torch.save(torch.load(tmp_path / "model_final.pth", weights_only=True)["model"], path)
    assert train_net("kd", tmp_path, "--eval-only", "MODEL.WEIGHTS", str(path)) == trained
    sentence = r"plain\.pth lacks sssd: it is a classifier without the heads, branches or peers"
    with pytest.raises(CheckpointError, match=sentence):
        train_net("byot", tmp_path, "--eval-only", "MODEL.WEIGHTS", str(path))


def test_a_resume_continues_an_earlier_stage_with_the_same_config_only(
    tmp_path, train_net, monkeypatch
):
    run_step = ClassificationTrainer.run_step

    def fail(self):
        run_step(self)
        if (os.path.basename(self.cfg.OUTPUT_DIR), self.iter) == ("generation0", 2):
            raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(ClassificationTrainer, "run_step", fail)
        with pytest.raises(InterruptedError):
            train_net("born_again_cwtm", tmp_path / "output")
    sentence = r"NETWORK was cifar_resnet8 and is cifar_resnet14.*another OUTPUT_DIR"
    with pytest.raises(CheckpointError, match=sentence):
        train_net("born_again_cwtm", tmp_path / "output", "--resume",
                  KEYS + "NETWORK", "cifar_resnet14")  # fmt: skip
    starts = []
    train = ClassificationTrainer.train
    monkeypatch.setattr(
        ClassificationTrainer, "train", lambda self: (starts.append(self.start_iter), train(self))
    )
    results = train_net("born_again_cwtm", tmp_path / "output", "--resume")
    assert starts == [2, 0]
    assert list(results) == ["generation0", "generation1", "ensemble"]
    assert json.loads((tmp_path / "output" / "results.json").read_text()) == results


@pytest.mark.long
def test_the_script_itself_trains_on_digits_and_ends_bad_settings_in_one_sentence(tmp_path):
    def call(*args):
        return subprocess.run(
            [sys.executable, REPOSITORY / "tools/train_net.py", "--config-file",
             CONFIGS / "kd_cifar_resnet8_digits.yaml", *args,
             "SOLVER.MAX_ITER", "100", "SOLVER.STEPS", "(80,)", "SEED", "1",
             "OUTPUT_DIR", tmp_path / "output"],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True,
        )  # fmt: skip

    bad = call(KEYS + "TEACHER.NETWORK", "cifar_resnet21")
    assert bad.returncode != 0 and "Starting training" not in bad.stdout
    last = bad.stderr.strip().splitlines()[-1]
    assert last.startswith("error: In the stage 'teacher': There is no network 'cifar_resnet21'")

    good = call()
    assert good.returncode == 0, good.stderr
    results = json.loads((tmp_path / "output" / "results.json").read_text())
    assert list(results) == ["teacher", "student"]
    assert results["student"]["classification"]["top1"] > 60  # chance is 10
