"""LabelEnc's two steps by one command."""

import runpy
import subprocess
import sys

import pytest
import torch

from sssd.engine import argument_parser
from tests.coco_files import write_coco
from tests.conftest import REPOSITORY
from tests.tools.test_train_net import RUN, SMALL, call, error_of


def train(folder, *args, script="train_labelenc.py"):
    recipe = REPOSITORY / "configs/LabelEnc/faster_rcnn_R_50_FPN_1x.yaml"
    return call(
        ["-c", RUN, folder / "annotations.json", folder / "images", REPOSITORY / "tools" / script],
        "--config-file", recipe, *args,
    )  # fmt: skip


@pytest.mark.long
def test_the_second_step_continues_from_the_first(tmp_path):
    write_coco(tmp_path)
    own = [
        *SMALL, "OUTPUT_DIR", tmp_path / "output", "MODEL.WEIGHTS", "",
        "MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.RESNETS.NORM", "BN", "MODEL.RESNETS.DEPTH", 18,
        "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.STRIDE_IN_1X1", False,
        "SOLVER.BASE_LR", 0.001, "SOLVER.STEPS", "(2,)", "MODEL.SSSD.LABELENC.WARMUP_ITERS", 1,
    ]  # fmt: skip
    refused = train(tmp_path, *own, script="train_net.py")
    assert "recipe of two steps" in error_of(refused)
    assert "tools/train_labelenc.py" in error_of(refused)

    first = train(tmp_path, "--step", 1, *own)
    assert first.returncode == 0, first.stderr[-3000:]
    assert "coefficient 0 from iteration 0, 1 from iteration 1" in first.stdout
    second = train(tmp_path, "--step", 2, *own)
    assert second.returncode == 0, second.stderr[-3000:]
    assert "coefficient 1 from iteration 0, 0 from iteration 2" in second.stdout
    found = [
        torch.load(tmp_path / f"output/step{n}/model_final.pth", weights_only=True) for n in (1, 2)
    ]
    for name, value in found[0]["sssd"].items():
        if name.startswith("teacher.") and not name.endswith("_extra_state"):
            assert torch.equal(found[1]["sssd"][name], value), name


def test_one_command_runs_both_steps_and_stops_at_a_failure(tmp_path, monkeypatch):
    script = str(REPOSITORY / "tools/train_labelenc.py")
    run_both = runpy.run_path(script, run_name="imported")["run_both"]
    recipe = str(REPOSITORY / "configs/LabelEnc/retinanet_R_50_FPN_1x.yaml")
    statuses, commands = [], []

    class Step:
        def __init__(self, command):
            commands.append(command)

        def wait(self):
            return statuses.pop(0)

    monkeypatch.setattr(subprocess, "Popen", Step)

    def both(*args):
        commands.clear()
        args = ["--config-file", recipe, *args, "OUTPUT_DIR", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", [script, *args])
        status = run_both(argument_parser().parse_args(args))
        return status, [command[3] for command in commands if command[1:3] == [script, "--step"]]

    statuses[:] = [0, 0]
    assert both() == (0, ["1", "2"])
    assert commands[1][4:] == ["--config-file", recipe, "OUTPUT_DIR", str(tmp_path)]
    statuses[:] = [3]
    assert both() == (3, ["1"])
    statuses[:] = [0, 0]
    assert both("--resume") == (0, ["1", "2"])  # step 1 is not complete
    (tmp_path / "step1").mkdir()
    (tmp_path / "step1" / "model_final.pth").touch()
    statuses[:] = [0]
    assert both("--resume") == (0, ["2"])


def test_evaluation_is_another_scripts(monkeypatch, capsys):
    script = str(REPOSITORY / "tools/train_labelenc.py")
    monkeypatch.setattr(sys, "argv", [script, "--eval-only"])
    with pytest.raises(SystemExit):
        runpy.run_path(script, run_name="__main__")
    assert "--eval-only is of tools/train_net.py" in capsys.readouterr().err
