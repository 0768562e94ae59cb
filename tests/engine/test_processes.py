"""Several processes of one training, started as users start them."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.conftest import REPOSITORY
from tests.engine.test_exact_resume import assert_equal, outcome
from tests.ranks import free_port

TIMEOUT = 15  # seconds
ENDED = "error: Process 0 of 2 stops, because another one has ended ("
SILENT = "error: Process 0 of 2 stops, because another one has not answered within 0:00:15 ("
# What happens to the second process, in which iteration, and what is said then. They tell each
# other of SIGTERM at the beginning of an iteration.
MOMENTS = [
    ("backward", 4, "SIGKILL", ENDED),
    ("optimizer", 5, "a mistake", ENDED),
    ("evaluation", 7, "nothing more", SILENT),
    ("forward", 9, "SIGTERM", "Stopped after iteration 10, which is saved, because SIGTERM came"),
]


def train(*folders, torchrun, **options):
    """Two processes, on one machine or, with two folders, on two that do not see each other's."""
    running, port = [], free_port()
    for machine, folder in enumerate(folders):
        place = [len(folders), machine, f"tcp://127.0.0.1:{port}"]
        arguments = {"kind": "faster_rcnn", "folder": str(folder), "timeout": TIMEOUT, **options}
        start = [sys.executable]
        if torchrun:
            start += ["-m", "torch.distributed.run", "--nnodes", place[0], "--node_rank", machine,
                      "--nproc_per_node", 2 // place[0], "--master_addr", "127.0.0.1",
                      "--master_port", port]  # fmt: skip
        else:
            arguments.update(place=place, processes=2 // place[0])
        command = [str(x) for x in (*start, "-m", "tests.engine.killed_run")]
        said = folder / "said.txt"
        with open(said, "w") as output:
            process = subprocess.Popen(
                [*command, json.dumps(arguments)], cwd=REPOSITORY, stdout=output, stderr=output
            )
        running.append((process, said))
    try:
        # One that stands still is killed half a minute after the other has ended.
        statuses = [process.wait(timeout=240) for process, _ in running]
    finally:
        for process, _ in running:
            process.kill()
    return SimpleNamespace(
        ended_well=not any(statuses), said="".join(said.read_text() for _, said in running)
    )


def make(*folders):
    for folder in folders:
        folder.mkdir()
    return folders


@pytest.fixture(scope="module", params=[False, True], ids=["own", "torchrun"])
def whole(request, tmp_path_factory):
    """An uninterrupted training."""
    folder = tmp_path_factory.mktemp("whole")
    done = train(folder, torchrun=request.param)
    assert done.ended_well, done.said
    return SimpleNamespace(torchrun=request.param, outcome=outcome(folder))


@pytest.mark.long
def test_two_processes_that_are_interrupted_end_as_if_nothing_had_happened(whole, tmp_path):
    (folder,) = make(tmp_path / "killed")
    for *moment, sentence in MOMENTS:
        done = train(folder, torchrun=whole.torchrun, moment=moment, resume=True)
        assert not done.ended_well and sentence in done.said, (moment, done.said)
        if moment[2] == "a mistake":
            assert "KeyError: 'a mistake in the code'" in done.said
        elif not whole.torchrun:  # which has a traceback of its own
            assert "Traceback" not in done.said, (moment, done.said)
    done = train(folder, torchrun=whole.torchrun, resume=True)
    assert done.ended_well and "start 11" in done.said, done.said
    assert_equal(outcome(folder), whole.outcome)


@pytest.mark.long
def test_so_do_two_machines_without_a_common_disk(whole, tmp_path):
    folders = make(tmp_path / "first", tmp_path / "second")
    moment, sentence = MOMENTS[0][:3], MOMENTS[0][3]
    done = train(*folders, torchrun=whole.torchrun, moment=moment)
    assert not done.ended_well and sentence in done.said, done.said
    assert not (folders[1] / "output" / "last_checkpoint").exists()
    done = train(*folders, torchrun=whole.torchrun, resume=True)
    assert done.ended_well and done.said.count("start 4") == 2, done.said
    assert_equal(outcome(folders[0]), whole.outcome)
