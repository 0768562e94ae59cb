"""Several processes of one training, started as users start them."""

import json
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY
from tests.engine.test_exact_resume import assert_equal, outcome

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def train(folder, *, torchrun=False, **options):
    arguments = json.dumps({"kind": "faster_rcnn", "folder": str(folder), **options})
    if torchrun:
        command = [*TORCHRUN, "-m", "tests.engine.killed_run", arguments]
    else:
        arguments = json.dumps({**json.loads(arguments), "processes": 2})
        command = [sys.executable, "-m", "tests.engine.killed_run", arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)


@pytest.mark.long
@pytest.mark.parametrize("torchrun", [False, True], ids=["own", "torchrun"])
def test_two_processes_that_are_interrupted_end_as_if_nothing_had_happened(tmp_path, torchrun):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    done = train(whole, torchrun=torchrun)
    assert done.returncode == 0, done.stderr
    # Of one process; the other one must end as well, and after SIGTERM in order. They tell each
    # other at the beginning of an iteration.
    for moment in (["backward", 4, "SIGKILL"], ["forward", 9, "SIGTERM"]):
        done = train(killed, torchrun=torchrun, moment=moment, resume=True)
        assert done.returncode != 0
    assert "Stopped after iteration 10, which is saved, because SIGTERM came" in done.stdout
    done = train(killed, torchrun=torchrun, resume=True)
    assert done.returncode == 0 and "start 11" in done.stdout, done.stderr
    assert_equal(outcome(killed), outcome(whole))
