"""The micro-benchmark of the distance compares the same function, and counts what is saved."""

import json

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import sssd  # noqa: F401  (before Detectron2: it applies the compatibility layer)
from sssd.benchmark import distance_rows as benchmark_distance_rows
from sssd.benchmark.distance import Case, measure_distances, saved_bytes
from sssd.benchmark.distance_rows import plan_rows
from sssd.benchmark.jobs import BenchmarkError
from tests.benchmark.test_compare import call

BYTES = 4 * 6 * 5


def test_saved_bytes_are_those_of_the_storages_that_autograd_keeps():
    x, y = torch.rand(6, 5, requires_grad=True), torch.rand(6, 5, requires_grad=True)
    assert saved_bytes(lambda: x.exp())[0] == BYTES  # its output
    assert saved_bytes(lambda: x * y)[0] == 2 * BYTES
    assert saved_bytes(lambda: x * x)[0] == BYTES
    assert saved_bytes(lambda: x[1:] * y[:5].T.T)[0] == 2 * BYTES  # views keep the whole
    assert saved_bytes(lambda: x + y)[0] == 0
    assert saved_bytes(lambda: x.exp().log().sin())[0] == 2 * BYTES  # exp's output is log's input
    saved, value = saved_bytes(lambda: checkpoint(torch.exp, x, use_reentrant=False).sum())
    assert saved == BYTES and value == x.exp().sum() and not value.requires_grad


@pytest.mark.parametrize("masked", [False, True])
def test_rows_compute_the_same_distance_in_turns(masked):
    rows, notes = plan_rows("cpu", torch.float32, compiles=False)
    assert notes == ["Triton's kernel and liger-kernel's need a GPU."]
    case = Case((2, 8, 9, 7), masked=masked)
    result = measure_distances(case, rows, rounds=2, repeats=1)
    by_name = {row["name"]: row for row in result["rows"]}
    eager, fused = by_name["JS, normalised"], by_name["JS, normalised, fused"]
    assert fused["value"] == pytest.approx(eager["value"], rel=1e-5)
    student, teacher, mask = case.maps()
    assert by_name["MSE"]["value"] == pytest.approx((student - teacher).square().mean().item())
    assert (mask is not None and not mask.all()) == masked
    assert by_name["MSE"]["ratio"] == {"median": 1.0, "q1": 1.0, "q3": 1.0}
    assert result["map_bytes"] == 4 * 2 * 8 * 9 * 7
    assert by_name["MSE"]["saved_bytes"] == 2 * result["map_bytes"]
    assert eager["saved_bytes"] > fused["saved_bytes"] >= 2 * result["map_bytes"]
    assert fused["bytes_per_second"] == pytest.approx(3 * result["map_bytes"] / fused["both"])


def test_a_compiler_that_does_not_work_is_a_note(monkeypatch):
    def fail(device):
        raise BenchmarkError("There is no compiler.")

    monkeypatch.setattr(benchmark_distance_rows, "check_compiler", fail)
    rows, notes = plan_rows("cpu", torch.float32)
    assert len(rows) == 5 and notes[0] == "There is no compiler."


@pytest.mark.long
def test_the_tool_prints_what_the_json_holds(tmp_path):
    out = tmp_path / "distance.json"
    result = call(
        tmp_path, "--shape", 2, 16, 8, 8, "--shape", 1, 16, 4, 4, "--rounds", 2, "--repeats", 2,
        "--device", "cpu", "--mask", "--json", out, tool="benchmark_distance",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(out.read_text())
    assert [x["shape"] for x in report["results"]] == [[2, 16, 8, 8], [1, 16, 4, 4]]
    compiled = [row for row in report["results"][0]["rows"] if row["name"].endswith("compiled")]
    lines = [line for line in result.stdout.splitlines() if line.startswith("| JS, normalised  ")]
    assert len(lines) == 2 and "Some cells are padding" in result.stdout
    if compiled:
        eager = report["results"][0]["rows"][3]
        assert compiled[0]["value"] == pytest.approx(eager["value"], rel=1e-4)
