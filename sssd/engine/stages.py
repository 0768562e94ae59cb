"""Classification trainings of several stages or generations, from one config and one command."""

import json
import logging
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from torch import nn

from ..evaluation.ensemble import NetworkEnsemble
from .checkpoint import Checkpointer
from .classification import ClassificationTrainer, check_classification_data
from .rehearsal import rehearse

__all__ = ["Stage", "last_stage", "plan_stages", "run_stages"]

logger = logging.getLogger("sssd")

TEACHER = "teacher"
STUDENT = "student"
_LAST = "last_checkpoint"  # the file in which Detectron2's checkpointer notes where to go on
RESULTS = "results.json"  # of a stage, once it is complete; of the whole run in OUTPUT_DIR


@dataclass(frozen=True)
class Stage:
    """One training of a plan.

    Attributes:
        name: "teacher", "student" for the last one, "generation<i>", or that of the config.
        cfg: its own config: its terms, schedule, folder, and the checkpoints that it starts from.
        teacher, previous: names of the earlier stages that its teacher comes from, and that its
            student and terms go on from; None where there is none.
    """

    name: str
    cfg: CfgNode
    teacher: str | None = None
    previous: str | None = None

    @property
    def weights(self) -> str:
        """The checkpoint that it leaves."""
        return os.path.join(self.cfg.OUTPUT_DIR, "model_final.pth")

    @property
    def results(self) -> str:
        """The file with its accuracies, which is written when it is complete."""
        return os.path.join(self.cfg.OUTPUT_DIR, f"stage_{RESULTS}")


def plan_stages(cfg: CfgNode) -> list[Stage]:
    """The trainings that a config asks for, in their order.

    The last one trains the student of the config, in OUTPUT_DIR itself and with SEED; each other
    has a folder there, named after it, and a seed of its own.

    Args:
        cfg: with STAGES or GENERATIONS, or neither, under MODEL.SSSD.CLASSIFIER.

    Raises:
        ValueError: a stage or a generation is not described as it should be.
    """
    keys = cfg.MODEL.SSSD.CLASSIFIER
    if keys.STAGES and keys.GENERATIONS:
        raise ValueError("MODEL.SSSD.CLASSIFIER has both STAGES and GENERATIONS: use one of them.")
    if keys.TEACHER.NETWORK and keys.GENERATIONS:
        raise ValueError(
            f"MODEL.SSSD.CLASSIFIER has GENERATIONS and the teacher {keys.TEACHER.NETWORK!r}: each "
            "generation is taught by the one before, so leave TEACHER.NETWORK empty."
        )
    if keys.PEERS and (keys.STAGES or keys.GENERATIONS):
        raise ValueError(
            f"MODEL.SSSD.CLASSIFIER has PEERS ({', '.join(keys.PEERS)}) and STAGES or GENERATIONS: "
            "what peers learn in a stage is not handed on; use one of them."
        )
    stages: dict[str, Stage] = {}
    teacher = None
    if keys.TEACHER.NETWORK and not keys.TEACHER.WEIGHTS:
        own = _derived(cfg, TEACHER, keys.TEACHER.TERMS)
        own.MODEL.SSSD.CLASSIFIER.NETWORK = keys.TEACHER.NETWORK
        if keys.TEACHER.NETWORK != keys.NETWORK:
            own.MODEL.SSSD.CLASSIFIER.NETWORK_OPTIONS = CfgNode(new_allowed=True)
        own.MODEL.SSSD.CLASSIFIER.TEACHER.NETWORK = ""
        own.MODEL.SSSD.CLASSIFIER.PEERS = []
        own.MODEL.WEIGHTS = ""
        stages[TEACHER] = Stage(TEACHER, own)
        teacher = TEACHER
    if keys.GENERATIONS:
        descriptions = [
            {"name": f"generation{i}", "terms": terms} for i, terms in enumerate(keys.GENERATIONS)
        ]
    else:
        descriptions = [*keys.STAGES, {"name": STUDENT, "terms": keys.TERMS}]
    previous = None
    for position, description in enumerate(descriptions):
        _check_description(description, stages)
        name, is_last = description["name"], position == len(descriptions) - 1
        own = _derived(cfg, "" if is_last else name, description["terms"])
        _scale_schedule(own, description.get("length", 1), name)
        if keys.GENERATIONS:
            teacher, previous = previous, None
            own.MODEL.SSSD.CLASSIFIER.TEACHER.NETWORK = keys.NETWORK if teacher else ""
        if teacher is not None:
            own.MODEL.SSSD.CLASSIFIER.TEACHER.WEIGHTS = stages[teacher].weights
        if previous is not None:
            own.MODEL.WEIGHTS = stages[previous].weights
        _override(own, description.get("opts", []), name)
        stages[name] = Stage(name, own, teacher, previous)
        previous = name
    for stage in stages.values():
        stage.cfg.freeze()
    return list(stages.values())


def last_stage(cfg: CfgNode) -> CfgNode:
    """The config of the model that a run of ``cfg`` ends with, for evaluation."""
    own = plan_stages(cfg)[-1].cfg.clone()
    own.defrost()
    own.MODEL.WEIGHTS = cfg.MODEL.WEIGHTS
    own.MODEL.SSSD.CLASSIFIER.TEACHER.WEIGHTS = ""  # it does not run in evaluation
    own.freeze()
    return own


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
    """
    stages = plan_stages(cfg)
    check_classification_data(cfg)
    _rehearse_all(stages, resume)
    if not resume:
        _forget(stages)
    results = {}
    for stage in stages:
        if resume and os.path.isfile(stage.results) and os.path.isfile(stage.weights):
            logger.info("The stage %r is complete: left as it is.", stage.name)
            with open(stage.results) as f:
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


def _derived(cfg: CfgNode, folder: str, terms: list[dict[str, Any]]) -> CfgNode:
    """The config of one stage: what it shares with the run, in a folder of its own."""
    own = cfg.clone()
    own.defrost()
    keys = own.MODEL.SSSD.CLASSIFIER
    keys.TERMS, keys.STAGES, keys.GENERATIONS = [dict(term) for term in terms], [], []
    if folder:
        own.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, folder)
        if cfg.SEED >= 0:
            # Of its own: two generations that start alike would not be two.
            words = np.random.SeedSequence([cfg.SEED, zlib.crc32(folder.encode())])
            own.SEED = int(words.generate_state(1)[0] >> 1)
    return own


def _check_description(description: Any, stages: Mapping[str, Stage]) -> None:
    known = ("name", "terms", "length", "opts")
    what = f"MODEL.SSSD.CLASSIFIER.STAGES or GENERATIONS holds {description!r}"
    if not isinstance(description, Mapping) or not {"name", "terms"} <= set(description):
        raise ValueError(f"{what}: give each stage a name and terms.")
    strange = sorted(set(description) - set(known))
    if strange:
        raise ValueError(f"{what}: a stage has no {strange[0]!r}, only {', '.join(known)}.")
    if not isinstance(description["terms"], list):
        raise ValueError(f"{what}: its terms must be a list of dicts such as {{name: kd}}.")
    name = description["name"]
    if not str(name).isidentifier() or name in stages:
        raise ValueError(f"{what}: give it a name of letters that no other stage has.")


def _override(cfg: CfgNode, opts: Any, name: str) -> None:
    try:
        cfg.merge_from_list(list(opts))
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"The opts of the stage {name!r} cannot be used ({error.args[0]}): list keys of the "
            "config, each followed by its value."
        ) from error


def _scale_schedule(cfg: CfgNode, length: Any, name: str) -> None:
    """Shortens the schedule, and what goes by it, to a share."""
    if not isinstance(length, int | float) or not 0 < length < float("inf"):
        raise ValueError(f"The stage {name!r} has the length {length}: give it a positive share.")
    if length == 1:
        return
    solver = cfg.SOLVER
    solver.MAX_ITER = max(round(solver.MAX_ITER * length), 1)
    solver.STEPS = tuple(round(step * length) for step in solver.STEPS)
    solver.WARMUP_ITERS = round(solver.WARMUP_ITERS * length)


def _rehearse_all(stages: list[Stage], resume: bool) -> None:
    """Builds every stage and lets it take one step, with random weights where none exist yet."""
    models: dict[str, nn.Module] = {}
    for stage in stages:
        cfg = stage.cfg.clone()
        cfg.defrost()
        keys = cfg.MODEL.SSSD.CLASSIFIER
        if stage.teacher is not None:
            keys.TEACHER.WEIGHTS = ""
        try:
            ClassificationTrainer.build_train_loader(_without_workers(cfg))
            model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
            earlier = {}
            if stage.previous is not None:
                (terms, *_) = models[stage.previous].training_parts["terms"]
                earlier = {name: term.state_dict() for name, term in terms.items()}
            if stage.previous is not None or not cfg.MODEL.WEIGHTS:
                for terms in model.training_parts["terms"]:
                    for term in terms.values():
                        term.take_over(earlier)
            rehearse(model, keys.SIZE)
            if cfg.MODEL.WEIGHTS and stage.previous is None and not resume:
                Checkpointer(model).load(cfg.MODEL.WEIGHTS, checkpointables=[])
        except ValueError as error:
            if len(stages) == 1:
                raise
            raise ValueError(f"In the stage {stage.name!r}: {error}") from error
        models[stage.name] = model


def _forget(stages: list[Stage]) -> None:
    """Removes what a resume would take for the work of this run, where an earlier one has been."""
    if comm.is_main_process():
        for stage in stages:
            folder = stage.cfg.OUTPUT_DIR
            for path in (stage.results, *(os.path.join(folder, n) for n in (RESULTS, _LAST))):
                if os.path.isfile(path):
                    os.remove(path)
    comm.synchronize()


def _without_workers(cfg: CfgNode) -> CfgNode:
    cfg = cfg.clone()
    cfg.DATALOADER.NUM_WORKERS = 0
    return cfg


def _train(stage: Stage, resume: bool) -> dict[str, Any]:
    cfg = stage.cfg
    if comm.is_main_process():
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
        with open(os.path.join(cfg.OUTPUT_DIR, "stage_config.yaml"), "w") as f:
            f.write(cfg.dump())
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
        cfg = stage.cfg.clone()
        cfg.defrost()
        cfg.MODEL.SSSD.CLASSIFIER.TEACHER.WEIGHTS = ""
        model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
        Checkpointer(model).load(stage.weights, checkpointables=[], whole=True)
        members[stage.name] = model.to(cfg.MODEL.DEVICE)
    cfg = stages[-1].cfg
    ensemble = NetworkEnsemble(members, average=cfg.MODEL.SSSD.CLASSIFIER.ENSEMBLE)
    return ClassificationTrainer.test(cfg, ensemble)


def _write(path: str, results: Mapping[str, Any]) -> None:
    if comm.is_main_process():
        with open(path + ".part", "w") as f:
            json.dump(results, f, indent=2)
        os.replace(path + ".part", path)
    comm.synchronize()
