"""One training of a comparison: a few steps when it is asked for them, and what they cost."""

import itertools
import tempfile
import time
from contextlib import ExitStack
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from ..engine.classification import ClassificationTrainer
from ..engine.hooks import DistillationMetrics
from ..engine.trainer import Trainer
from ..meta_arch import ClassificationDistiller
from ..meta_arch.build import student_num_classes
from .breakdown import profile_steps
from .compile import compile_parts
from .data import LoadedAhead, generate_batches
from .jobs import CLASSIFIER, Job
from .memory import PeakMemory, separate_blocks, synchronise, use_torch_once
from .weights import calibrate_normalisation

__all__ = ["TrainingInTurns", "generated_batches", "prepared_config"]

_MOST_OVERFLOWS = 30  # of float16, while it is warmed up
_EXPORTED_STEPS = 4  # whose images are exported


class TrainingInTurns:
    """A training as tools/train_net.py builds it, that stops after every few steps.

    What differs from a real run, so that every step does the same work and nothing else runs:

    - the learning rate is 0, so no loss runs away, whatever the weights are;
    - a batch is loaded before the clock starts, by this process, or is generated;
    - there are no checkpoints, evaluations and logs; OUTPUT_DIR is a temporary folder;
    - a classification starts from random weights, teacher included, and no term takes over
      anything; a detector starts from MODEL.WEIGHTS. With generated batches and no weights, batch
      normalisation is calibrated (`calibrate_normalisation`).

    A context manager, which removes the folder.
    """

    def __init__(self, job: Job, first_iteration: int | None = None) -> None:
        """
        Args:
            job: one training; of a classification, one stage.
            first_iteration: where in the schedule to begin; None for the middle, where as a rule
                everything takes part. After the last one it begins there again.

        Raises:
            ValueError: the iteration is none of the training.
        """
        self._stack = ExitStack()
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="sssd_benchmark_"))
        self.cfg = cfg = prepared_config(job, folder)
        self.first = cfg.SOLVER.MAX_ITER // 2 if first_iteration is None else first_iteration
        if not 0 <= self.first < cfg.SOLVER.MAX_ITER:
            raise ValueError(
                f"The training has no iteration {self.first}: it has SOLVER.MAX_ITER "
                f"{cfg.SOLVER.MAX_ITER}, and counts from 0."
            )
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
        seed_all_rng(max(cfg.SEED, 0))
        classifies = cfg.MODEL.META_ARCHITECTURE == CLASSIFIER
        self.trainer = (_ClassificationSteps if classifies else _DetectionSteps)(cfg)
        self.trainer._trainer.save_last_good = None
        self.model = self.trainer.checkpointer.model
        self.student = getattr(self.model, "student", self.model)
        if isinstance(self.model, ClassificationDistiller):
            self.model.teacher_is_trained = True
        if cfg.MODEL.WEIGHTS:
            self.trainer.checkpointer.load(cfg.MODEL.WEIGHTS, checkpointables=[])
        for group in self.trainer._trainer.optimizer.param_groups:
            group["lr"] = 0.0
        self.device = torch.device(cfg.MODEL.DEVICE)
        self.batches = self.trainer._trainer.data_loader
        self.batches.learners = getattr(self.model, "num_learners", 1)
        self.batches.of_one_step = self.batches.learners * cfg.MODEL.SSSD.SOLVER.BATCH_PARTS
        if job.setting.data is not None:
            self._generate(job)
        self.compiled = compile_parts(self.model) if job.setting.compiled else []
        self.count = 0
        self.memory: PeakMemory | None = None
        self.trainer.storage = self._stack.enter_context(EventStorage(self.first))

    def _generate(self, job: Job) -> None:
        """Sets the batches, and what of random weights they calibrate."""
        batches = generated_batches(job, self.student)
        if not self.cfg.MODEL.WEIGHTS:
            calibrate_normalisation(self.student, batches[0])
        parts = self.batches.of_one_step
        self.batches.source = itertools.cycle(
            batch[i::parts] for batch in batches for i in range(parts)
        )

    def __enter__(self) -> "TrainingInTurns":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def describe(self) -> dict[str, Any]:
        """Numbers of parameters and of threads, the device, and names of compiled parts."""
        of_student = _num_parameters(self.student)
        is_cuda = self.device.type == "cuda"
        return {
            "student_parameters": of_student,
            "training_only_parameters": _num_parameters(self.model) - of_student,
            "compiled": self.compiled,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(self.device) if is_cuda else self.device.type,
        }

    def warm_up(self, count: int) -> None:
        """Runs steps whose time does not count, and more until the loss scale of float16 stays.

        On a CPU, their memory is what counts (`separate_blocks`).
        """
        self.run(count)
        if self.compiled:
            self.memory.restart_peak()  # the compiler's is none of the step's
            self.run(1)
        self.memory.stop_on_cpu()
        separate_blocks(False)
        scaler = self.trainer._trainer.scaler
        for _ in range(_MOST_OVERFLOWS if scaler.is_enabled() else 0):
            before = scaler.get_scale()
            self.run(1)
            if scaler.get_scale() >= before:
                break

    def run(self, count: int) -> dict[str, Any]:
        """Runs steps.

        Args:
            count: how many.

        Returns:
            ``step_seconds`` and ``data_seconds`` (of loading the batch, no part of the step), a
            value for each step; ``batch_size``; ``memory`` in bytes (`PeakMemory.read`), the peak
            since the first step of all, on a CPU until the warm-up ended;
            ``began`` and ``ended`` on the clock of the machine.
        """
        began = time.monotonic()
        if self.memory is not None and self.device.type == "cuda":
            # Not measured: what was given back to the GPU is taken again.
            self.batches.load()
            self._step()
        steps, data = [], []
        for _ in range(count):
            start = time.perf_counter()
            batch_size = self.batches.load()
            data.append(time.perf_counter() - start)
            if self.memory is None:
                use_torch_once(self.device)
                self.memory = PeakMemory(self.device, self.model)
            steps.append(self._step())
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # while it sleeps, the others need it
        return {
            "step_seconds": [round(x, 6) for x in steps],
            "data_seconds": [round(x, 6) for x in data],
            "batch_size": batch_size,
            "memory": self.memory.read(),
            "began": round(began, 3),
            "ended": round(time.monotonic(), 3),
        }

    def export(self, path: str) -> None:
        """Writes what inference needs: the student's state dict, and inputs of one image each.

        Args:
            path: of the file, which `torch.load` reads.
        """
        images = []
        for _ in range(_EXPORTED_STEPS):
            self.batches.load()
            of_one_network = self.batches.of_one_step // self.batches.learners
            images += [x for batch in self.batches.take()[:of_one_network] for x in batch]
        if isinstance(self.model, ClassificationDistiller):
            inputs = [_normalised(x["image"], self.model) for x in images]
        else:
            inputs = [[{key: x[key] for key in ("image", "height", "width")}] for x in images]
        torch.save({"model": self.model.state_dict(), "inputs": inputs}, path)

    def breakdown(self, count: int) -> dict[str, Any]:
        """Runs ``count`` steps under the profiler; see `profile_steps`."""

        def load() -> None:
            self.batches.load()

        return profile_steps(self._step, self.trainer, count, before=load)

    def _step(self) -> float:
        """Seconds of one step."""
        trainer = self.trainer
        trainer.iter = self.first + self.count % (trainer.max_iter - self.first)
        self.count += 1
        synchronise(self.device)
        start = time.perf_counter()
        trainer.before_step()
        trainer.run_step()
        trainer.after_step()
        synchronise(self.device)
        return time.perf_counter() - start


def prepared_config(job: Job, folder: str) -> CfgNode:
    """The config of a job with nothing in it that only a real run needs.

    Args:
        job: its ``cfg`` stays as it is.
        folder: for OUTPUT_DIR.
    """
    cfg = job.cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR, cfg.DATASETS.TEST = folder, ()
    cfg.TEST.PRECISE_BN.ENABLED = False
    # Workers would load ahead while it is another's turn.
    cfg.DATALOADER.NUM_WORKERS = 0
    if cfg.MODEL.META_ARCHITECTURE == CLASSIFIER:
        cfg.MODEL.WEIGHTS = cfg.MODEL.SSSD.CLASSIFIER.TEACHER.WEIGHTS = ""
    if job.setting.data is not None:
        cfg.DATASETS.TRAIN = ()
    cfg.freeze()
    return cfg


def generated_batches(job: Job, student: nn.Module) -> list[list[dict[str, Any]]]:
    """The batches of `generate_batches` that fit a detector.

    Args:
        job: with ``setting.data``.
        student: the detector, for its number of classes.
    """
    cfg = job.cfg
    return generate_batches(
        job.setting.data,
        batch_size=cfg.SOLVER.IMS_PER_BATCH,
        num_classes=student_num_classes(student),
        channels=len(cfg.MODEL.PIXEL_MEAN),
        mask_format=cfg.INPUT.MASK_FORMAT if cfg.MODEL.MASK_ON else "",
    )


class _StepsOnly:
    """What of a trainer is left out: hooks that do not belong to a step, and writers."""

    def build_hooks(self) -> list[HookBase]:
        return [hook for hook in super().build_hooks() if isinstance(hook, DistillationMetrics)]

    def build_writers(self) -> list:
        return []

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> LoadedAhead:
        # Without a dataset, the source of the batches is set later.
        return LoadedAhead(super().build_train_loader(cfg) if cfg.DATASETS.TRAIN else ())

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


def _normalised(image: Tensor, model: ClassificationDistiller) -> Tensor:
    """The input (1, C, H, W) of a classification network."""
    normalised = (image[None].to(model.device) - model.pixel_mean) / model.pixel_std
    return normalised.contiguous(memory_format=model.memory_format)


def _num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
