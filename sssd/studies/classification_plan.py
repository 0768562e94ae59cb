"""Methods x seeds x datasets of classification, by a plan in YAML: which runs there are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from ..engine.config_file import load_config
from ..engine.stages import plan_stages
from .plan_file import read_plan
from .records import config_digest, read_json, same_settings

__all__ = [
    "Plan",
    "Run",
    "final_options",
    "final_records",
    "final_runs",
    "has_teacher",
    "load_plan",
    "read_record",
    "run_config",
    "trial_runs",
]

TEACHER = "teacher"


@dataclass(frozen=True)
class Method:
    """One row of the comparison, as the plan describes it."""

    name: str
    config: str  # with {data}
    data: tuple[str, ...]
    seeds: tuple[int, ...]
    trials: tuple[Mapping[str, Any], ...] = ()
    opts: tuple[Any, ...] = ()
    length: float = 1.0


@dataclass(frozen=True)
class Plan:
    """What is compared; see docs/results/classification/plan.yaml for the keys."""

    methods: Mapping[str, Method]  # "teacher" is the first
    data: tuple[str, ...]
    validation: str
    test: str
    metric: str
    trial_seed: int
    baseline: str
    shared: str


@dataclass(frozen=True)
class Run:
    """One training: a trial on the validation split, or a seed on the test split as well.

    Attributes:
        method, data: names of the plan.
        seed: of the run.
        trial: position of the settings among the trials; None for a final run.
        options: the settings, those of everybody and those of the method.
    """

    method: Method
    data: str
    seed: int
    trial: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Path of its record, without a suffix, below the folder of results."""
        kind = f"seed{self.seed}" if self.trial is None else f"trial{self.trial}"
        return f"{self.data}/{self.method.name}/{kind}"

    @property
    def config(self) -> str:
        """Path of the file that its config begins with."""
        return self.method.config.format(data=self.data)

    def settings(self) -> dict[str, Any]:
        """What tells it from a run that only has its name."""
        own = {"opts": list(map(str, self.method.opts)), "length": self.method.length}
        return {"options": dict(self.options), **own, **config_digest(self.config)}


def load_plan(path: str | Path) -> Plan:
    """Reads a plan.

    Raises:
        ValueError: it is missing or lacks a key, or a method has too many trials.
    """
    content = read_plan(path)
    if not isinstance(content, dict):
        raise ValueError(f"The plan {path} has to be keys and values, and is none.")
    try:
        data, seeds = tuple(content["data"]), tuple(content["seeds"])
        descriptions = {TEACHER: content["teacher"], **content["methods"]}
        methods = {}
        for name, entry in descriptions.items():
            entry = entry or {}
            methods[name] = Method(
                name=name,
                config=content["config"].replace("{method}", entry.get("method", name)),
                data=tuple(entry.get("data", data)),
                seeds=tuple(entry.get("seeds", seeds)),
                trials=tuple(entry.get("trials", ())),
                opts=tuple(entry.get("opts", ())),
                length=float(entry.get("length", 1)),
            )
        plan = Plan(
            methods=methods,
            data=data,
            **{key: content[key] for key in ("validation", "test", "metric")},
            **{key: content[key] for key in ("trial_seed", "baseline", "shared")},
        )
    except KeyError as error:
        raise ValueError(f"The plan {path} lacks the key {error}.") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"The plan {path} has another form than it should ({error}).") from error
    for key in ("baseline", "shared"):
        if getattr(plan, key) not in methods:
            raise ValueError(
                f"The {key} {getattr(plan, key)!r} of the plan {path} is none of its methods: "
                f"{', '.join(methods)}."
            )
    for method in plan.methods.values():
        if len(method.trials) > 4:
            raise ValueError(
                f"The method {method.name!r} of the plan {path} has {len(method.trials)} trials: "
                "four are the budget of each."
            )
    return plan


def has_teacher(run: Run) -> bool:
    """Whether the config of a run has a teacher that is trained before."""
    cfg = load_config(run.config, list(run.method.opts))
    return bool(cfg.MODEL.SSSD.CLASSIFIER.TEACHER.NETWORK)


def run_config(plan: Plan, run: Run, output: Path, teacher: Path | None) -> CfgNode:
    """The config of a run.

    Args:
        output: its folder.
        teacher: checkpoint for methods with a teacher.

    Raises:
        ValueError: an option names a term that the config does not have.
    """
    cfg = load_config(run.config, list(run.method.opts))
    keys = cfg.MODEL.SSSD.CLASSIFIER
    for name, value in run.options.items():
        if name[0].isupper():
            cfg.merge_from_list([name, value])
        else:
            _set_option(keys, name, value)
    if run.trial is not None:
        keys.GENERATIONS = keys.GENERATIONS[:2]
    splits = [plan.validation] if run.trial is not None else [plan.validation, plan.test]
    cfg.DATASETS.TEST = tuple(split.format(data=run.data) for split in splits)
    cfg.SEED, cfg.OUTPUT_DIR = run.seed, str(output)
    if keys.TEACHER.NETWORK:
        keys.TEACHER.WEIGHTS = str(teacher)
    solver, length = cfg.SOLVER, run.method.length
    solver.MAX_ITER = round(solver.MAX_ITER * length)
    solver.STEPS = tuple(round(step * length) for step in solver.STEPS)
    plan_stages(cfg)  # what is wrong shows here
    return cfg


def _set_option(keys: CfgNode, name: str, value: Any) -> None:
    term, _, option = name.partition(".")
    lists = [keys.TERMS, *(stage["terms"] for stage in keys.STAGES), *keys.GENERATIONS]
    found = [spec for terms in lists for spec in terms if spec["name"] == term]
    if not found or not option:
        raise ValueError(f"The option {name!r} of the plan names no term of the config.")
    for spec in found:
        spec[option] = value


def best_trial(records: Sequence[Mapping[str, Any]], metric: str) -> Mapping[str, Any]:
    """The settings of the best trial; of equal ones, the first."""
    best = max(range(len(records)), key=lambda i: (records[i]["validation"][metric], -i))
    return records[best]["options"]


def read_record(folder: Path, run: Run) -> dict[str, Any] | None:
    """What is kept of a run that is complete; None if its settings were others."""
    record = read_json(folder / run.name)
    return record if record is not None and same_settings(record, run.settings()) else None


def final_options(plan: Plan, folder: Path, method: Method, data: str) -> dict[str, Any]:
    """The settings with which the seeds of a method run: its best trial's, and everybody's.

    Raises:
        ValueError: its trials are not complete.
    """
    options: dict[str, Any] = {}
    for source in dict.fromkeys([plan.shared, method.name]):
        tried = plan.methods[source]
        runs = trial_runs(plan, folder, tried, data)
        records = [read_record(folder, run) for run in runs]
        if None in records:
            raise ValueError(f"The trials of {source!r} on {data} are not complete.")
        if records:
            options |= best_trial(records, plan.metric)
    return options


def trial_runs(plan: Plan, folder: Path, method: Method, data: str) -> list[Run]:
    """The trials of a method, with the settings of everybody where they are known already."""
    common: dict[str, Any] = {}
    if method.name != plan.shared:
        common = final_options(plan, folder, plan.methods[plan.shared], data)
    return [
        Run(method, data, plan.trial_seed, trial, {**common, **settings})
        for trial, settings in enumerate(method.trials)
    ]


def final_runs(plan: Plan, folder: Path, method: Method, data: str) -> list[Run]:
    """The seeds of a method.

    Raises:
        ValueError: its trials are not complete.
    """
    options = final_options(plan, folder, method, data)
    return [Run(method, data, seed, options=options) for seed in method.seeds]


def final_records(plan: Plan, folder: Path, data: str) -> dict[str, list[dict[str, Any]]]:
    """Method -> the records of its seeds that are there, in the order of the plan; none of a method
    whose trials are not complete."""
    found: dict[str, list[dict[str, Any]]] = {}
    for method in plan.methods.values():
        try:
            runs = final_runs(plan, folder, method, data)
        except ValueError:
            runs = []
        records = [read_record(folder, run) for run in runs]
        found[method.name] = [record for record in records if record is not None]
    return found
