"""One training that runs a few steps when it is asked to, and says what they cost.

For :mod:`sssd.engine.benchmark`: each config of a comparison has a process of its own with one.
"""

import ctypes
import gc
import logging
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch import nn

from ..meta_arch import ClassificationDistiller
from .classification import ClassificationTrainer
from .hooks import DistillationMetrics
from .scripts import USER_ERRORS
from .trainer import Trainer

__all__ = ["TrainingInTurns", "serve"]


def serve(cfg: CfgNode, connection: Connection) -> None:
    """The body of a worker process.

    It sends what the training is (`TrainingInTurns.describe`), and then answers every number that
    it receives with what that many steps cost (`TrainingInTurns.run`). In between it sleeps. It
    ends at the number 0, or when the other side is gone. An error is sent as ``{"error": text}``.

    Args:
        cfg: of one training.
        connection: its end of a pipe.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    os.dup2(2, 1)  # standard output belongs to the parent's table
    logging.disable(logging.INFO)
    try:
        with TrainingInTurns(cfg) as training:
            connection.send(training.describe())
            while count := connection.recv():
                connection.send(training.run(count))
    except (EOFError, BrokenPipeError):  # the other side is gone
        return
    except USER_ERRORS as error:
        connection.send({"error": str(error)})
    except Exception as error:
        traceback.print_exc()
        reason = str(error).strip().partition("\n")[0]
        connection.send({"error": f"{type(error).__name__}: {reason}"})


class TrainingInTurns:
    """A training as tools/train_net.py builds it, that stops after every few steps.

    What differs from a real run, so that every step does the same work and nothing else runs:

    - the learning rate is 0, so no loss runs away, whatever the weights are;
    - a batch is loaded before the clock starts, by this process;
    - there are no checkpoints, evaluations and logs; OUTPUT_DIR is a temporary folder;
    - a classification starts from random weights, teacher included, and no term takes over
      anything; a detector starts from MODEL.WEIGHTS.

    A context manager, which removes the folder.
    """

    def __init__(self, cfg: CfgNode, first_iteration: int | None = None) -> None:
        """
        Args:
            cfg: of one training; for a classification, of one stage.
            first_iteration: where in the schedule to begin; None for the middle, where as a rule
                everything takes part. After the last one it begins there again.

        Raises:
            ValueError: the iteration is none of the training.
        """
        self._stack = ExitStack()
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="sssd_benchmark_"))
        cfg = cfg.clone()
        cfg.defrost()
        cfg.OUTPUT_DIR, cfg.DATASETS.TEST = folder, ()
        cfg.TEST.PRECISE_BN.ENABLED = False
        # Workers would load ahead while it is another's turn.
        cfg.DATALOADER.NUM_WORKERS = 0
        classifies = cfg.MODEL.META_ARCHITECTURE == "ClassificationDistiller"
        if classifies:
            cfg.MODEL.WEIGHTS = cfg.MODEL.SSSD.CLASSIFIER.TEACHER.WEIGHTS = ""
        cfg.freeze()
        self.first = cfg.SOLVER.MAX_ITER // 2 if first_iteration is None else first_iteration
        if not 0 <= self.first < cfg.SOLVER.MAX_ITER:
            raise ValueError(
                f"The training has no iteration {self.first}: it has SOLVER.MAX_ITER "
                f"{cfg.SOLVER.MAX_ITER}, and counts from 0."
            )
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
        seed_all_rng(max(cfg.SEED, 0))
        self.trainer = (_ClassificationSteps if classifies else _DetectionSteps)(cfg)
        self.trainer._trainer.save_last_good = None
        self.model = self.trainer.checkpointer.model
        if isinstance(self.model, ClassificationDistiller):
            self.model.teacher_is_trained = True
        if cfg.MODEL.WEIGHTS:
            self.trainer.checkpointer.load(cfg.MODEL.WEIGHTS, checkpointables=[])
        for group in self.trainer._trainer.optimizer.param_groups:
            group["lr"] = 0.0
        self.device = torch.device(cfg.MODEL.DEVICE)
        self.batches = self.trainer._trainer.data_loader
        self.batches.of_one_step = getattr(self.model, "num_learners", 1)
        self.count = 0
        self.memory: _PeakMemory | None = None
        self.trainer.storage = self._stack.enter_context(EventStorage(self.first))

    def __enter__(self) -> "TrainingInTurns":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def describe(self) -> dict[str, Any]:
        """Numbers of parameters, of threads, and the device."""
        student = getattr(self.model, "student", self.model)
        of_student = _num_parameters(student)
        is_cuda = self.device.type == "cuda"
        return {
            "student_parameters": of_student,
            "training_only_parameters": _num_parameters(self.model) - of_student,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(self.device) if is_cuda else self.device.type,
        }

    def run(self, count: int) -> dict[str, Any]:
        """Runs steps.

        Args:
            count: how many.

        Returns:
            ``step_seconds`` and ``data_seconds`` (of loading the batch, no part of the step), a
            value for each step; ``batch_size``; ``memory`` in bytes (`_PeakMemory.read`), the peak
            since the first step of all; ``began`` and ``ended`` on the clock of the machine.
        """
        began = time.monotonic()
        steps, data = [], []
        for _ in range(count):
            start = time.perf_counter()
            batch_size = self.batches.load()
            data.append(time.perf_counter() - start)
            if self.memory is None:
                _use_torch_once(self.device)
                self.memory = _PeakMemory(self.device)
            steps.append(self._step())
        return {
            "step_seconds": [round(x, 6) for x in steps],
            "data_seconds": [round(x, 6) for x in data],
            "batch_size": batch_size,
            "memory": self.memory.read(),
            "began": round(began, 3),
            "ended": round(time.monotonic(), 3),
        }

    def _step(self) -> float:
        """Seconds of one step."""
        trainer = self.trainer
        trainer.iter = self.first + self.count % (trainer.max_iter - self.first)
        self.count += 1
        _synchronise(self.device)
        start = time.perf_counter()
        trainer.before_step()
        trainer.run_step()
        trainer.after_step()
        _synchronise(self.device)
        return time.perf_counter() - start


class _StepsOnly:
    """What of a trainer is left out: hooks that do not belong to a step, and writers."""

    def build_hooks(self) -> list[HookBase]:
        return [hook for hook in super().build_hooks() if isinstance(hook, DistillationMetrics)]

    def build_writers(self) -> list:
        return []

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> "_LoadedAhead":
        return _LoadedAhead(super().build_train_loader(cfg))

    def run_step(self) -> None:
        try:
            super().run_step()
        except FloatingPointError as error:
            raise FloatingPointError(
                "a loss is not finite with the weights that it starts from; give a detector "
                "trained ones (MODEL.WEIGHTS)."
            ) from error


class _DetectionSteps(_StepsOnly, Trainer):
    pass


class _ClassificationSteps(_StepsOnly, ClassificationTrainer):
    pass


class _LoadedAhead:
    """A data loader that loads the batches of a step when it is told to."""

    def __init__(self, loader: Iterable[list[dict[str, Any]]]) -> None:
        self.of_one_step = 1  # batches that a step takes
        self._source = iter(loader)
        self._ready: list[list[dict[str, Any]]] = []

    def load(self) -> int:
        """Loads the batches of the next step; returns the images of one."""
        self._ready = [next(self._source) for _ in range(self.of_one_step)]
        return len(self._ready[0])

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        while True:
            yield self._ready.pop(0)


class _PeakMemory:
    """The most memory that was in use since it was made.

    On a GPU, that is what torch has allocated there, weights included. On a CPU it is the resident
    set of the process, of which only what comes on top of its start counts: libraries, weights and
    the data set were there before; activations, gradients and the optimizer's state come on top.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: int | None = 0
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        # What was freed goes back to the system, or the steps would use it unseen.
        with suppress(AttributeError, OSError, TypeError):  # another C library than GNU's
            ctypes.CDLL(None).malloc_trim(0)
        try:
            self._before = _status("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is resident
        except OSError:
            self._before = None  # no Linux

    def read(self) -> dict[str, int | None]:
        """``before`` and ``peak`` in bytes; on a GPU ``before`` is 0. None where unknown."""
        if self._device.type == "cuda":
            return {"before": 0, "peak": torch.cuda.max_memory_allocated(self._device)}
        return {
            "before": self._before,
            "peak": None if self._before is None else _status("VmHWM"),
        }


def _status(key: str) -> int:
    """Bytes that Linux reports of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def _use_torch_once(device: torch.device) -> None:
    """A step of next to nothing, for what torch loads and starts in the first step of a process."""
    layers = nn.Sequential(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1), nn.Flatten()).to(device)
    optimizer = torch.optim.SGD(layers.parameters(), 0.1, momentum=0.9)
    layers(torch.zeros(2, 1, 4, 4, device=device)).sum().backward()
    optimizer.step()


def _num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
