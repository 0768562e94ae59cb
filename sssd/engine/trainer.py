"""Detectron2's DefaultTrainer with what self-distillation and plain good manners need."""

import logging
import os
import weakref
from collections import OrderedDict
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader
from detectron2.engine import DefaultTrainer
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..data import CheckedDatasetMapper
from ..evaluation import FastCOCOEvaluator, evaluate_teacher
from ..evaluation.teacher import PREFIX as TEACHER
from ..meta_arch import SelfDistiller
from .checkpoint import Checkpointer, CheckpointError
from .hooks import BestCheckpointer, DistillationMetrics
from .labelenc import initialise_second_step
from .optimizer import build_optimizer
from .setup import check_datasets, describe_distillation

__all__ = ["Trainer"]

logger = logging.getLogger("sssd")


class Trainer(DefaultTrainer):
    """Trains plain detectors and self-distilled ones alike.

    Over DefaultTrainer: datasets are checked before training, COCO evaluation and the best
    checkpoint are on, the optimizer survives a resume on Detectron2 v0.6 too, the training parts
    are in the checkpoint, a frozen backbone stays exactly where it is, and a loss that is not
    finite stops the run with its name after the last good state is saved.
    """

    best_metric = "bbox/AP"  # by which the best checkpoint is chosen

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        self._losses: dict[str, Tensor] = {}
        self._trainer.model.register_forward_hook(self._keep_losses)
        self._statistics = _RunningStatistics(self._trainer.model)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = super().build_model(cfg)
        # Here the class count is known, and nothing has read a dataset yet.
        check_datasets(cfg, model)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        return build_detection_train_loader(cfg, mapper=CheckedDatasetMapper(cfg, is_train=True))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_dir: str | None = None):
        output_dir = output_dir or os.path.join(cfg.OUTPUT_DIR, "inference")
        return FastCOCOEvaluator(dataset_name, output_dir=output_dir)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict[str, Any]:
        results = super().test(cfg, model, evaluators)
        model = getattr(model, "module", model)
        if not _evaluates_teacher(cfg, model):
            return results
        folder = os.path.join(cfg.OUTPUT_DIR, "inference", TEACHER)
        of_teacher = evaluate_teacher(cfg, model, lambda x: cls.build_evaluator(cfg, x, folder))
        if len(cfg.DATASETS.TEST) == 1:
            return {**results, **of_teacher[cfg.DATASETS.TEST[0]]}
        return {name: {**results[name], **of_teacher[name]} for name in results}

    @classmethod
    def load_for_evaluation(cls, cfg: CfgNode, resume: bool = False) -> nn.Module:
        """Builds the model and fills all of it that evaluation runs from a checkpoint.

        Args:
            resume: from the last one in OUTPUT_DIR, if there is one, not from MODEL.WEIGHTS.

        Raises:
            CheckpointError: when there is no file, or it lacks some of it.
        """
        model = cls.build_model(cfg)
        checkpointer = Checkpointer(model, cfg.OUTPUT_DIR)
        path = cfg.MODEL.WEIGHTS
        if resume and checkpointer.has_checkpoint():
            path = checkpointer.get_checkpoint_file()
        if not path:
            raise CheckpointError(
                "There are no weights to evaluate: set MODEL.WEIGHTS to a checkpoint, or add "
                "--resume for the last one in OUTPUT_DIR."
            )
        parts = cls.parts_in_evaluation(cfg, model)
        checkpointer.load(path, checkpointables=parts, whole=True)
        return model

    @classmethod
    def parts_in_evaluation(cls, cfg: CfgNode, model: nn.Module) -> list[str]:
        """What of a checkpoint, besides the model, evaluation runs."""
        # A teacher from random weights would be evaluated without a word.
        return ["sssd"] if _evaluates_teacher(cfg, model) else []

    def build_hooks(self) -> list:
        # DefaultTrainer makes its checkpointer just before its hooks, which keep a reference.
        model = self._trainer.model
        self.checkpointer = Checkpointer(model, self.cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        hooks = super().build_hooks()
        if isinstance(self.checkpointer.model, SelfDistiller):
            # First, so that every writer of the same iteration finds the values.
            hooks.insert(0, DistillationMetrics(self.checkpointer.model))
        if comm.is_main_process() and self.cfg.DATASETS.TEST:
            metric = self.best_metric
            if len(self.cfg.DATASETS.TEST) > 1:
                metric = f"{self.cfg.DATASETS.TEST[0]}/{metric}"
            best = BestCheckpointer(self.cfg.TEST.EVAL_PERIOD, self.checkpointer, metric)
            hooks.insert(-1, best)  # after the evaluation, before the writers
        return hooks

    def resume_or_load(self, resume: bool = True) -> None:
        super().resume_or_load(resume)
        first_step = self.cfg.MODEL.SSSD.TEACHER.WEIGHTS
        if first_step and not (resume and self.checkpointer.has_checkpoint()):
            logger.info(f"Teacher, FPN and heads are those of {first_step}.")
            initialise_second_step(self.checkpointer.model, first_step)

    def train(self) -> OrderedDict | None:
        if isinstance(self.checkpointer.model, SelfDistiller):
            logger.info(describe_distillation(self.checkpointer.model))
        return super().train()

    def run_step(self) -> None:
        self._statistics.keep()
        self._losses = {}
        try:
            super().run_step()
        except FloatingPointError as error:
            self._stop(error)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        # What is saved after the last step (the best checkpoint) is saved with an iteration that
        # is one too high; resuming from it would skip one.
        state["iteration"] = min(self.iter, self.max_iter - 1)
        # Detectron2 v0.6 leaves this out, and with it the optimizer.
        state.setdefault("_trainer", self._trainer.state_dict())
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if "load_state_dict" not in vars(DefaultTrainer):
            self._trainer.load_state_dict(state_dict["_trainer"])

    def _keep_losses(self, model: nn.Module, inputs: tuple, output: Any) -> None:
        if model.training and isinstance(output, dict):
            self._losses = {name: loss.detach() for name, loss in output.items()}

    def _stop(self, error: FloatingPointError) -> None:
        """Saves the state before this iteration and names the losses that are not finite."""
        # Detectron2 looks at the losses before the optimizer steps: weights and optimizer are as
        # the last iteration left them, only running statistics have seen the bad batch.
        bad_iter = self.iter
        names = [name for name, loss in self._losses.items() if not loss.isfinite().all()]
        # Without losses it was the RPN that gave up, on proposals that are not finite.
        what = ", ".join(names) or str(error).splitlines()[0]
        self._statistics.put_back()
        self.iter = self._trainer.iter = bad_iter - 1
        self.checkpointer.save("model_last_good", iteration=self.iter)
        raise FloatingPointError(
            f"The loss is not finite at iteration {bad_iter} ({what}); the state before it is "
            "saved as "
            f"{os.path.join(self.cfg.OUTPUT_DIR, 'model_last_good.pth')}: lower SOLVER.BASE_LR, "
            "lengthen SOLVER.WARMUP_ITERS or set SOLVER.CLIP_GRADIENTS, then --resume."
        ) from error


def _evaluates_teacher(cfg: CfgNode, model: nn.Module) -> bool:
    return isinstance(model, SelfDistiller) and cfg.MODEL.SSSD.TEST.TEACHER_WITH_GROUND_TRUTH


class _RunningStatistics:
    """The running statistics of normalisation layers as they were before the iteration."""

    def __init__(self, model: nn.Module) -> None:
        layers = [m for m in model.modules() if isinstance(m, _NormBase)]
        self._buffers = [b for m in layers for b in m.buffers(recurse=False)]
        self._kept = [torch.empty_like(b) for b in self._buffers]

    @torch.no_grad()
    def keep(self) -> None:
        if self._buffers:
            torch._foreach_copy_(self._kept, self._buffers)

    @torch.no_grad()
    def put_back(self) -> None:
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._kept)
