"""What the others do when one process dies, fails or hangs: a sentence, within the timeout."""

import sssd  # noqa: F401  (spawned processes import this first: the compatibility layer)

# isort: split
import os
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from detectron2.utils import comm

from sssd.engine.processes import _lost_connection, gloo_group, launch

TIMEOUT = timedelta(seconds=4)


def work(what):
    """In the second process something happens, while the first one waits for it."""
    torch.set_num_threads(1)
    group = gloo_group() if what == "hangs in another group" else None
    comm.synchronize()
    if comm.get_rank() == 1:
        if what == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "fails":
            raise KeyError("a mistake in the code")
        time.sleep(120)
    try:
        dist.all_reduce(torch.ones(1), group=group)
    except RuntimeError as error:
        # As where a config is blamed for what happens in the first iteration.
        raise ValueError("The first iteration fails.") from error


SILENT = "another one has not answered within 0:00:04 (Timed out waiting"


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("is killed", None),
        pytest.param("fails", "another one has ended (", marks=pytest.mark.long),
        pytest.param("hangs", SILENT, marks=pytest.mark.long),
        pytest.param("hangs in another group", SILENT, marks=pytest.mark.long),
    ],
)
def test_the_other_process_ends_with_a_sentence(what, sentence, capfd, caplog):
    start = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        launch(work, 2, args=(what,), timeout=TIMEOUT)
    assert time.monotonic() - start < 90
    written = capfd.readouterr().err
    if what == "is killed":  # the other one is ended, and may be too late to say anything
        assert "Process 1 was ended by SIGKILL; go on with --resume." in caplog.text
        assert ended.value.code == 128 + signal.SIGKILL
    else:
        assert f"error: Process 0 of 2 stops, because {sentence}" in written
        assert "go on with --resume.\n" in written
        assert ended.value.code == 1
    if what == "fails":
        assert "Process 1: Traceback" in written and "KeyError: 'a mistake in the code'" in written
    assert written.count("Traceback") == (what == "fails")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            dist.DistStoreError("wait timeout after 5000ms, keys: /default_pg/0//2//cpu//0/1"),
            "wait timeout after 5000ms, keys: /default_pg/0//2//cpu//0/1",
        ),
        (dist.DistNetworkError("Connection reset by peer"), "Connection reset by peer"),
        (
            dist.DistBackendError(
                "NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:1275, remote "
                "process exited or there was a network error, NCCL version 2.14.3\n"
                "ncclRemoteError: A call failed possibly due to a network error."
            ),
            "NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:1275, remote "
            "process exited or there was a network error, NCCL version 2.14.3",
        ),
        # Their reason is something else.
        (dist.DistBackendError("NCCL error: invalid usage\nDuplicate GPU detected"), None),
        (RuntimeError("[enforce fail at /third_party/gloo/gloo/reduce.cc:1] 12 vs 4"), None),
        (RuntimeError("DataLoader timed out after 5 seconds"), None),
        (OSError("Connection reset by peer"), None),  # of a download
    ],
)
def test_which_errors_are_those_of_another_process(error, reason):
    assert _lost_connection(error) == reason
