"""The plan of a comparison, its runs, and that what is complete is not run again."""

import gzip
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

pytest.importorskip("timm", reason="timm is not installed")

from sssd.studies import classification
from sssd.studies.classification_plan import (
    Run,
    final_options,
    final_records,
    load_plan,
    read_record,
    run_config,
    trial_runs,
)
from sssd.studies.classification_run import _prepare, execute
from sssd.studies.tables import comparison_rows
from tests.conftest import REPOSITORY

PLAN = """
config: "{folder}/{{method}}_cifar_resnet8_{{data}}.yaml"
data: [digits]
validation: "{{data}}_val"
test: "{{data}}_test"
metric: "classification/top1"
trial_seed: 0
seeds: [1, 2]
baseline: ce
shared: ce
teacher:
  method: ce
  opts: [MODEL.SSSD.CLASSIFIER.NETWORK, cifar_resnet14]
methods:
  ce:
    trials: [{{SOLVER.BASE_LR: 0.05}}, {{SOLVER.BASE_LR: 0.1}}]
  longer: {{method: ce, length: 1.5}}
  kd:
    trials: [{{kd.temperature: 4.0}}, {{kd.temperature: 2.0}}]
  born_again:
    seeds: [1]
    trials: [{{kd.weight: 0.5}}]
"""


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN.format(folder=REPOSITORY / "configs" / "Classification"))
    return load_plan(path)


def write(folder, run, accuracy):
    path = folder / f"{run.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    figures = {"classification/top1": accuracy}
    path.write_text(json.dumps({"validation": figures, **run.settings()}))


def test_the_best_trials_settings_and_everybodys_reach_the_final_runs(plan, tmp_path):
    ce, kd = plan.methods["ce"], plan.methods["kd"]
    with pytest.raises(ValueError, match="trials of 'ce' on digits are not complete"):
        trial_runs(plan, tmp_path, kd, "digits")
    for run, accuracy in zip(trial_runs(plan, tmp_path, ce, "digits"), [90, 91], strict=True):
        write(tmp_path, run, accuracy)
    trials = trial_runs(plan, tmp_path, kd, "digits")
    assert [run.name for run in trials] == ["digits/kd/trial0", "digits/kd/trial1"]
    assert trials[1].options == {"SOLVER.BASE_LR": 0.1, "kd.temperature": 2.0}
    for run in trials:
        write(tmp_path, run, 95)  # equal: the config's own value, which comes first, wins
    options = final_options(plan, tmp_path, kd, "digits")
    assert options == {"SOLVER.BASE_LR": 0.1, "kd.temperature": 4.0}
    assert final_options(plan, tmp_path, plan.methods["longer"], "digits") == {
        "SOLVER.BASE_LR": 0.1
    }


def test_a_trial_never_sees_the_test_split(plan, tmp_path):
    kd = plan.methods["kd"]
    options = {"kd.temperature": 2.0, "SOLVER.BASE_LR": 0.1}
    trial = run_config(plan, Run(kd, "digits", 0, 1, options), tmp_path, tmp_path / "t.pth")
    final = run_config(plan, Run(kd, "digits", 2, None, options), tmp_path, tmp_path / "t.pth")
    assert trial.DATASETS.TEST == ("digits_val",)
    assert final.DATASETS.TEST == ("digits_val", "digits_test")
    assert trial.DATASETS.TRAIN == final.DATASETS.TRAIN == ("digits_train",)
    assert (trial.SEED, final.SEED, final.SOLVER.BASE_LR) == (0, 2, 0.1)
    assert [t["temperature"] for t in final.MODEL.SSSD.CLASSIFIER.TERMS if t["name"] == "kd"] == [2]
    assert str(tmp_path / "t.pth") == final.MODEL.SSSD.CLASSIFIER.TEACHER.WEIGHTS


def test_options_reach_every_generation_and_trials_stop_after_the_second(plan, tmp_path):
    born_again = plan.methods["born_again"]
    options = {"kd.weight": 0.5}
    trial = run_config(plan, Run(born_again, "digits", 0, 0, options), tmp_path, None)
    final = run_config(plan, Run(born_again, "digits", 1, None, options), tmp_path, None)
    assert len(trial.MODEL.SSSD.CLASSIFIER.GENERATIONS) == 2
    first, *others = final.MODEL.SSSD.CLASSIFIER.GENERATIONS
    assert len(others) == 3 and all(t["name"] != "kd" for t in first)
    assert all([t["weight"] for t in g if t["name"] == "kd"] == [0.5] for g in others)


def test_a_longer_schedule_is_longer_in_all_its_parts(plan, tmp_path):
    plain = run_config(plan, Run(plan.methods["ce"], "digits", 1), tmp_path, None).SOLVER
    longer = run_config(plan, Run(plan.methods["longer"], "digits", 1), tmp_path, None).SOLVER
    assert longer.MAX_ITER == 1.5 * plain.MAX_ITER
    assert tuple(1.5 * step for step in plain.STEPS) == longer.STEPS


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("metric:", "metrik:", "lacks the key 'metric'"),
        ("trials: [{kd.weight: 0.5}]", f"trials: [{', '.join(['{kd.weight: 1.0}'] * 5)}]", "four"),
        ("config:", "config: [", "cannot be read"),
        ("baseline: ce", "baseline: cee", "The baseline 'cee' of the plan .* none of its methods"),
        ("methods:", "methods: []\nother:", "has another form than it should"),
    ],
)
def test_a_plan_that_cannot_be_used_is_one_sentence(plan, tmp_path, old, new, sentence):
    path = tmp_path / "plan.yaml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=sentence):
        load_plan(path)


def test_a_plan_without_keys_is_one_sentence(tmp_path):
    (tmp_path / "plan.yaml").write_text("- ce\n")
    with pytest.raises(ValueError, match="plan.yaml has to be keys and values"):
        load_plan(tmp_path / "plan.yaml")


def test_an_option_of_no_term_is_one_sentence(plan, tmp_path):
    run = Run(plan.methods["kd"], "digits", 0, 0, {"attention.weight": 1.0})
    with pytest.raises(ValueError, match="'attention.weight' of the plan names no term"):
        run_config(plan, run, tmp_path, None)


def test_a_run_leaves_its_record_its_metrics_and_its_last_weights(tmp_path):
    path = tmp_path / "plan.yaml"
    folder = tmp_path / "configs"
    folder.mkdir()
    base = REPOSITORY / "configs" / "Base-Classification-digits.yaml"
    (folder / "born_again_cifar_resnet8_digits.yaml").write_text(
        f'_BASE_: "{base}"\n'
        "MODEL: {SSSD: {CLASSIFIER: {GENERATIONS: [[{name: cross_entropy}],"
        " [{name: kd}]]}}}\nSOLVER: {MAX_ITER: 2, STEPS: [], WARMUP_ITERS: 0}\n"
    )
    path.write_text(PLAN.format(folder=folder))
    plan = load_plan(path)
    run = Run(plan.methods["born_again"], "digits", 1, options={"kd.weight": 0.5})
    record = execute(plan, run, tmp_path / "records", tmp_path / "scratch")
    stored = tmp_path / "records" / "digits" / "born_again"
    assert json.loads((stored / "seed1.json").read_text()) == record
    assert set(record["stages"]) == {"generation0", "generation1", "ensemble"}
    assert record["test"] == record["stages"]["ensemble"]["test"]
    assert {"ensemble/top1", "ensemble_with_first/top1"} < set(record["test"])
    assert record["options"] == {"kd.weight": 0.5}
    assert read_record(tmp_path / "records", run) == record
    config = folder / "born_again_cifar_resnet8_digits.yaml"
    config.write_text(config.read_text().replace("WARMUP_ITERS: 0", "WARMUP_ITERS: 1"))
    assert read_record(tmp_path / "records", run) is None  # its config was edited since
    metrics = json.loads(gzip.decompress((stored / "seed1_metrics.json.gz").read_bytes()))
    assert set(metrics) == {"generation0", "generation1"}
    assert metrics["generation1"][-1]["digits_test/classification/top1"] == pytest.approx(
        record["stages"]["generation1"]["test"]["classification/top1"], abs=1e-4
    )
    left = sorted(p.name for p in (tmp_path / "scratch" / "digits/born_again/seed1").iterdir())
    assert left == ["config.yaml", "log.txt", "model_final.pth"]


def test_what_is_left_of_a_run_with_other_settings_is_not_gone_on_with(plan, tmp_path):
    born_again = plan.methods["born_again"]
    scratch = tmp_path / "scratch"
    run = Run(born_again, "digits", 1, options={"kd.weight": 0.5})
    folder = scratch / run.name
    cfg = run_config(plan, run, folder, None)
    _prepare(folder, cfg)
    (folder / "stage_results.json").write_text("{}")
    _prepare(folder, cfg)
    assert (folder / "stage_results.json").is_file()
    _prepare(folder, run_config(plan, replace(run, options={"kd.weight": 0.7}), folder, None))
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_a_record_of_other_settings_does_not_count(plan, tmp_path):
    ce = plan.methods["ce"]
    first, second = trial_runs(plan, tmp_path, ce, "digits")
    write(tmp_path, first, 90)
    write(tmp_path, Run(ce, "digits", 0, 1, {"SOLVER.BASE_LR": 0.3}), 91)
    assert read_record(tmp_path, first)["validation"] == {"classification/top1": 90}
    assert read_record(tmp_path, second) is None
    with pytest.raises(ValueError, match="not complete"):
        final_options(plan, tmp_path, ce, "digits")


def test_a_record_of_another_length_or_other_options_of_the_plan_does_not_count(plan, tmp_path):
    ce = plan.methods["ce"]
    run = Run(ce, "digits", 1)
    write(tmp_path, run, 90)
    assert read_record(tmp_path, run)
    for edited in (replace(ce, length=2.0), replace(ce, opts=("SOLVER.MAX_ITER", 5))):
        assert read_record(tmp_path, replace(run, method=edited)) is None


def test_tables_have_the_runs_of_the_chosen_settings_alone(plan, tmp_path):
    ce = plan.methods["ce"]
    for run, accuracy in zip(trial_runs(plan, tmp_path, ce, "digits"), [91, 90], strict=True):
        write(tmp_path, run, accuracy)
    for seed, rate in ((1, 0.05), (2, 0.1)):  # the first trial's is the chosen one
        write(tmp_path, Run(ce, "digits", seed, options={"SOLVER.BASE_LR": rate}), 80 + seed)
    found = final_records(plan, tmp_path, "digits")
    assert [r["validation"]["classification/top1"] for r in found["ce"]] == [81]
    assert found["kd"] == []  # its trials are not made


def test_a_run_that_fails_is_named_and_the_others_go_on(plan, tmp_path, monkeypatch):
    made = []

    def execute(plan, run, folder, scratch):
        made.append(run.name)
        if run.trial == 0:
            raise FloatingPointError("loss is nan")
        return {"validation": {plan.metric: 90.0}, "seconds": 1.0}

    monkeypatch.setattr(classification, "execute", execute)
    pool = lambda jobs, *args, **options: ThreadPoolExecutor(jobs)  # noqa: E731
    monkeypatch.setattr(classification, "ProcessPoolExecutor", pool)
    failures, in_time = classification.run_comparison(
        plan, tmp_path, tmp_path, jobs=1, hours=math.inf
    )
    assert failures == ["digits/ce/trial0 has failed: loss is nan"] and in_time
    # The trials of everybody's settings, of which the others need the best.
    assert made == ["digits/ce/trial0", "digits/ce/trial1"]


def test_the_ensemble_is_the_one_that_is_best_on_validation():
    runs = [
        {
            "seed": 1, "options": {"kd.mode": "soft"},
            "validation": {"x/top1": 90.0, "ensemble/top1": 95.0, "ensemble_with_first/top1": 94.0},
            "test": {"x/top1": 90.0, "ensemble/top1": 91.0, "ensemble_with_first/top1": 92.0},
        }
    ]  # fmt: skip
    (row,) = comparison_rows({"tsd": runs}, baseline="ce", metric="x/top1")
    assert (row.ensemble, row.settings) == ("91.00", "kd.mode soft")
