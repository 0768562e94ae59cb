"""Methods x settings x seeds of detectors, by a plan in YAML: which trainings there are.

docs/results/bccd/plan.yaml is one, with every key.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .plan_file import read_plan

__all__ = ["VARIATION", "Plan", "Study", "Training", "load_plan"]

# Of the file beside those of the studies.
VARIATION = "variation"


@dataclass(frozen=True)
class Training:
    """One run: what tells it from all others is its name.

    Attributes:
        detector, method: names of the plan.
        setting: value of the study's sweep, as it stands in the name; "" without one.
        value: the same as a number, of several values the first; None if it is none.
        seed: of the run.
        config: its config file.
        options: keys and values that follow the config file, without seed and folder.
    """

    detector: str
    method: str
    setting: str
    seed: int
    config: str
    options: tuple[Any, ...]
    value: float | None = None

    @property
    def variant(self) -> str:
        """What is compared: the method, with its setting."""
        return f"{self.method}@{self.setting}" if self.setting else self.method

    @property
    def name(self) -> str:
        """Path of its record, without a suffix, below the plan's folder."""
        return f"{self.detector}/{self.variant}/seed{self.seed}"


@dataclass(frozen=True)
class Study:
    """A table and its figures.

    Attributes:
        name: of its files.
        title: above the table.
        trainings: of all seeds, in the order in which they are to be made.
        baseline: variant that the others are compared with; "" for none.
        sweep: key that takes several values, but not in a method that is the baseline; "" for none.
        test: whether the test split is reported as well.
        figure_from: fraction of the schedule at which the figure of AP begins.
    """

    name: str
    title: str
    trainings: tuple[Training, ...]
    baseline: str
    sweep: str
    test: bool
    figure_from: float


@dataclass(frozen=True)
class Plan:
    """What is compared, and how it is judged.

    Attributes:
        validation: dataset by which everything is chosen.
        test: dataset that the studies with ``test`` report; "" for none.
        metric: by which variants are judged, such as "bbox/AP" or "averaged/bbox/AP".
        early: number of first iterations whose share of the distillation is called the early one.
        studies: in the order in which they are made.
    """

    validation: str
    test: str
    metric: str
    early: int
    studies: tuple[Study, ...]

    @property
    def judged(self) -> str:
        """The metric in words, such as "bbox AP of the averaged weights"."""
        averaged = " of the averaged weights" if self.metric.startswith("averaged/") else ""
        return self.metric.removeprefix("averaged/").replace("/", " ") + averaged

    def trainings(self, names: Iterable[str] = ()) -> list[Training]:
        """Those of some studies (all, without a name), each once, the first needed first."""
        chosen = self.chosen(names)
        return list({t.name: t for study in chosen for t in study.trainings}.values())

    def chosen(self, names: Iterable[str]) -> list[Study]:
        """
        Raises:
            ValueError: there is no study of a name.
        """
        by_name = {study.name: study for study in self.studies}
        unknown = [name for name in names if name not in by_name]
        if unknown:
            raise ValueError(
                f"The plan has no study {unknown[0]!r}; it has {', '.join(map(repr, by_name))}."
            )
        return [by_name[name] for name in names] or list(self.studies)


_KEYS = {
    "": {"task", "validation", "test", "metric", "early", "seeds", "opts", "detectors", "methods",
         "studies"},
    "method": {"like", "recipe", "opts"},
    "study": {"title", "detectors", "methods", "seeds", "baseline", "sweep", "test", "figure_from"},
}  # fmt: skip


def load_plan(path: str | Path) -> Plan:
    """Reads a plan of detectors.

    Raises:
        ValueError: it cannot be read, lacks a key or has one too many, or a study names a detector
            or method that is not there.
    """
    content = read_plan(path)
    try:
        _check_keys(content, "", "the plan")
        studies = tuple(_study(content, name, entry) for name, entry in content["studies"].items())
        datasets = {key: content.get(key, "") for key in ("validation", "test")}
        plan = Plan(
            **datasets,
            metric=content.get("metric", "bbox/AP"),
            early=int(content["early"]),
            studies=studies,
        )
        if not plan.validation:
            raise KeyError("validation")
        if not plan.metric.removeprefix("averaged/").startswith("bbox/AP"):
            raise ValueError(
                f"metric is {plan.metric!r}, and has to be bbox/AP, another of the bbox/AP..., or "
                "one of these after averaged/."
            )
        _check_unique(plan)
    except KeyError as error:
        raise ValueError(f"The plan {path} lacks the key {error}.") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"The plan {path} has another form than it should ({error}).") from error
    except ValueError as error:
        raise ValueError(f"The plan {path}: {error}") from error
    return plan


def _study(content: Mapping[str, Any], name: str, entry: Mapping[str, Any]) -> Study:
    where = f"the study {name!r}"
    if name == VARIATION:
        raise ValueError(f"{where} needs another name: {name}.md tells what runs vary by.")
    _check_keys(entry, "study", where)
    sweep = entry.get("sweep") or {}
    if sweep and set(sweep) != {"key", "values"}:
        raise ValueError(f"the sweep of {where} needs the keys 'key' and 'values', and no others.")
    swept = [(sweep["key"], value) for value in sweep["values"]] if sweep else [("", None)]
    baseline = entry.get("baseline", "")
    trainings = [
        _training(content, detector, method, seed, key, value, where)
        for seed in entry.get("seeds", content["seeds"])
        for detector in entry.get("detectors", list(content["detectors"]))
        for method in entry["methods"]
        # A method that all values are compared with takes none of them.
        for key, value in ([("", None)] if method == baseline else swept)
    ]
    if baseline and baseline not in {t.variant for t in trainings}:
        variants = ", ".join(dict.fromkeys(t.variant for t in trainings))
        raise ValueError(f"the baseline {baseline!r} of {where} is none of its own: {variants}.")
    return Study(
        name=name,
        title=entry.get("title", name),
        # A seed or value that is named twice is one.
        trainings=tuple(t for i, t in enumerate(trainings) if t not in trainings[:i]),
        baseline=baseline,
        sweep=sweep.get("key", ""),
        test=bool(entry.get("test", False)),
        figure_from=float(entry.get("figure_from", 0.0)),
    )


def _training(
    content: Mapping[str, Any],
    detector: str,
    method: str,
    seed: int,
    key: str,
    value: Any,
    where: str,
) -> Training:
    for kind, chosen in (("detectors", detector), ("methods", method)):
        if chosen not in content[kind]:
            known = ", ".join(content[kind])
            raise ValueError(f"{where} names {chosen!r}, which is none of the {kind}: {known}.")
    recipe, method_options = _method(content, method, detector)
    datasets = tuple(content[k] for k in ("validation", "test") if content.get(k))
    options = [
        *content.get("opts", ()),
        *method_options,
        *([key, value] if key else ()),
        "DATASETS.TEST",
        datasets,
    ]
    return Training(
        detector=detector,
        method=method,
        setting=_as_text(value) if key else "",
        seed=int(seed),
        config=content["detectors"][detector].replace("{recipe}", recipe),
        options=tuple(options),
        value=_as_number(value),
    )


def _method(content: Mapping[str, Any], name: str, detector: str) -> tuple[str, list[Any]]:
    """Recipe and options of a method; one that is like another adds its own to the other's."""
    description = content["methods"][name] or {}
    _check_keys(description, "method", f"the method {name!r}")
    recipe, options = "", []
    if other := description.get("like"):
        if other not in content["methods"] or "like" in (content["methods"][other] or ()):
            raise ValueError(
                f"the method {name!r} is like {other!r}, which is none, or itself like another."
            )
        recipe, options = _method(content, other, detector)
    own = _of_detector(description.get("opts", ()), detector)
    return description.get("recipe", recipe), options + own


def _of_detector(options: Sequence[Any] | Mapping[str, Sequence[Any]], detector: str) -> list[Any]:
    """A list, or one for each detector that has options of its own."""
    return list(options.get(detector, ()) if isinstance(options, Mapping) else options)


def _as_text(value: Any) -> str:
    """A value as part of a file name: [50.0, 75] becomes 50-75."""
    parts = value if isinstance(value, list) else [value]
    return "-".join(f"{x:g}" if isinstance(x, int | float) else str(x) for x in parts)


def _as_number(value: Any) -> float | None:
    """A text may be a number: YAML reads 1e-4 as one, without a point."""
    if isinstance(value, list):
        value = value[0] if value else None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _check_keys(entry: Mapping[str, Any], kind: str, where: str) -> None:
    unknown = set(entry) - _KEYS[kind]
    if unknown:
        raise ValueError(
            f"{where} has the key {sorted(unknown)[0]!r}, which is none of "
            f"{', '.join(sorted(_KEYS[kind]))}."
        )


def _check_unique(plan: Plan) -> None:
    """Two trainings of one name would share one record."""
    seen: dict[str, Training] = {}
    for study in plan.studies:
        for training in study.trainings:
            other = seen.setdefault(training.name, training)
            if other != training:
                raise ValueError(
                    f"{training.name!r} stands for two trainings with different options; give one "
                    "of the methods another name."
                )
