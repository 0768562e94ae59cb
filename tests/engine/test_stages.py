"""The plan of a training of several stages or generations."""

import os

import pytest

pytest.importorskip("timm", reason="timm is not installed")

from sssd.engine import last_stage, plan_stages
from tests.classifiers import KEYS, tiny_config


def plan(recipe, *opts):
    return {stage.name: stage for stage in plan_stages(tiny_config(recipe, "output", *opts))}


def classifier(stage):
    return stage.cfg.MODEL.SSSD.CLASSIFIER


def terms(stage):
    return [term["name"] for term in classifier(stage).TERMS]


def test_a_method_without_a_teacher_is_one_stage_with_the_config_as_it_is():
    cfg = tiny_config("ce", "output")
    (stage,) = plan_stages(cfg)
    assert (stage.name, stage.teacher, stage.previous) == ("student", None, None)
    assert stage.cfg == cfg


def test_a_teacher_is_trained_first_and_taken_from_there():
    stages = plan("kd", KEYS + "NETWORK_OPTIONS", {"drop_rate": 0.5}, "MODEL.WEIGHTS", "start.pth")
    teacher, student = stages.values()
    assert list(stages) == ["teacher", "student"]
    assert (student.teacher, student.previous) == ("teacher", None)
    assert teacher.weights == os.path.join("output", "teacher", "model_final.pth")
    assert student.weights == os.path.join("output", "model_final.pth")
    assert classifier(teacher).NETWORK == "cifar_resnet20"
    assert classifier(teacher).TEACHER.NETWORK == "" and teacher.cfg.MODEL.WEIGHTS == ""
    assert dict(classifier(teacher).NETWORK_OPTIONS) == {}  # these are the student's
    assert terms(teacher) == ["cross_entropy"]
    assert teacher.weights == classifier(student).TEACHER.WEIGHTS
    assert student.cfg.MODEL.WEIGHTS == "start.pth"
    assert dict(classifier(student).NETWORK_OPTIONS) == {"drop_rate": 0.5}


def test_a_teacher_of_the_students_network_has_its_options_too():
    teacher = plan("kd", KEYS + "NETWORK_OPTIONS", {"drop_rate": 0.5},
                   KEYS + "TEACHER.NETWORK", "cifar_resnet8")["teacher"]  # fmt: skip
    assert dict(classifier(teacher).NETWORK_OPTIONS) == {"drop_rate": 0.5}


def test_a_given_teacher_is_not_trained():
    stages = plan("kd", KEYS + "TEACHER.WEIGHTS", "mine.pth")
    assert list(stages) == ["student"]
    assert classifier(stages["student"]).TEACHER.WEIGHTS == "mine.pth"


@pytest.mark.parametrize(
    ("recipe", "first", "length", "first_terms"),
    [
        ("fitnets", "hint", 0.25, ["hint"]),
        ("ab", "boundaries", 0.25, ["activation_boundaries"]),
        ("fsp", "flow", 0.25, ["fsp"]),
        ("ft", "paraphraser", 0.15, ["paraphraser"]),
    ],
)
@pytest.mark.parametrize("weights", ["", "mine.pth"])
def test_a_first_stage_hands_on_its_student_and_its_terms(
    recipe, first, length, first_terms, weights
):
    schedule = ("SOLVER.MAX_ITER", 200, "SOLVER.STEPS", (100, 160), "SOLVER.WARMUP_ITERS", 20)
    stages = plan(recipe, *schedule, KEYS + "TEACHER.WEIGHTS", weights)
    assert list(stages) == ([] if weights else ["teacher"]) + [first, "student"]
    early, student = stages[first], stages["student"]
    assert os.path.join("output", first) == early.cfg.OUTPUT_DIR
    assert (early.previous, student.previous) == (None, first)
    assert early.cfg.MODEL.WEIGHTS == "" and early.weights == student.cfg.MODEL.WEIGHTS
    for stage in (early, student):
        assert stage.teacher == (None if weights else "teacher")
        assert (weights or stages["teacher"].weights) == classifier(stage).TEACHER.WEIGHTS
        assert classifier(stage).STAGES == []
    assert terms(early) == first_terms
    assert round(200 * length) == early.cfg.SOLVER.MAX_ITER
    assert (round(100 * length), round(160 * length)) == early.cfg.SOLVER.STEPS
    assert round(20 * length) == early.cfg.SOLVER.WARMUP_ITERS
    assert student.cfg.SOLVER.MAX_ITER == 200 and student.cfg.SOLVER.STEPS == (100, 160)


def test_a_stage_has_the_settings_of_its_own():
    stages = plan("fitnets")
    assert stages["hint"].cfg.SOLVER.BASE_LR == 0.005
    assert stages["student"].cfg.SOLVER.BASE_LR == stages["teacher"].cfg.SOLVER.BASE_LR == 0.05


def test_each_generation_has_the_one_before_as_its_teacher():
    stages = plan("born_again")
    assert list(stages) == [f"generation{i}" for i in range(4)]
    first, *others = stages.values()
    assert first.teacher is None and classifier(first).TEACHER.NETWORK == ""
    for before, stage in zip(stages.values(), others, strict=False):
        assert stage.teacher == before.name and stage.previous is None
        assert classifier(stage).TEACHER.NETWORK == classifier(stage).NETWORK
        assert before.weights == classifier(stage).TEACHER.WEIGHTS
        assert stage.cfg.MODEL.WEIGHTS == "" and classifier(stage).GENERATIONS == []
    assert terms(first) == ["cross_entropy"] and terms(others[0]) == ["cross_entropy", "kd"]
    assert stages["generation3"].cfg.OUTPUT_DIR == "output"
    assert len({stage.weights for stage in stages.values()}) == 4


@pytest.mark.parametrize("recipe", ["kd", "fitnets", "born_again"])
def test_each_stage_has_a_seed_of_its_own_and_the_last_that_of_the_config(recipe):
    seeds = [stage.cfg.SEED for stage in plan(recipe, "SEED", 5).values()]
    assert seeds[-1] == 5 and len(set(seeds)) == len(seeds) and min(seeds) >= 0
    assert seeds == [stage.cfg.SEED for stage in plan(recipe, "SEED", 5).values()]
    others = [stage.cfg.SEED for stage in plan(recipe, "SEED", 6).values()]
    assert not set(seeds) & set(others)
    assert {stage.cfg.SEED for stage in plan(recipe, "SEED", -1).values()} == {-1}


def test_what_is_evaluated_is_the_last_stage():
    cfg = tiny_config("fitnets", "output", "MODEL.WEIGHTS", "trained.pth")
    own = last_stage(cfg)
    assert own.MODEL.WEIGHTS == "trained.pth" and own.OUTPUT_DIR == "output"
    keys = own.MODEL.SSSD.CLASSIFIER
    assert [term["name"] for term in keys.TERMS] == ["cross_entropy", "kd"]
    assert keys.TEACHER.WEIGHTS == "" and cfg.MODEL.SSSD.CLASSIFIER.STAGES


CE = [{"name": "cross_entropy"}]


@pytest.mark.parametrize(
    ("stages", "sentence"),
    [
        ([{"name": "a", "terms": CE, "epochs": 3}], r"a stage has no 'epochs', only name, terms,"),
        ([{"name": "a", "terms": CE, "length": 0}], r"'a' has the length 0: give it a positive"),
        ([{"name": "a", "terms": CE, "length": -0.5}], r"'a' has the length -0\.5"),
        ([{"name": "a", "terms": CE, "length": "half"}], r"'a' has the length half"),
        ([{"name": "a", "terms": CE, "length": float("nan")}], r"'a' has the length nan"),
        ([{"name": "a"}], r"\{'name': 'a'\}: give each stage a name and terms"),
        ([{"terms": CE}], r"give each stage a name and terms"),
        (["a"], r"holds 'a': give each stage a name and terms"),
        ([{"name": "a", "terms": "kd"}], r"its terms must be a list of dicts"),
        ([{"name": "a", "terms": CE}] * 2, r"a name of letters that no other stage has"),
        ([{"name": "student", "terms": CE}], r"a name of letters that no other stage has"),
        ([{"name": "teacher", "terms": CE}], r"a name of letters that no other stage has"),
        ([{"name": "../a", "terms": CE}], r"a name of letters that no other stage has"),
        ([{"name": "a", "terms": CE, "opts": ["SOLVER.BASE_LR"]}], r"opts of the stage 'a' .*key"),
        ([{"name": "a", "terms": CE, "opts": ["SOLVER.LR", 1]}], r"stage 'a' .*key: SOLVER\.LR"),
        ([{"name": "a", "terms": CE, "opts": 3}], r"The opts of the stage 'a' cannot be used"),
    ],
)
def test_a_stage_that_is_not_described_as_it_should_be_is_an_error(stages, sentence):
    with pytest.raises(ValueError, match=sentence):
        plan("kd", KEYS + "STAGES", stages)


def test_a_generation_without_a_list_of_terms_is_an_error():
    with pytest.raises(ValueError, match=r"GENERATIONS holds .*its terms must be a list"):
        plan("born_again", KEYS + "GENERATIONS", [CE, {"name": "kd"}])


def test_stages_generations_and_teachers_that_exclude_each_other_are_errors():
    generations = (KEYS + "GENERATIONS", [CE, CE])
    with pytest.raises(ValueError, match="both STAGES and GENERATIONS: use one of them"):
        plan("ce", KEYS + "STAGES", [{"name": "a", "terms": CE}], *generations)
    with pytest.raises(ValueError, match=r"GENERATIONS and the teacher 'cifar_resnet20': .*empty"):
        plan("kd", *generations)


def test_peers_and_stages_are_refused_together():
    peers = (KEYS + "PEERS", ["cifar_resnet8"])
    for recipe in ("fsp", "born_again"):
        with pytest.raises(ValueError, match=r"PEERS \(cifar_resnet8\) and STAGES or GENERATIONS"):
            plan(recipe, *peers)
