"""Tables of a study, worked out by hand."""

import json
import math

import pytest
import yaml

from sssd.studies.detection import write_studies
from sssd.studies.plan import load_plan
from sssd.studies.records import write_record
from sssd.studies.tables import bootstrap_interval
from sssd.studies.training import _settings
from sssd.studies.variation import pairs_needed, pooled_deviations

COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def plan_of(tmp_path, study):
    content = {
        "task": "detection", "validation": "val", "test": "test", "metric": "averaged/bbox/AP",
        "early": 100, "seeds": [1, 2, 3], "detectors": {"fcos": "fcos{recipe}.yaml"},
        "methods": {"plain": None, "lgd": {"recipe": "_sssd"}, "sssd": {"recipe": "_sssd",
        "opts": ["A", 1]}}, "studies": {"study": study},
    }  # fmt: skip
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(content))
    return load_plan(tmp_path / "plan.yaml")


def write(folder, training, value, share=None, curve=(), test=None):
    def figures(x):
        keys = [f"{p}bbox/{c}" for p in ("", "averaged/") for c in COLUMNS]
        return {key: x + 10 * key.startswith("averaged") for key in keys}

    record = {
        "settings": _settings(training), "validation": figures(value),
        "test": figures(value - 5 if test is None else test), "share": share, "iterations": 600,
    }  # fmt: skip
    lines = [{"iteration": i, **{f"val/{k}": v for k, v in figures(x).items()}} for i, x in curve]
    write_record(folder / training.name, record, lines)


def test_differences_are_of_the_judged_figure_and_paired_by_seed(tmp_path):
    study = {"methods": ["plain", "lgd", "sssd"], "baseline": "plain", "test": True}
    plan = plan_of(tmp_path, study)
    values = {"plain": [30, 32, 31], "lgd": [31, 34, 34], "sssd": [33, 30]}
    for training in plan.trainings():
        of_method = values[training.method]
        if training.seed <= len(of_method):
            write(tmp_path, training, of_method[training.seed - 1])
    text = write_studies(plan, tmp_path)
    assert text.startswith((tmp_path / "study.md").read_text())
    assert "**1 of 9 runs are still missing.**" in text
    assert "over seeds: bbox AP of the averaged weights" in text
    assert "| bbox AP of the averaged weights, difference to plain | seeds" in text
    assert "| lgd | 3 | 43.00 ± 1.73 |" in text  # 31, 34, 34 of the averaged weights: ten more
    assert "| lgd | 3 | 38.00 ± 1.73 |" in text  # on test, five less
    # Differences 1, 2, 3: mean 2, 4.3027 / sqrt(3) on each side.
    assert "| lgd | 3 | +2.00 ± 2.48 | +1.00 to +3.00 |" in text
    # 3 and -2 of the two seeds that both have: mean 0.5, 12.706 * 2.5.
    assert "| sssd | 2 | +0.50 ± 31.77 | -2.00 to +3.00 |" in text
    assert "share of the distillation" not in text


def test_of_two_splits_there_is_the_difference_of_their_mean(tmp_path):
    study = {"methods": ["plain", "lgd"], "baseline": "plain", "test": True}
    plan = plan_of(tmp_path, study)
    gains = {"plain": [(0, 0)] * 3, "lgd": [(1, 3), (2, 4), (3, 2)]}  # validation, test
    for training in plan.trainings():
        validation, test = gains[training.method][training.seed - 1]
        write(tmp_path, training, 30 + validation, test=20 + test)
    _, mean = write_studies(plan, tmp_path).split("## fcos, mean of both splits")
    # Differences 2, 3, 2.5: mean 2.5, 4.3027 * 0.5 / sqrt(3).
    assert "| lgd | 3 | +2.50 ± 1.24 | +2.00 to +3.00 |" in mean
    assert "AP50" not in mean


def test_a_sweep_has_shares_and_pictures_of_its_own(tmp_path):
    sweep = {"key": "MODEL.SSSD.COEFFICIENT.VALUES", "values": [[10], [50]]}
    plan = plan_of(tmp_path, {"methods": ["lgd"], "sweep": sweep, "title": "Coefficients"})
    for training in plan.trainings():
        x = float(training.setting)
        share = {"early": x / 100 + training.seed / 100, "end": 0.5}
        write(tmp_path, training, x, share=share)
    text = write_studies(plan, tmp_path)
    assert text.startswith("# Coefficients")
    assert "| lgd @ 10 | 12.0 % | 50.0 % |" in text and "| lgd @ 50 | 52.0 % | 50.0 % |" in text
    assert "![study_sweep](study_sweep.png)" in text
    assert not (tmp_path / "study_curves.png").exists()


def test_a_method_that_a_sweep_is_compared_with_takes_none_of_its_values(tmp_path):
    sweep = {"key": "MODEL.SSSD.COEFFICIENT.VALUES", "values": [[10], [50]]}
    study = {"methods": ["plain", "lgd"], "sweep": sweep, "baseline": "plain"}
    plan = plan_of(tmp_path, study)
    names = [t.name for t in plan.trainings() if t.seed == 1]
    assert names == ["fcos/plain/seed1", "fcos/lgd@10/seed1", "fcos/lgd@50/seed1"]
    for training in plan.trainings():
        write(tmp_path, training, float(training.setting or 5) + training.seed)
    text = write_studies(plan, tmp_path)
    assert "| lgd @ 10 | 3 | +5.00 ± 0.00 |" in text and "| lgd @ 50 | 3 | +45.00 ±" in text
    assert "![study_sweep](study_sweep.png)" in text


def test_curves_are_means_over_seeds_from_where_the_figure_begins(tmp_path, monkeypatch):
    from sssd.studies import figures, report

    plan = plan_of(tmp_path, {"methods": ["plain"], "figure_from": 0.5})
    for training in plan.trainings():
        curve = [(199, 1.0), (299, 2.0 + training.seed), (599, 4.0)]
        write(tmp_path, training, 4.0, curve=curve)
    (study,) = plan.studies
    variants = report.variants_of(plan, study.trainings, tmp_path)
    points = figures._curve(plan, study, variants["fcos"][0])
    assert points == {300: [13.0, 14.0, 15.0], 600: [14.0] * 3}
    assert "![study_curves](study_curves.png)" in write_studies(plan, tmp_path)


def test_records_of_other_settings_are_no_results(tmp_path):
    plan = plan_of(tmp_path, {"methods": ["plain"]})
    for training in plan.trainings():
        write(tmp_path, training, 4.0)
    path = tmp_path / "fcos/plain/seed1.json"
    record = json.loads(path.read_text())
    record["settings"]["options"] = ["SOLVER.MAX_ITER", "1"]
    path.write_text(json.dumps(record))
    assert "| plain | 2 |" in write_studies(plan, tmp_path)


def test_the_bootstrap_is_that_of_the_mean_difference():
    # Of two differences, the mean of two draws is one of 1, 2, 3 with chances 1/4, 1/2, 1/4.
    assert bootstrap_interval([11, 23], [10, 20]) == (1, 3)
    assert bootstrap_interval([11, 21], [10, 20]) == (1, 1)
    # For many it is that of the normal distribution.
    values = [float(x) for x in range(400)]
    low, high = bootstrap_interval(values, [0.0] * 400)
    error = 115.5 / 20
    assert low == pytest.approx(199.5 - 1.96 * error, abs=1) and high == pytest.approx(
        199.5 + 1.96 * error, abs=1
    )


def test_a_setting_of_a_sweep_can_be_the_baseline(tmp_path):
    sweep = {"key": "MODEL.SSSD.COEFFICIENT.VALUES", "values": [[10], [50]]}
    plan = plan_of(tmp_path, {"methods": ["lgd"], "sweep": sweep, "baseline": "lgd@10"})
    for training in plan.trainings():
        write(tmp_path, training, float(training.setting) + training.seed)
    text = write_studies(plan, tmp_path)
    assert "difference to lgd @ 10 |" in text
    assert "| lgd @ 50 | 3 | +40.00 ± 0.00 | +40.00 to +40.00 |" in text


def test_what_runs_vary_by_is_pooled_over_the_variants(tmp_path):
    plan = plan_of(tmp_path, {"methods": ["plain", "lgd", "sssd"], "test": True})
    # Squares around the means, on both splits: 2 and 8 of one degree of freedom, 2 and 2 of two.
    values = {"plain": [(30, 20), (32, 24)], "lgd": [(31, 21), (31, 22), (31 + 3**0.5, 23)]}
    for training in plan.trainings():
        if training.seed <= len(values.get(training.method, ())):
            validation, test = values[training.method][training.seed - 1]
            write(tmp_path, training, validation, test=test)
    text = write_studies(plan, tmp_path)
    assert text.endswith((tmp_path / "variation.md").read_text())
    (row,) = [line for line in text.splitlines() if line.startswith("| fcos | averaged weights")]
    validation, test, both, correlation, freedom, pairs = row.split(" | ")[2:]
    assert (validation, test, freedom) == ("1.15", "1.83", "3")  # roots of 4 / 3 and 10 / 3
    assert pairs.rstrip(" |") == "13"
    # Products on both splits: 4 and 3 ** 0.5; 3 degrees of freedom.
    assert float(correlation) == pytest.approx((4 + 3**0.5) / (4 * 10) ** 0.5, abs=0.005)
    assert float(both) == pytest.approx(((4 + 10 + 2 * (4 + 3**0.5)) / 12) ** 0.5, abs=0.005)


def test_a_deviation_needs_two_figures_and_gives_the_pairs_that_a_difference_takes():
    assert pooled_deviations([[1.0, 3.0], [2.0, 2.0, 5.0], [7.0]]) == (
        pytest.approx(8**0.5 / 3**0.5),
        3,
    )
    deviation, freedom = pooled_deviations([[1.0], []])
    assert deviation != deviation and freedom == 0
    # A difference with a deviation of 1: 2.571 / sqrt(6) is above 1, 2.447 / sqrt(7) below.
    assert pairs_needed(0.5**0.5) == 7 and pairs_needed(0.5**0.5, half_width=2.0) == 4
    assert pairs_needed(100.0) is None


def test_a_figure_that_is_undefined_is_left_out(tmp_path):
    plan = plan_of(tmp_path, {"methods": ["plain", "lgd"], "baseline": "plain"})
    for training in plan.trainings():
        write(tmp_path, training, 30.0 + training.seed)
        path = tmp_path / f"{training.name}.json"
        record = json.loads(path.read_text())
        record["validation"]["averaged/bbox/APs"] = math.nan  # no small object
        if training.seed == 1 and training.method == "lgd":
            record["validation"]["averaged/bbox/AP"] = math.nan
        path.write_text(json.dumps(record))
    text = write_studies(plan, tmp_path)
    assert "| plain | 3 | 42.00 ± 1.00 | 42.00 ± 1.00 | 42.00 ± 1.00 |  | 42.00" in text
    assert "| lgd | 3 | 42.50 ± 0.71 |" in text
    assert "| lgd | 2 | +0.00 ± 0.00 |" in text


@pytest.mark.parametrize(
    ("values", "places"),
    [
        ([5e-05, "1e-4"], [5e-05, 1e-4]),
        ([-1.0, 1.0], [-1.0, 1.0]),
        ([[50.0, 75.0], [60.0, 80.0]], [50.0, 60.0]),
        (["kl", "js"], [0, 1]),
    ],
)
def test_a_sweep_is_drawn_where_its_values_are(tmp_path, monkeypatch, values, places):
    from sssd.studies import figures

    drawn = []
    monkeypatch.setattr(figures, "_draw_method", lambda *args: drawn.append(list(args[3])))
    plan = plan_of(tmp_path, {"methods": ["lgd"], "sweep": {"key": "A", "values": values}})
    for training in plan.trainings():
        write(tmp_path, training, 30.0)
    assert "study_sweep.png" in write_studies(plan, tmp_path)
    assert drawn == [places]


def test_a_seed_or_a_value_that_is_named_twice_is_one(tmp_path):
    sweep = {"key": "A", "values": [10, 10.0]}
    plan = plan_of(tmp_path, {"methods": ["lgd"], "sweep": sweep, "seeds": [1, 1, 2]})
    for training in plan.trainings():
        write(tmp_path, training, 30.0)
    assert len(plan.trainings()) == 2 and "missing" not in write_studies(plan, tmp_path)


def test_seeds_of_several_studies_count_together_in_what_runs_vary_by(tmp_path):
    plan = plan_of(tmp_path, {"methods": ["plain"], "seeds": [1, 2]})
    content = yaml.safe_load((tmp_path / "plan.yaml").read_text())
    content["studies"]["more"] = {"methods": ["plain"], "seeds": [3, 4]}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(content))
    plan = load_plan(tmp_path / "plan.yaml")
    for training in plan.trainings():
        write(tmp_path, training, 30.0 + training.seed)
    row = write_studies(plan, tmp_path).strip().splitlines()[-1]
    assert row.split(" | ")[-2] == "3"  # degrees of freedom of four figures
