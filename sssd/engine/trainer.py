"""Detectron2's DefaultTrainer with what self-distillation and plain good manners need."""

import logging
import os
import weakref
from collections import OrderedDict
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from ..data import CheckedDatasetMapper, train_loader_from_config
from ..evaluation import FastCOCOEvaluator, evaluate_teacher
from ..evaluation.teacher import PREFIX as TEACHER
from ..meta_arch import SelfDistiller
from .averaging import AVERAGED, AveragedWeights, evaluate_with_average
from .checkpoint import Checkpointer, CheckpointError, set_earlier_run_aside
from .explained import explained
from .labelenc import initialise_second_step
from .optimizer import build_optimizer
from .precise_bn import RunningParts
from .processes import distributed
from .setup import check_datasets, describe_distillation
from .training_hooks import save_last_good, training_hooks
from .training_step import TrainingStep

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
        super(DefaultTrainer, self).__init__()  # what DefaultTrainer makes is made here
        with explained("No training can be built from this config", cfg.OUTPUT_DIR):
            self._build(cfg)

    def _build(self, cfg: CfgNode) -> None:
        logger_of_detectron2 = logging.getLogger("detectron2")
        if not logger_of_detectron2.isEnabledFor(logging.INFO):
            setup_logger()
        cfg = _scaled_to_workers(cfg)
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        keys = cfg.MODEL.SSSD.SOLVER
        self._trainer = TrainingStep(
            distributed(model),
            self.build_train_loader(cfg),
            optimizer,
            precision=keys.AMP_PRECISION if cfg.SOLVER.AMP.ENABLED else "float32",
            num_batches=keys.BATCH_PARTS,
            max_skipped=keys.MAX_SKIPPED,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        this = weakref.proxy(self)
        self.checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, trainer=this)
        self.averaged = None
        if cfg.MODEL.SSSD.AVERAGING.DECAY:
            self.averaged = AveragedWeights(model, cfg.MODEL.SSSD.AVERAGING.DECAY)
            self.checkpointer.add_checkpointable(AVERAGED, self.averaged)
        self._trainer.save_last_good = lambda: save_last_good(this, this.checkpointer)
        self.cfg, self.start_iter, self.max_iter = cfg, 0, cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

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
        return train_loader_from_config(cfg, CheckedDatasetMapper(cfg, is_train=True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        mapper = CheckedDatasetMapper(cfg, is_train=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

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
        path = checkpointer.last_file_or(cfg.MODEL.WEIGHTS, resume)
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

    def running_parts(self) -> RunningParts:
        """What TEST.PRECISE_BN computes running statistics of."""
        model = self.checkpointer.model
        return RunningParts([getattr(model, "student", model)], model.forward)

    def build_hooks(self) -> list[HookBase]:
        cfg, model = self.cfg, self._trainer.model
        loaders = {"train": self._trainer.data_loader}
        precise_bn = None
        if cfg.TEST.PRECISE_BN.ENABLED and get_bn_modules(model):
            loaders["precise_bn"] = self.build_train_loader(without_workers(cfg))
            precise_bn = hooks.PreciseBN(
                cfg.TEST.EVAL_PERIOD,
                self.running_parts(),
                loaders["precise_bn"],
                cfg.TEST.PRECISE_BN.NUM_ITER,
            )
        best_metric = ""
        if cfg.DATASETS.TEST:
            several = len(cfg.DATASETS.TEST) > 1
            best_metric = (f"{cfg.DATASETS.TEST[0]}/" if several else "") + self.best_metric
        return training_hooks(
            self.checkpointer.model,
            self.checkpointer,
            loaders=loaders,
            scheduler=hooks.LRScheduler(),
            precise_bn=precise_bn,
            checkpoint_period=cfg.SOLVER.CHECKPOINT_PERIOD,
            eval_period=cfg.TEST.EVAL_PERIOD,
            evaluate=self._evaluate,
            best_metric=best_metric,
            make_writers=self.build_writers,
            averaged=self.averaged,
        )

    def _evaluate(self) -> dict[str, Any]:
        self._last_eval_results = evaluate_with_average(
            self._trainer.model,
            lambda: self.test(self.cfg, self._trainer.model),
            self.averaged,
            several=len(self.cfg.DATASETS.TEST) > 1,
            is_averaged=self.is_averaged,
        )
        return self._last_eval_results

    @staticmethod
    def is_averaged(task: str) -> bool:
        """Whether what a task evaluates has averaged weights where the student has."""
        return True

    def resume_or_load(self, resume: bool = True) -> None:
        if not resume and comm.is_main_process():
            set_earlier_run_aside(self.cfg.OUTPUT_DIR)
        super().resume_or_load(resume)
        first_step = self.cfg.MODEL.SSSD.TEACHER.WEIGHTS
        if (
            first_step
            and isinstance(self.checkpointer.model, SelfDistiller)
            and not (resume and self.checkpointer.has_checkpoint())
        ):
            logger.info(f"Teacher, FPN and heads are those of {first_step}.")
            initialise_second_step(self.checkpointer.model, first_step)

    def train(self) -> OrderedDict | None:
        if isinstance(self.checkpointer.model, SelfDistiller):
            logger.info(describe_distillation(self.checkpointer.model))
        return super().train()

    def run_step(self) -> None:
        if self.iter > self.start_iter:
            super().run_step()
            return
        with explained("The first iteration fails", self.cfg.OUTPUT_DIR):
            super().run_step()

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


def without_workers(cfg: CfgNode) -> CfgNode:
    """The config with loaders that run in the process itself."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = 0
    return cfg


def _evaluates_teacher(cfg: CfgNode, model: nn.Module) -> bool:
    return isinstance(model, SelfDistiller) and cfg.MODEL.SSSD.TEST.TEACHER_WITH_GROUND_TRUTH


def _scaled_to_workers(cfg: CfgNode) -> CfgNode:
    """Detectron2's scaling by SOLVER.REFERENCE_WORLD_SIZE, and that of what sssd counts in
    iterations."""
    scaled = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
    factor = scaled.SOLVER.MAX_ITER / cfg.SOLVER.MAX_ITER
    if factor == 1:
        return scaled
    frozen = scaled.is_frozen()
    scaled.defrost()
    phases, coefficient = scaled.MODEL.SSSD.PHASES, scaled.MODEL.SSSD.COEFFICIENT
    if not phases.SCALE_TO_MAX_ITER:
        for name in ("NO_DISTILL_ITERS", "FREEZE_BACKBONE_ITERS", "DISTILL_OFF_ITERS"):
            phases[name] = round(factor * phases[name])
    coefficient.MILESTONES = [round(factor * x) for x in coefficient.MILESTONES]
    if frozen:
        scaled.freeze()
    return scaled
