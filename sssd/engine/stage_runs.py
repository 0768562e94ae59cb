"""Trains the stages or generations of a classification one after the other."""

import json
import logging
import os
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from torch import nn

from ..evaluation.ensemble import NetworkEnsemble
from .checkpoint import Checkpointer, CheckpointError, set_earlier_run_aside
from .classification import (
    ClassificationTrainer,
    check_classification_data,
    teacher_of_main,
)
from .config_file import changed_keys
from .files import write_whole
from .output import check_output_folder
from .processes import file_of_main, from_main, on_main
from .rehearsal import rehearse
from .stages import RESULTS, Stage, plan_stages
from .trainer import without_workers

__all__ = ["rehearse_stages", "run_stages"]

logger = logging.getLogger("sssd")

_CONFIG = "stage_config.yaml"


def run_stages(cfg: CfgNode, resume: bool = False) -> dict[str, Any]:
    """Trains all stages of a config, after a rehearsal of every one of them.

    Args:
        cfg: of the whole run.
        resume: leave out the stages that are complete, and go on in the middle of the one that was
            interrupted.

    Returns:
        Accuracies: name of the stage -> what its evaluation gave, and for generations "ensemble".
        The same is in results.json in OUTPUT_DIR.

    Raises:
        ValueError: something in the config does not fit; before anything is trained.
        OSError: a folder of a stage cannot be written; likewise.
    """
    stages = plan_stages(cfg)
    check_classification_data(cfg)
    rehearse_stages(stages, resume)
    for stage in stages:
        check_output_folder(stage.cfg.OUTPUT_DIR)
    if not resume:
        _forget(stages)
    results = {}
    for stage in stages:
        if resume and _is_complete_on_main(stage, alone=len(stages) == 1):
            logger.info("The stage %r is complete: left as it is.", stage.name)
            with file_of_main(stage.results) as file, open(file) as f:
                results[stage.name] = json.load(f)
            continue
        if len(stages) > 1:
            logger.info("Stage %r of %s.", stage.name, ", ".join(s.name for s in stages))
        results[stage.name] = _train(stage, resume)
        _write(stage.results, results[stage.name])
    if cfg.MODEL.SSSD.CLASSIFIER.GENERATIONS and cfg.DATASETS.TEST:
        results["ensemble"] = _evaluate_generations(stages)
    _write(os.path.join(cfg.OUTPUT_DIR, RESULTS), results)
    return results


def _is_complete(stage: Stage, *, alone: bool) -> bool:
    """Whether a stage was trained as long, and evaluated on the same images, as is wanted now.

    Raises:
        CheckpointError: of several stages one is complete, and its schedule was another: what was
            learned from it would have to begin anew.
    """
    if not (os.path.isfile(stage.results) and os.path.isfile(stage.weights)):
        return False
    path = os.path.join(stage.cfg.OUTPUT_DIR, _CONFIG)
    if not os.path.isfile(path):
        return True
    changed = [
        key for key in changed_keys(path, stage.cfg) if key.startswith(("SOLVER.", "DATASETS.TEST"))
    ]
    if any(key.startswith("SOLVER.") for key in changed) and not alone:
        raise CheckpointError(
            f"The stage {stage.name!r} in {stage.cfg.OUTPUT_DIR} is complete with another schedule "
            f"({', '.join(sorted(changed))}): of several stages none can be made longer; choose "
            "another OUTPUT_DIR."
        )
    return not changed


def _is_complete_on_main(stage: Stage, *, alone: bool) -> bool:
    answer: list[bool] = []
    on_main(lambda: answer.append(_is_complete(stage, alone=alone)))
    return from_main(answer == [True])


def rehearse_stages(stages: list[Stage], resume: bool) -> None:
    """Builds every stage and lets it take one step, with random weights where none exist yet.

    Args:
        stages: of a plan.
        resume: do not ask for the weights to start from.

    Raises:
        ValueError: what does not fit, and in which stage.
    """
    models: dict[str, nn.Module] = {}
    for stage in stages:
        cfg = stage.cfg.clone()
        cfg.defrost()
        keys = cfg.MODEL.SSSD.CLASSIFIER
        if stage.teacher is not None:
            keys.TEACHER.WEIGHTS = ""
        try:
            ClassificationTrainer.build_train_loader(without_workers(cfg))
            with teacher_of_main(cfg) as own:
                model = META_ARCH_REGISTRY.get(own.MODEL.META_ARCHITECTURE)(own)
            earlier = {}
            if stage.previous is not None:
                (terms, *_) = models[stage.previous].training_parts["terms"]
                earlier = {name: term.state_dict() for name, term in terms.items()}
            if stage.previous is not None or not cfg.MODEL.WEIGHTS:
                model.take_over(earlier)
            rehearse(model, keys.SIZE)
            if cfg.MODEL.WEIGHTS and stage.previous is None and not resume:
                Checkpointer(model).load(cfg.MODEL.WEIGHTS, checkpointables=[])
        except ValueError as error:
            if len(stages) == 1:
                raise
            raise ValueError(f"In the stage {stage.name!r}: {error}") from error
        models[stage.name] = model


def _forget(stages: list[Stage]) -> None:
    """A resume must not take the work of an earlier run for this one's."""
    if comm.is_main_process():
        for stage in stages:
            folder = stage.cfg.OUTPUT_DIR
            set_earlier_run_aside(folder)
            for path in (stage.results, os.path.join(folder, RESULTS)):
                if os.path.isfile(path):
                    os.remove(path)
    comm.synchronize()


def _train(stage: Stage, resume: bool) -> dict[str, Any]:
    cfg = stage.cfg
    if comm.is_main_process():
        _write_whole(os.path.join(cfg.OUTPUT_DIR, _CONFIG), cfg.dump())
    comm.synchronize()
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + comm.get_rank())
    trainer = ClassificationTrainer(cfg)
    trainer.resume_or_load(resume)
    trainer.train()
    comm.synchronize()
    return getattr(trainer, "_last_eval_results", {})


def _evaluate_generations(stages: list[Stage]) -> dict[str, Any]:
    """Accuracies of the mean of all generations, with and without the first."""
    members = {}
    for stage in stages:
        cfg = stage.for_evaluation()
        model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
        Checkpointer(model).load(stage.weights, checkpointables=[], whole=True)
        members[stage.name] = model.to(cfg.MODEL.DEVICE)
    cfg = stages[-1].cfg
    ensemble = NetworkEnsemble(members, average=cfg.MODEL.SSSD.CLASSIFIER.ENSEMBLE)
    return ClassificationTrainer.test(cfg, ensemble)


def _write(path: str, results: Mapping[str, Any]) -> None:
    if comm.is_main_process():
        _write_whole(path, json.dumps(results, indent=2))
    comm.synchronize()


def _write_whole(path: str, text: str) -> None:
    write_whole(path, lambda file: file.write(text.encode()))
