"""The command line, as users call it."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
import yaml

from tests.coco_files import write_coco
from tests.conftest import REPOSITORY

# Registers a dataset before the script runs, as a user's own code would.
RUN = """
import sys, runpy
import sssd
from detectron2.data.datasets import register_coco_instances
register_coco_instances("own", {}, sys.argv.pop(1), sys.argv.pop(1))
sys.argv[0] = sys.argv.pop(1)
runpy.run_path(sys.argv[0], run_name="__main__")
"""

SMALL = [
    "MODEL.FPN.OUT_CHANNELS", "16", "MODEL.ROI_BOX_HEAD.FC_DIM", "32",
    "MODEL.ROI_HEADS.NUM_CLASSES", "3", "INPUT.MIN_SIZE_TRAIN", "(64,)",
    "INPUT.MIN_SIZE_TEST", "64", "DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "2",
    "DATASETS.TRAIN", "('own',)", "DATASETS.TEST", "('own',)", "SOLVER.MAX_ITER", "3",
]  # fmt: skip


def call(script, *args, env=()):
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *script, *map(str, args)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **dict(env)},
        capture_output=True,
        text=True,
    )


def train(folder, *args):
    """train_net.py with the demo's self-distilled config on the dataset "own" in ``folder``."""
    script = REPOSITORY / "tools/train_net.py"
    return call(
        ["-c", RUN, folder / "annotations.json", folder / "images", script],
        "--config-file", REPOSITORY / "configs/Demo/faster_rcnn_R_18_FPN_sssd.yaml", *args,
    )  # fmt: skip


def error_of(result):
    assert result.returncode != 0, result.stdout[-2000:]
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: "), result.stderr[-3000:]
    return last


def test_train_resume_evaluate_and_export(tmp_path):
    write_coco(tmp_path)
    output = tmp_path / "output"
    common = [*SMALL, "OUTPUT_DIR", output]

    first = train(tmp_path, *common)
    assert first.returncode == 0, first.stderr
    assert "Self-distillation of GeneralizedRCNN: levels p3, p4, p5, p6" in first.stdout
    assert "6 images" in first.stdout

    longer = [*common, "SOLVER.MAX_ITER", "5"]
    second = train(tmp_path, "--resume", *longer)
    assert second.returncode == 0, second.stderr
    assert "Starting training from iteration 3" in second.stdout

    weights = output / "model_final.pth"
    third = train(tmp_path, "--eval-only", *longer, "MODEL.WEIGHTS", weights)
    assert third.returncode == 0, third.stderr
    trained = [json.loads(x) for x in (output / "metrics.json").read_text().splitlines()]
    final = next(x for x in reversed(trained) if "bbox/AP" in x)
    assert f"copypaste: {final['bbox/AP']:.4f}," in third.stdout

    student = tmp_path / "student"
    exported = call([REPOSITORY / "tools/export_student.py"], weights, "--output", student)
    assert exported.returncode == 0, exported.stderr
    config = yaml.safe_load((student / "config.yaml").read_text())
    assert config["MODEL"]["META_ARCHITECTURE"] == "GeneralizedRCNN"
    whole = torch.load(weights, weights_only=True)["model"]
    slim = torch.load(student / "model.pth", weights_only=True)["model"]
    assert slim.keys() == whole.keys() and all(torch.equal(slim[k], whole[k]) for k in slim)


@pytest.mark.long
def test_another_config_in_the_same_folder_cannot_be_resumed(tmp_path):
    write_coco(tmp_path)
    common = [*SMALL, "OUTPUT_DIR", tmp_path / "output", "SOLVER.MAX_ITER", "1"]
    assert train(tmp_path, *common).returncode == 0
    result = train(tmp_path, "--resume", *common, "MODEL.FPN.OUT_CHANNELS", "32")
    assert "MODEL.FPN.OUT_CHANNELS was 16 and is 32" in error_of(result)


@pytest.mark.parametrize(
    ("opts", "sentence"),
    [
        (["MODEL.SSSD.STUDENT", "YOLO"], "MODEL.SSSD.STUDENT is 'YOLO'"),
        pytest.param(["MODEL.ROI_HEADS.NUM_CLASSES", "7"], "NUM_CLASSES", marks=pytest.mark.long),
        pytest.param(
            ["TEST.AUG.ENABLED", "True"],
            "Test-time augmentation works on the stock detector",
            marks=pytest.mark.long,
        ),
        (["MODEL.WEIGHTS", "no/such/file.pth"], "no/such/file.pth does not exist"),
    ],
)
def test_bad_settings_end_in_one_sentence_before_training(tmp_path, opts, sentence):
    write_coco(tmp_path)
    result = train(tmp_path, *SMALL, "OUTPUT_DIR", tmp_path / "output", *opts)
    assert sentence in error_of(result)
    assert "Starting training" not in result.stdout


def test_missing_data_names_path_and_variable(tmp_path):
    result = call(
        [REPOSITORY / "tools/train_net.py"],
        "--config-file", REPOSITORY / "configs/BCCD/faster_rcnn_R_18_FPN.yaml",
        "OUTPUT_DIR", tmp_path / "output",
        env={"DETECTRON2_DATASETS": str(tmp_path / "nothing")},
    )  # fmt: skip
    sentence = error_of(result)
    assert str(tmp_path / "nothing/bccd/annotations/instances_train.json") in sentence
    assert "DETECTRON2_DATASETS" in sentence


def test_an_unreadable_image_is_named(tmp_path):
    write_coco(tmp_path)
    for path in (tmp_path / "images").glob("*.png"):
        path.write_bytes(path.read_bytes()[:100])
    result = train(tmp_path, *SMALL, "OUTPUT_DIR", tmp_path / "output")
    assert str(tmp_path / "images") in error_of(result)


@pytest.mark.long
def test_coco_r50_trains_resumes_and_evaluates_on_real_images(datasets_root, tmp_path):
    output = tmp_path / "output"
    from_scratch = [
        "MODEL.WEIGHTS", "", "MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", "0",
        "INPUT.MIN_SIZE_TRAIN", "(160,)", "INPUT.MIN_SIZE_TEST", "160",
        "SOLVER.IMS_PER_BATCH", "2", "SOLVER.BASE_LR", "0.002", "DATALOADER.NUM_WORKERS", "0",
        "MODEL.SSSD.PHASES.NO_DISTILL_ITERS", "10", "MODEL.SSSD.PHASES.FREEZE_BACKBONE_ITERS", "5",
        "OUTPUT_DIR", output,
    ]  # fmt: skip

    def run(*args):
        result = call(
            [REPOSITORY / "tools/train_net.py"],
            "--config-file", REPOSITORY / "configs/SSSD/faster_rcnn_R_50_FPN_2x.yaml",
            *args, env={"DETECTRON2_DATASETS": str(datasets_root), "OMP_NUM_THREADS": "2"},
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    run(*from_scratch, "SOLVER.MAX_ITER", "20")
    resumed = run("--resume", *from_scratch, "SOLVER.MAX_ITER", "40")
    assert "Starting training from iteration 20" in resumed
    lines = [json.loads(x) for x in (output / "metrics.json").read_text().splitlines()]
    losses = [x for x in lines if "loss_distill" in x]
    assert [x["iteration"] for x in losses] == [19, 39]
    for line in losses:
        assert all(math.isfinite(v) for k, v in line.items() if "loss" in k)
    evaluated = run("--eval-only", *from_scratch, "MODEL.WEIGHTS", output / "model_final.pth")
    assert "Evaluation results for bbox" in evaluated
