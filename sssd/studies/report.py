"""What the records of a study say: tables in Markdown, by detector."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .plan import Plan, Study, Training
from .records import read_metrics_of
from .tables import COCO_COLUMNS, bootstrap_interval, markdown_table, paired_interval, spread
from .training import figures_of, read_record

__all__ = ["Variant", "study_tables", "variants_of"]


@dataclass(frozen=True)
class Variant:
    """The runs of a method, or of a method with one setting, that are complete.

    Attributes:
        method, setting, value, variant: as in :class:`sssd.studies.plan.Training`.
        records: by seed.
        curves: seed -> number of iterations done -> figures of the validation split.
    """

    method: str
    setting: str
    value: float | None
    variant: str
    records: Mapping[int, Mapping[str, Any]]
    curves: Mapping[int, Mapping[int, Mapping[str, float]]]

    @property
    def name(self) -> str:
        return f"{self.method} @ {self.setting}" if self.setting else self.method

    def figures(self, key: str, *splits: str) -> dict[int, float]:
        """A figure of the last evaluation, by seed; of several splits, its mean over them.

        Seeds without it are left out, and so are those where it is undefined (APs without a small
        object).
        """
        return {
            seed: statistics.mean(record[split][key] for split in splits)
            for seed, record in self.records.items()
            if all(math.isfinite(record[split].get(key, math.nan)) for split in splits)
        }

    def share(self, part: str) -> list[float]:
        """The share of the distillation ("early" or "end") of each run, in percent."""
        return [100 * r["share"][part] for r in self.records.values() if part in (r["share"] or ())]


def variants_of(
    plan: Plan, trainings: Iterable[Training], folder: Path
) -> dict[str, list[Variant]]:
    """Detector -> variants with at least one complete run, in the order of the plan.

    Args:
        trainings: of a study, or of the whole plan.
        folder: of the plan and its records.
    """
    by_detector: dict[str, dict[str, list[Training]]] = {}
    for training in trainings:
        variants = by_detector.setdefault(training.detector, {})
        variants.setdefault(training.variant, []).append(training)
    found = {
        detector: [_variant(plan, trainings, folder) for trainings in variants.values()]
        for detector, variants in by_detector.items()
    }
    return {d: complete for d, vs in found.items() if (complete := [v for v in vs if v.records])}


def _variant(plan: Plan, trainings: Sequence[Training], folder: Path) -> Variant:
    records, curves = {}, {}
    for training in trainings:
        record = read_record(folder, training)
        if record is None:
            continue
        records[training.seed] = record
        curves[training.seed] = {
            min(int(line["iteration"]) + 1, record["iterations"]): figures
            for line in read_metrics_of(folder / training.name)
            if (figures := figures_of(line, plan.validation, alone=not plan.test))
        }
    first = trainings[0]
    return Variant(first.method, first.setting, first.value, first.variant, records, curves)


def study_tables(plan: Plan, study: Study, found: Mapping[str, Sequence[Variant]]) -> str:
    """All that a study says in Markdown.

    Args:
        found: from :func:`variants_of`; not empty.
    """
    parts = []
    for detector, variants in found.items():
        splits = ["validation", "test"] if study.test and plan.test else ["validation"]
        for split in splits:
            dataset = plan.validation if split == "validation" else plan.test
            parts.append(f"## {detector}, `{dataset}`\n\n{_figures(plan, variants, split)}")
            if differences := _differences(plan, study, variants, split):
                parts.append(differences)
        # More pictures than in either: mostly the narrowest interval.
        if len(splits) > 1 and (differences := _differences(plan, study, variants, *splits)):
            parts.append(f"## {detector}, mean of both splits\n\n{differences}")
        if shares := _shares(plan, variants):
            parts.append(shares)
    done = sum(len(variant.records) for variants in found.values() for variant in variants)
    missing = len(study.trainings) - done
    note = f"**{missing} of {len(study.trainings)} runs are still missing.**\n\n" if missing else ""
    note += f"Mean ± standard deviation over seeds: {plan.judged}, and what it is made of.\n\n"
    return f"# {study.title}\n\n{note}" + "\n".join(parts)


def _figures(plan: Plan, variants: Sequence[Variant], split: str) -> str:
    """Mean and standard deviation of each COCO figure; of the weights by which it is judged."""
    prefix = plan.metric.removesuffix("AP")
    rows = []
    for variant in variants:
        cells = [spread(list(variant.figures(prefix + c, split).values())) for c in COCO_COLUMNS]
        rows.append([variant.name, len(variant.records), *cells])
    return markdown_table(["method", "seeds", *COCO_COLUMNS], rows)


def _differences(plan: Plan, study: Study, variants: Sequence[Variant], *splits: str) -> str:
    """Of the judged figure, to the baseline; of several splits, of its mean over them."""
    base = next((v for v in variants if v.variant == study.baseline), None)
    if base is None:
        return ""
    rows = []
    for variant in variants:
        if variant is base:
            continue
        ours, theirs = (v.figures(plan.metric, *splits) for v in (variant, base))
        seeds = sorted(ours.keys() & theirs.keys())
        if len(seeds) < 2:
            continue
        pair = [ours[s] for s in seeds], [theirs[s] for s in seeds]
        mean, half = paired_interval(*pair)
        low, high = bootstrap_interval(*pair)
        rows.append(
            [variant.name, len(seeds), f"{mean:+.2f} ± {half:.2f}", f"{low:+.2f} to {high:+.2f}"]
        )
    if not rows:
        return ""
    header = [f"{plan.judged}, difference to {base.name}", "seeds of both", "95 %, Student's t",
              "95 %, bootstrap"]  # fmt: skip
    return markdown_table(header, rows)


def _shares(plan: Plan, variants: Sequence[Variant]) -> str:
    rows = [
        [v.name, *(f"{statistics.mean(v.share(part)):.1f} %" for part in ("early", "end"))]
        for v in variants
        if v.share("early") and v.share("end")
    ]
    if not rows:
        return ""
    header = ["share of the distillation term", f"first {plan.early} iterations", "last tenth"]
    return markdown_table(header, rows)
