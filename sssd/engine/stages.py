"""Classification trainings of several stages or generations, from one config: the plan."""

import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.config import CfgNode

__all__ = ["Stage", "last_stage", "plan_stages"]

TEACHER = "teacher"
STUDENT = "student"
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

    def for_evaluation(self) -> CfgNode:
        """Its config without the teacher's checkpoint, since the teacher does not run there."""
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.MODEL.SSSD.CLASSIFIER.TEACHER.WEIGHTS = ""
        return cfg


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
    _check_combination(cfg)
    stages: dict[str, Stage] = {}
    teacher = None
    if keys.TEACHER.NETWORK and not keys.TEACHER.WEIGHTS:
        stages[TEACHER] = _teacher_stage(cfg)
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
    own = plan_stages(cfg)[-1].for_evaluation()
    own.MODEL.WEIGHTS = cfg.MODEL.WEIGHTS
    own.freeze()
    return own


def _check_combination(cfg: CfgNode) -> None:
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


def _teacher_stage(cfg: CfgNode) -> Stage:
    """The training of the teacher, by its own terms and the schedule of the run."""
    keys = cfg.MODEL.SSSD.CLASSIFIER
    own = _derived(cfg, TEACHER, keys.TEACHER.TERMS)
    its = own.MODEL.SSSD.CLASSIFIER
    its.NETWORK = keys.TEACHER.NETWORK
    if keys.TEACHER.NETWORK != keys.NETWORK:
        its.NETWORK_OPTIONS = CfgNode(new_allowed=True)
    its.TEACHER.NETWORK, its.PEERS = "", []
    own.MODEL.WEIGHTS = ""
    return Stage(TEACHER, own)


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
