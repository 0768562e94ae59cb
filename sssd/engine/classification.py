"""The trainer of image classifiers."""

import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor, nn

from ..classification.term import Term, term_class
from ..data.classification_check import check_classification_dataset, check_same_classes
from ..data.classification_loader import (
    build_classification_test_loader,
    build_classification_train_loader,
)
from ..data.classification_mapper import ClassificationMapper
from ..data.train_loader import part_of_batch
from ..evaluation import ClassificationEvaluator
from ..evaluation.topk import TASK
from ..weights_file import read_checkpoint_file
from .hooks import TermWeights
from .optimizer import hold_frozen_parameters
from .precise_bn import RunningParts
from .processes import file_of_main
from .rehearsal import rehearse
from .trainer import Trainer

__all__ = ["ClassificationTrainer", "check_classification_data", "teacher_of_main"]

logger = logging.getLogger("sssd")


class ClassificationTrainer(Trainer):
    """Trains one stage of a classification distillation: what MODEL.SSSD.CLASSIFIER.TERMS says.

    Over `Trainer`: datasets of classification, accuracy instead of average precision, and with
    several networks that learn (mutual learning) an update of each in turn in every iteration, on
    the same batch.
    """

    best_metric = "classification/top1"

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        check_classification_data(cfg)
        with teacher_of_main(cfg) as own:
            model = super(Trainer, cls).build_model(own)
        frozen = rehearse(model, cfg.MODEL.SSSD.CLASSIFIER.SIZE)
        if frozen:
            logger.info(
                "No term reaches %d of the parameters, which stay as they are (%s and others).",
                len(frozen),
                frozen[0],
            )
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        optimizer = super().build_optimizer(cfg, model)
        if model.num_learners > 1:
            hold_frozen_parameters(optimizer, model)
        return optimizer

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[list[dict[str, Any]]]:
        keys = cfg.MODEL.SSSD.CLASSIFIER
        loader = build_classification_train_loader(
            cfg.DATASETS.TRAIN,
            ClassificationMapper(True, keys.SIZE, keys.AUGMENTATION),
            total_batch_size=part_of_batch(cfg),
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            seed=cfg.SEED if cfg.SEED >= 0 else None,
            pairs=any(term_class(spec).needs_pairs for spec in keys.TERMS),
        )
        if not keys.PEERS:
            return loader
        return _Repeated(loader, 1 + len(keys.PEERS), cfg.MODEL.SSSD.SOLVER.BATCH_PARTS)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        keys = cfg.MODEL.SSSD.CLASSIFIER
        return build_classification_test_loader(
            dataset_name,
            ClassificationMapper(False, keys.SIZE, keys.AUGMENTATION),
            batch_size=keys.TEST_BATCH,
            num_workers=cfg.DATALOADER.NUM_WORKERS,
        )

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_dir: str | None = None):
        return ClassificationEvaluator(dataset_name)

    @classmethod
    def parts_in_evaluation(cls, cfg: CfgNode, model: nn.Module) -> list[str]:
        # Heads, branches and peers classify as well; from random weights they would say nothing.
        terms = model.training_parts["terms"][0].values()
        predicts = any(type(term).predict is not Term.predict for term in terms)
        return ["sssd"] if predicts or model.num_learners > 1 else []

    def resume_or_load(self, resume: bool = True) -> None:
        super().resume_or_load(resume)
        if resume and self.checkpointer.has_checkpoint():
            return
        self.checkpointer.model.take_over(_terms_of(self.cfg.MODEL.WEIGHTS))

    def build_hooks(self) -> list:
        # First, so that every writer of the same iteration finds the values.
        return [TermWeights(self.checkpointer.model), *super().build_hooks()]

    def running_parts(self) -> RunningParts:
        model = self.checkpointer.model
        return RunningParts(model.classifying, model.forward)

    @staticmethod
    def is_averaged(task: str) -> bool:
        return task == TASK  # heads, branches and peers have weights of their own

    def run_step(self) -> None:
        model = self.checkpointer.model
        try:
            for learner in range(model.num_learners):
                model.learner = learner
                self._trainer.prefix = f"peer{learner}_" if learner else ""
                super().run_step()
        finally:
            model.learner = 0
            self._trainer.prefix = ""


class _Repeated:
    """Every batch of a loader several times over: once for each network that learns from it.

    A batch comes in ``parts``, which follow each other each time.
    """

    def __init__(self, loader: Iterable, times: int, parts: int) -> None:
        self.loader, self.times, self.parts = loader, times, parts

    def __iter__(self) -> Iterator:
        batches = iter(self.loader)
        while batch := list(islice(batches, self.parts)):
            for _ in range(self.times):
                yield from batch

    def state_dict(self) -> dict[str, Any]:
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loader.load_state_dict(state)


@contextmanager
def teacher_of_main(cfg: CfgNode) -> Iterator[CfgNode]:
    """The config with weights of the teacher that every process can read, for the time inside."""
    with file_of_main(cfg.MODEL.SSSD.CLASSIFIER.TEACHER.WEIGHTS) as weights:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.SSSD.CLASSIFIER.TEACHER.WEIGHTS = weights
        yield cfg


def check_classification_data(cfg: CfgNode) -> None:
    """Checks the datasets of a config, and counts them in the log.

    Raises:
        ValueError: they do not have the number of classes or channels that the network has, or a
            label means one thing in one of them and another in the next.
    """
    channels = len(cfg.MODEL.PIXEL_MEAN)
    names = list(dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]))
    for name in names:
        report = check_classification_dataset(name, cfg.MODEL.SSSD.CLASSIFIER.NUM_CLASSES)
        others = report.channels - {channels}
        if others:
            raise ValueError(
                f"The dataset {name!r} has images of {max(others)} channel(s), and "
                f"MODEL.PIXEL_MEAN has {channels} value(s): give it and PIXEL_STD as many values "
                "as the images have channels."
            )
        if comm.is_main_process():
            logger.info(report.summary())
    if names:
        check_same_classes(*names)


def _terms_of(path: str) -> dict[str, dict[str, Tensor]]:
    """State of each term that a checkpoint of an earlier stage holds."""
    states: dict[str, dict[str, Tensor]] = defaultdict(dict)
    with file_of_main(path) as file:
        checkpoint = {}
        if file and os.path.isfile(file):
            checkpoint = read_checkpoint_file(file)
    for key, value in checkpoint.get("sssd", {}).items():
        kind, _, rest = key.partition(".")
        if kind == "terms":
            _, term, parameter = rest.split(".", 2)
            states[term][parameter] = value
    return dict(states)
