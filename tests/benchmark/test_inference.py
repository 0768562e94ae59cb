"""What is left of sssd at inference: nothing, and the comparison would notice."""

import pytest
import torch

import sssd  # noqa: F401  (before Detectron2: it applies the compatibility layer)
from sssd.benchmark.compare import summarise
from sssd.benchmark.inference import InferenceInTurns, compare_inference
from sssd.benchmark.jobs import plan_jobs
from sssd.benchmark.operators import (
    compare_operators,
    digest_of_weights,
    largest_difference,
    operators_of,
)
from sssd.benchmark.report import inference_table
from sssd.benchmark.training import TrainingInTurns
from tests.benchmark.test_data import tiny_job
from tests.conftest import REPOSITORY


def described(name, job, folder):
    path = str(folder / "exported.pth")
    with TrainingInTurns(job) as training:
        training.export(path)
        assert training.batches.take() == []
    with InferenceInTurns(job, path) as inference:
        return {"name": name, **inference.describe()}, [inference.run(2)]


@pytest.mark.parametrize("detector", ["faster_rcnn", "fcos"])
def test_a_distilled_detector_runs_the_operators_of_the_plain_one(detector, tmp_path):
    plain, plain_turns = described("A", tiny_job(distilled=False, detector=detector), tmp_path)
    distilled, turns = described("B", tiny_job(detector=detector), tmp_path)
    first, second = compare_inference([plain, distilled])
    assert first["same_detector"] is None and second["same_detector"] == "A"
    assert second["first_difference"] is None and second["largest_difference"] == 0.0
    assert second["operators"] == first["operators"] and first["operators"]["count"] > 100
    assert any(name == "torchvision::nms" for name in plain["operators"])
    assert all(len(x) > 0 for x in plain["outputs"])  # or nothing would have been compared

    summaries = summarise([plain_turns, turns])
    assert summaries[1]["batch_size"] == 1 and len(summaries[1]["turns"][0]["step_seconds"]) == 2
    rows = [
        {"name": x["name"], **x, **y} for x, y in zip((plain, distilled), summaries, strict=True)
    ]
    rows = [{**x, **y} for x, y in zip(rows, (first, second), strict=True)]
    line = inference_table(rows).splitlines()[-1]
    assert f"the same {first['operators']['count']:,} | identical |" in line


def test_a_classifier_is_its_network_alone(tmp_path):
    files = [f"configs/Classification/{x}_cifar_resnet8_digits.yaml" for x in ("ce", "one")]
    jobs = plan_jobs([str(REPOSITORY / x) for x in files], ["SOLVER.IMS_PER_BATCH", "2"])
    plain, one = (described(job.name, job, tmp_path)[0] for job in jobs)
    _, compared = compare_inference([plain, one])
    assert compared["first_difference"] is None and compared["largest_difference"] == 0.0
    assert one["outputs"][0].shape == (1, 10)


def test_another_operator_is_found():
    x = torch.ones(2)
    reference = operators_of(lambda: (x + 1).exp().sum())
    assert reference == ["aten::add.Tensor", "aten::exp", "aten::sum"]
    assert compare_operators(reference, reference) is None
    assert compare_operators(reference, operators_of(lambda: (x + 1).sin().sum())) == {
        "index": 1,
        "reference": "aten::exp",
        "own": "aten::sin",
    }
    assert compare_operators(reference, reference[:2])["own"] is None

    one = {"name": "A", "detector": "d", "weights": "w", "operators": reference, "outputs": [x]}
    other = {**one, "name": "B", "operators": ["aten::sub.Tensor", *reference[1:]]}
    stranger = {**other, "name": "C", "detector": "e"}
    trained = {**one, "name": "D", "weights": "v", "outputs": [x + 1]}
    _, changed, alone, retrained = compare_inference([one, other, stranger, trained])
    assert changed["first_difference"]["own"] == "aten::sub.Tensor"
    assert alone["same_detector"] is None
    assert retrained["largest_difference"] is None and retrained["first_difference"] is None


def test_outputs_and_weights_are_compared_by_value():
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])
    assert largest_difference([x], [x.clone()]) == 0
    assert largest_difference([x, x], [x, y]) == 0.5
    assert largest_difference([x], [x[:1]]) == float("inf")
    assert digest_of_weights({"a": x, "b": y}) == digest_of_weights({"b": y, "a": x.clone()})
    assert digest_of_weights({"a": x}) != digest_of_weights({"a": y})
    assert digest_of_weights({"a": torch.tensor(3)}) != digest_of_weights({"a": torch.tensor(4)})
