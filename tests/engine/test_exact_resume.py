"""A training that is killed again and again ends where an uninterrupted one ends, bit for bit."""

import json
import subprocess
import sys
from itertools import cycle
from pathlib import Path

import pytest
import torch

from tests.conftest import REPOSITORY

# What, iteration, signal; checkpoints are saved after iterations 2, 5, ..., 23, evaluations run
# after 3, 7, ..., 19 and at the end, at 24.
MOMENTS = [
    ("loader", 0, "SIGKILL"),
    ("backward", 1, "SIGKILL"),
    ("saving, half", 2, "SIGKILL"),
    ("optimizer", 3, "SIGTERM"),
    ("evaluation", 3, "SIGKILL"),
    ("saving, before the new name", 5, "SIGKILL"),
    ("saving, after the new name", 5, "SIGKILL"),
    ("forward", 6, "SIGTERM"),
    ("evaluation", 7, "SIGTERM"),
    ("saving last_checkpoint, half", 8, "SIGKILL"),
    ("saving checkpoints.json, after the new name", 8, "SIGKILL"),
    ("loader", 10, "SIGTERM"),
    ("writing", 11, "SIGKILL"),
    ("evaluation", 11, "SIGKILL"),
    ("forward", 12, "SIGKILL"),
    ("saving, half", 14, "SIGKILL"),
    ("evaluation", 15, "SIGTERM"),
    ("optimizer", 16, "SIGTERM"),
    ("saving, after the new name", 17, "SIGKILL"),
    ("optimizer", 20, "SIGKILL"),
    ("saving, half", 23, "SIGKILL"),
    ("evaluation", 24, "SIGKILL"),
    ("evaluation", 24, "SIGTERM"),
]
QUICK = [MOMENTS[i] for i in (8, 17)]
STATUS = {"SIGKILL": -9, "SIGTERM": 143}
CLOCK = ("time", "data_time", "rank_data_time", "eta_seconds", "max_memory_mb")


def train(folder, kind, **options):
    arguments = json.dumps({"kind": kind, "folder": str(folder), **options})
    command = [sys.executable, "-m", "tests.engine.killed_run", arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


def outcome(folder: Path):
    """All that a training leaves and a clock has no part in, as a flat dict."""
    output = folder / "output"
    found = {}
    for name in ("model_final.pth", "model_best.pth"):
        checkpoint = torch.load(output / name, weights_only=True)
        checkpoint["trainer"]["hooks"]["RunState"].pop("writers")  # sizes of files with times
        found[name] = checkpoint
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    found["metrics"] = [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]
    return flat(found)


def flat(node, path=""):
    if isinstance(node, dict):
        items = node.items()
    elif isinstance(node, (list, tuple)):
        items = enumerate(node)
    else:
        return {path: node}
    return {k: v for key, value in items for k, v in flat(value, f"{path}/{key}").items()}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert not [key for key, value in ours.items() if not same(value, theirs[key])]


def same(ours, theirs):
    if torch.is_tensor(ours):
        return torch.equal(ours, theirs)
    return ours == theirs or (ours != ours and theirs != theirs)  # NaN: no object of that size


@pytest.mark.parametrize(
    ("kind", "moments"),
    [
        pytest.param("faster_rcnn", QUICK, id="faster_rcnn, a few"),
        pytest.param("faster_rcnn", MOMENTS, id="faster_rcnn", marks=pytest.mark.long),
        pytest.param("retinanet", MOMENTS[::3], id="retinanet", marks=pytest.mark.long),
        pytest.param("cs_kd", MOMENTS, id="cs_kd", marks=pytest.mark.long),
    ],
)
def test_a_training_that_is_killed_again_and_again_ends_as_if_nothing_had_happened(
    tmp_path, kind, moments
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    done = train(whole, kind)
    assert done.returncode == 0, done.stderr
    resume = False
    for moment, workers in zip([*moments, None], cycle((0, 2, 4))):
        done = train(killed, kind, workers=workers, resume=resume, moment=moment)
        assert done.returncode == (STATUS[moment[2]] if moment else 0), (moment, done.stderr)
        assert not done.stdout.startswith("start 0") or moment in moments[:3], (moment, done.stdout)
        resume = True
    assert_equal(outcome(killed), outcome(whole))
