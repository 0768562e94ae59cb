"""The parts of a step add up to it, and are where they belong."""

import pytest
import torch

import sssd  # noqa: F401  (before Detectron2: it applies the compatibility layer)
from sssd.benchmark.breakdown import PARTS
from sssd.benchmark.jobs import plan_jobs
from sssd.benchmark.report import breakdown_table
from sssd.benchmark.training import TrainingInTurns
from tests.benchmark.test_data import tiny_job
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.filterwarnings("ignore:Warning. Profiler clears")


def breakdown(job):
    with TrainingInTurns(job) as training:
        optimizer, teacher = (
            training.trainer._trainer.optimizer,
            getattr(training.model, "teacher", 0),
        )
        owners = [training.model, training.student, teacher or training.model, optimizer]
        names = ("forward", "_replay", "step")
        before = [vars(owner).get(name) for owner in owners for name in names]
        unmarked = torch.Tensor.backward
        result = training.breakdown(1)
        assert torch.Tensor.backward is unmarked
        assert [vars(owner).get(name) for owner in owners for name in names] == before
        assert training.count == 2 and training.batches.take() == []
    assert result["steps"] == 1
    assert sum(result["parts"].values()) == pytest.approx(result["step_seconds"])
    assert sum(result["backward_of"].values()) == pytest.approx(result["parts"]["backward"])
    assert min(result["parts"].values()) > 0
    return result


def test_a_distilled_step_has_every_part_and_a_plain_one_no_teacher():
    distilled, plain = breakdown(tiny_job()), breakdown(tiny_job(distilled=False))
    assert tuple(distilled["parts"]) == PARTS
    of_forward = {"student forward", "teacher", "replayed pass", "distance"}
    assert {x for x, s in distilled["backward_of"].items() if s > 0} >= of_forward
    assert set(plain["parts"]) == {"student forward", "backward", "optimizer", "rest"}
    assert set(plain["backward_of"]) <= {"student forward", "rest"}
    assert plain["backward_of"]["student forward"] > 0.9 * plain["parts"]["backward"]

    configs = [{"name": "A", "breakdown": plain}, {"name": "B", "breakdown": distilled}]
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in breakdown_table(configs).splitlines()
    ]
    cells = {name: values for name, *values in rows}
    assert cells["teacher"][0] == "-" and cells["... of the teacher"][0] == "-"
    assert float(cells["backward"][1].split()[0]) == pytest.approx(
        distilled["parts"]["backward"] * 1e3, abs=0.06
    )
    assert cells["step, with the profiler"][1].endswith("(100%)")


def test_a_frozen_teacher_has_no_pass_of_its_own_and_no_gradient():
    parts = breakdown(tiny_job("MODEL.SSSD.TEACHER.FROZEN", True))
    assert set(parts["parts"]) == set(PARTS) - {"replayed pass"}
    assert not {"teacher", "replayed pass"} & set(parts["backward_of"])


def test_a_classification_has_its_student_teacher_and_terms():
    file = str(REPOSITORY / "configs/Classification/kd_cifar_resnet8_digits.yaml")
    (job,) = plan_jobs([file], ["SOLVER.IMS_PER_BATCH", "4"])
    result = breakdown(job)
    assert set(result["parts"]) == set(PARTS) - {"replayed pass"}
    assert "teacher" not in result["backward_of"]
    assert result["backward_of"]["student forward"] > result["backward_of"]["distance"] > 0
