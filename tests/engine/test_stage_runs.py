"""Trainings of several stages and generations: who teaches whom, and what is kept."""

import json

import pytest
import torch

pytest.importorskip("timm", reason="timm is not installed")

from sssd.classification import build_network
from sssd.engine import plan_stages, run_stages
from tests.classifiers import (
    CONFIGS,
    KEYS,
    TINY,
    assert_same,
    saved,
    state_of,
    tiny_config,
    watched_trainings,
)

EVALUATED = ("DATASETS.TEST", (TINY,))


RECIPES = sorted(path.name.split("_cifar_")[0] for path in CONFIGS.glob("*_digits.yaml"))
WITHOUT_TEACHER = {"byot", "ce", "confidence_penalty", "cs_kd", "dml", "label_smoothing", "one"}
# With the networks and stages of another one: left to the long tests.
VARIANTS = {"at_paper", "nst_linear", "nst_gaussian", "born_again_cwtm", "born_again_dkpp"}


@pytest.fixture
def trainings(monkeypatch):
    return watched_trainings(monkeypatch)


def tensors(module):
    return [*module.parameters(), *module.buffers()]


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(r, marks=pytest.mark.long if r in VARIANTS else [])
        for r in RECIPES
        if r not in WITHOUT_TEACHER
    ],
)
def test_a_teacher_is_bit_identical_before_and_after(tmp_path, trainings, recipe):
    cfg = tiny_config(recipe, tmp_path)
    run_stages(cfg)
    stages = {stage.cfg.OUTPUT_DIR: stage for stage in plan_stages(cfg)}
    assert [output for output, *_ in trainings] == list(stages)
    taught = 0
    for output, model, before in trainings:
        source = stages[output].teacher
        assert (model.teacher is None) == (source is None)
        if source is None:
            continue
        taught += 1
        after = state_of(model.teacher)
        started = {k[8:]: v for k, v in before.items() if k.startswith("teacher.")}
        assert any("running_mean" in name for name in after)
        assert_same(started, after)
        (folder,) = (s.cfg.OUTPUT_DIR for s in stages.values() if s.name == source)
        assert_same(saved(folder)["model"], model.teacher.state_dict())
    assert taught
    # It was a training: the student has moved.
    _, model, before = trainings[-1]
    assert not torch.equal(model.student.conv1.weight, before["student.conv1.weight"])


@pytest.mark.parametrize("recipe", sorted(WITHOUT_TEACHER))
def test_methods_without_a_teacher_train(tmp_path, trainings, recipe):
    results = run_stages(tiny_config(recipe, tmp_path, *EVALUATED))
    assert list(results) == ["student"]
    (_, model, before) = trainings[0]
    assert model.teacher is None
    after = state_of(model)
    moved = {
        name for name, p in model.named_parameters() if not torch.equal(before[name], after[name])
    }
    assert moved == {name for name, p in model.named_parameters()}


def test_generations_share_no_object_and_start_from_other_weights(tmp_path, trainings):
    cfg = tiny_config("born_again", tmp_path, *EVALUATED)
    results = run_stages(cfg)
    students = [model.student for _, model, _ in trainings]
    assert len(students) == 4
    storages = [
        {t.untyped_storage().data_ptr() for t in tensors(model)} for _, model, _ in trainings
    ]
    objects = [{id(m) for m in model.modules()} for _, model, _ in trainings]
    for i in range(4):
        for k in range(i):
            assert not storages[i] & storages[k] and not objects[i] & objects[k]
            first, second = (trainings[j][2]["student.conv1.weight"] for j in (i, k))
            assert not torch.equal(first, second)
            # Nor does it start from what the other has become.
            assert not torch.equal(first, students[k].conv1.weight)
    # Every generation's checkpoint is kept, and is that generation.
    for stage, student in zip(plan_stages(cfg), students, strict=True):
        assert_same(saved(stage.cfg.OUTPUT_DIR)["model"], student.state_dict())
        assert "classification" in results[stage.name]
    assert {"classification", "ensemble", "ensemble_with_first"} == set(results["ensemble"])
    assert results["ensemble"]["classification"] == results["generation3"]["classification"]


@pytest.mark.parametrize("recipe", ["fitnets", "ab", "fsp"])
def test_the_second_stage_starts_from_the_student_of_the_first(tmp_path, trainings, recipe):
    run_stages(tiny_config(recipe, tmp_path))
    (_, _, _), (_, first, _), (_, _, start) = trainings
    for name, value in first.student.state_dict().items():
        assert torch.equal(value, start[f"student.{name}"]), name


def test_factor_transfer_takes_the_paraphraser_of_its_first_stage_and_keeps_it(tmp_path, trainings):
    run_stages(tiny_config("ft", tmp_path))
    (_, _, _), (_, first, _), (_, second, _) = trainings
    trained = state_of(first.training_parts["terms"][0]["paraphraser"].encoder)
    assert_same(trained, state_of(second.training_parts["terms"][0]["factor"].paraphraser))


def test_results_are_in_files_as_well(tmp_path):
    results = run_stages(tiny_config("kd", tmp_path, *EVALUATED))
    assert list(results) == ["teacher", "student"]
    assert json.loads((tmp_path / "results.json").read_text()) == results
    own = json.loads((tmp_path / "teacher" / "stage_results.json").read_text())
    assert own == results["teacher"] and 0 <= own["classification"]["top1"] <= 100


def test_the_same_config_gives_the_same_weights(tmp_path):
    for folder in ("a", "b"):
        torch.manual_seed(len(folder))  # what was drawn before has no part in it
        torch.rand(3 if folder == "a" else 5)
        run_stages(tiny_config("kd_at_cs_kd", tmp_path / folder))
    assert_same(saved(tmp_path / "a")["model"], saved(tmp_path / "b")["model"])


def test_a_student_goes_on_from_given_weights_and_from_a_given_teacher(tmp_path, trainings):
    for name, network in (("teacher", "cifar_resnet20"), ("start", "cifar_resnet8")):
        torch.save(build_network(network, num_classes=10, in_chans=1).state_dict(),
                   tmp_path / f"{name}.pth")  # fmt: skip
    run_stages(tiny_config("kd", tmp_path / "output", "MODEL.WEIGHTS", str(tmp_path / "start.pth"),
                           KEYS + "TEACHER.WEIGHTS", str(tmp_path / "teacher.pth")))  # fmt: skip
    ((_, model, before),) = trainings
    start = torch.load(tmp_path / "start.pth", weights_only=True)
    for name, value in start.items():
        assert torch.equal(before[f"student.{name}"], value), name
    assert_same(torch.load(tmp_path / "teacher.pth", weights_only=True), model.teacher.state_dict())
