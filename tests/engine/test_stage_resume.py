"""A resume goes on anywhere in a training of several stages."""

import json
import os

import pytest
from detectron2.engine import hooks

pytest.importorskip("timm", reason="timm is not installed")

from sssd.engine import ClassificationTrainer, plan_stages, run_stages
from sssd.engine.setup import CheckpointError, check_resumed_config
from tests.classifiers import (
    KEYS,
    TINY,
    assert_same,
    registered,
    saved,
    tiny_config,
    tiny_records,
    watched_trainings,
)

EVALUATED = ("DATASETS.TEST", (TINY,))
CE = [{"name": "cross_entropy"}]


@pytest.fixture
def trainings(monkeypatch):
    return watched_trainings(monkeypatch)


class Interrupted(Exception):
    pass


@pytest.fixture
def fail(monkeypatch):
    """fail(stage, iteration): from then on, that iteration ends in an exception; None for none."""
    where = []
    run_step = ClassificationTrainer.run_step

    def watched(self):
        run_step(self)
        stage = os.path.basename(self.cfg.OUTPUT_DIR)
        if where and (stage, self.iter) == where[-1]:
            raise Interrupted

    monkeypatch.setattr(ClassificationTrainer, "run_step", watched)

    def set_point(stage, iteration=0):
        where[:] = [(stage, iteration)] if stage else []

    return set_point


def interrupted_run(tmp_path, fail, recipe, stage, iteration, *opts):
    cfg = tiny_config(recipe, tmp_path / "student", "SOLVER.MAX_ITER", 4, *EVALUATED, *opts)
    fail(stage, iteration)
    with pytest.raises(Interrupted):
        run_stages(cfg)
    fail(None)
    return cfg


def files(stages):
    """Time and bytes of the checkpoints that there are."""
    found = [stage.weights for stage in stages if os.path.isfile(stage.weights)]
    return {path: (os.stat(path).st_mtime_ns, open(path, "rb").read()) for path in found}


POINTS = [
    ("fitnets", "teacher"),
    ("fitnets", "hint"),
    ("fitnets", "student"),
    ("born_again_cwtm", "generation0"),
    ("born_again_cwtm", "student"),  # the folder of the last generation
    ("dml", "student"),
    ("ft", "paraphraser"),
]
# Of all points, iterations and checkpoint periods these are tried in every run of the tests.
QUICK = {("fitnets", "hint", 1, 1), ("fitnets", "student", 3, 1000), ("dml", "student", 3, 1),
         ("born_again_cwtm", "student", 1, 1), ("ft", "paraphraser", 3, 1000)}  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "stage", "iteration", "period"),
    [
        pytest.param(*case, marks=[] if case in QUICK else pytest.mark.long)
        for case in (
            (*point, i, period) for point in POINTS for i in (1, 3) for period in (1, 1000)
        )
    ],
)
def test_a_resume_goes_on_in_the_middle_of_any_stage(
    tmp_path, fail, trainings, recipe, stage, iteration, period
):
    stages = tiny_config(recipe, tmp_path).MODEL.SSSD.CLASSIFIER.STAGES
    # As long as the others, so that they can be interrupted at the same iterations.
    stages = [{**description, "length": 1} for description in stages]
    opts = ("SOLVER.CHECKPOINT_PERIOD", period, KEYS + "STAGES", stages)
    cfg = interrupted_run(tmp_path, fail, recipe, stage, iteration, *opts)
    stages = plan_stages(cfg)
    done = files(stages)
    names = [os.path.basename(s.cfg.OUTPUT_DIR) for s in stages]
    assert len(done) == names.index(stage)  # an interrupted stage leaves no final checkpoint
    trainings.clear()

    starts = {}
    before_train = hooks.IterationTimer.before_train

    def note(self):
        trainer = self.trainer
        starts[os.path.basename(trainer.cfg.OUTPUT_DIR)] = trainer.start_iter
        before_train(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hooks.IterationTimer, "before_train", note)
        results = run_stages(cfg, resume=True)
    # Only what was not complete has run, from the last checkpoint on.
    expected = dict.fromkeys(names[names.index(stage) :], 0)
    expected[stage] = iteration if period == 1 else 0
    assert starts == expected
    assert done.items() <= files(stages).items()
    assert all(os.path.isfile(s.weights) for s in stages)
    generations = ["ensemble"] if recipe == "born_again_cwtm" else []
    assert list(results) == [s.name for s in stages] + generations
    assert all(results[name]["classification"] for name in results)
    assert json.loads((tmp_path / "student" / "results.json").read_text()) == results
    assert saved(cfg.OUTPUT_DIR)["iteration"] == 3


def test_a_resume_of_a_complete_run_trains_nothing(tmp_path, trainings):
    cfg = tiny_config("kd", tmp_path, *EVALUATED)
    results = run_stages(cfg)
    before = files(plan_stages(cfg))
    trainings.clear()
    assert run_stages(cfg, resume=True) == results
    assert not trainings and files(plan_stages(cfg)) == before


def test_a_complete_run_can_be_made_longer_or_evaluated_on_other_images(tmp_path):
    cfg = tiny_config("ce", tmp_path, "SOLVER.CHECKPOINT_PERIOD", 1, *EVALUATED)
    results = run_stages(cfg)
    longer = tiny_config(
        "ce", tmp_path, "SOLVER.CHECKPOINT_PERIOD", 1, *EVALUATED, "SOLVER.MAX_ITER", 5
    )
    run_stages(longer, resume=True)
    assert saved(cfg.OUTPUT_DIR)["iteration"] == 4
    with registered("others", tiny_records(each=8)) as name:
        other = longer.clone()
        other.DATASETS.TEST = (TINY, name)
        found = run_stages(other, resume=True)["student"]
    assert found.keys() == {TINY, "others"} and found.keys() != results["student"].keys()
    assert saved(cfg.OUTPUT_DIR)["iteration"] == 4


def test_of_several_stages_none_can_be_made_longer(tmp_path):
    run_stages(tiny_config("kd", tmp_path))
    with pytest.raises(CheckpointError, match=r"stage 'teacher' .*SOLVER.MAX_ITER.*: of several"):
        run_stages(tiny_config("kd", tmp_path, "SOLVER.MAX_ITER", 5), resume=True)


def test_a_resume_after_an_interrupted_evaluation_evaluates(tmp_path, monkeypatch):
    cfg = tiny_config("kd", tmp_path, *EVALUATED)
    with monkeypatch.context() as patch:
        patch.setattr(ClassificationTrainer, "test", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_stages(cfg)
    before = files(plan_stages(cfg))
    assert len(before) == 1
    results = run_stages(cfg, resume=True)
    assert results["teacher"]["classification"] and results["student"]["classification"]
    assert before.items() <= files(plan_stages(cfg)).items()


def test_a_new_run_in_the_same_folder_takes_nothing_from_the_one_before(tmp_path, fail, trainings):
    run_stages(tiny_config("kd", tmp_path / "student", "SOLVER.MAX_ITER", 4, *EVALUATED))
    cfg = interrupted_run(tmp_path, fail, "kd", "teacher", 2, "SEED", 9)
    assert not (tmp_path / "student" / "results.json").exists()
    trainings.clear()
    run_stages(cfg, resume=True)
    assert [os.path.basename(output) for output, *_ in trainings] == ["teacher", "student"]
    alone = tiny_config("kd", tmp_path / "alone", "SOLVER.MAX_ITER", 4, *EVALUATED, "SEED", 9)
    run_stages(alone)
    assert_same(saved(tmp_path / "student")["model"], saved(tmp_path / "alone")["model"])


def test_another_config_cannot_be_resumed_in_the_middle_of_an_earlier_stage(tmp_path, fail):
    cfg = interrupted_run(tmp_path, fail, "kd", "teacher", 2, "SOLVER.CHECKPOINT_PERIOD", 1)
    (tmp_path / "student" / "config.yaml").write_text(cfg.dump())  # as default_setup does
    check_resumed_config(cfg)

    def other(*opts):
        return tiny_config("kd", tmp_path / "student", "SOLVER.MAX_ITER", 4, *EVALUATED, *opts)

    check_resumed_config(other("SOLVER.MAX_ITER", 50))  # longer is fine
    for key, value, was in (
        (KEYS + "TERMS", CE, r"'cross_entropy', 'weight': 0\.1"),
        (KEYS + "TEACHER.NETWORK", "cifar_resnet14", "cifar_resnet20"),
        (KEYS + "NETWORK_OPTIONS", {"drop_rate": 0.5}, r"\{\}"),
    ):
        name = key.replace(".", r"\.")
        with pytest.raises(CheckpointError, match=rf"{name} was .*{was}.* and is .*resume"):
            check_resumed_config(other(key, value))
