"""A process that works on one config of a comparison when it is asked to, and sleeps otherwise."""

import logging
import multiprocessing
import os
import signal
import traceback
import warnings
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

from ..engine.scripts import USER_ERRORS
from .inference import InferenceInTurns
from .jobs import BenchmarkError, Job
from .memory import separate_blocks
from .training import TrainingInTurns

__all__ = ["SUBJECTS", "Worker", "serve"]

SUBJECTS = {"training": TrainingInTurns, "inference": InferenceInTurns}
"""What a worker can be: context managers that are made of a job and have a ``describe()``."""


class Worker:
    """The parent's side: starts the process, asks it, and ends it."""

    def __init__(self, job: Job, subject: str = "training", *args: Any) -> None:
        """Starts it, and waits until what it works on is built.

        Args:
            job: that it works on.
            subject: one of `SUBJECTS`.
            args: of its constructor, behind the job.

        Raises:
            BenchmarkError: it failed.
        """
        self.job, self._subject = job, subject
        # A process that was forked could not use a GPU that this one has touched.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=serve, args=(job, subject, args, theirs), daemon=True
        )
        self._process.start()
        theirs.close()  # so that its end is noticed
        try:
            self.description = self._answer()
        except BaseException:
            self.close()
            raise

    def run(self, count: int) -> dict[str, Any]:
        """Lets it run ``count`` steps or passes; see the method ``run`` of its subject.

        Raises:
            BenchmarkError: it failed.
        """
        return self.ask("run", count)

    def ask(self, method: str, *args: Any) -> Any:
        """Calls another method of its subject.

        Raises:
            BenchmarkError: it failed.
        """
        with suppress(BrokenPipeError):  # it died while it waited: what it said is still to be read
            self._connection.send((method, args))
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        self._connection.close()
        self._process.join(timeout=5)
        self._process.terminate()
        self._process.join()

    def _answer(self) -> Any:
        what = f"The {self._subject} of {self.job.config_file}"
        try:
            answer = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode
            how = f"signal {-code} ended it" if code < 0 else f"it ended with the exit code {code}"
            memory = "; is there memory for all of them?" if code == -9 else "."
            raise BenchmarkError(f"{what} is gone: {how}{memory}") from None
        if "error" in answer:
            raise BenchmarkError(f"{what} failed: {answer['error']}")
        return answer["result"]


def serve(job: Job, subject: str, args: tuple, connection: Connection) -> None:
    """The process's side.

    It sends what it works on (its subject's ``describe()``), and then answers every name of a
    method and arguments with ``{"result": ...}``. In between it sleeps. It ends when the other side
    is gone. An error is sent as ``{"error": text}``.

    Args:
        job: that it works on.
        subject: one of `SUBJECTS`.
        args: of its constructor, behind the job.
        connection: its end of a pipe.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    separate_blocks(True)
    os.dup2(2, 1)  # standard output belongs to the parent's table
    # The profiler's library looks for a GPU, and complains where there is none.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    logging.disable(logging.INFO)
    for harmless in ("torch.meshgrid", "Warning: Profiler clears"):
        warnings.filterwarnings("ignore", harmless)
    if job.setting.threads is not None:
        torch.set_num_threads(job.setting.threads)
    try:
        with SUBJECTS[subject](job, *args) as worked_on:
            connection.send({"result": worked_on.describe()})
            while True:
                method, values = connection.recv()
                connection.send({"result": getattr(worked_on, method)(*values)})
    except (EOFError, BrokenPipeError):  # the other side is gone
        return
    except (BenchmarkError, *USER_ERRORS) as error:
        connection.send({"error": str(error)})
    except Exception as error:
        traceback.print_exc()
        reason = str(error).strip().partition("\n")[0]
        connection.send({"error": f"{type(error).__name__}: {reason}"})
