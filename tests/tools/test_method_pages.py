import json
import runpy
import sys

import pytest

from tests.conftest import REPOSITORY

PLAN = """
config: "{method}_{data}.yaml"
data: [digits, cells]
validation: "{data}_val"
test: "{data}_test"
metric: "classification/top1"
trial_seed: 0
seeds: [1, 2]
baseline: ce
shared: ce
teacher: {method: ce}
methods:
  ce: {}
  kd: {}
"""
PAGE = "Before.\n\n<!-- measured: ce kd -->\nold\n<!-- end -->\n\nAfter.\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "plan.yaml").write_text(PLAN)
    costs = [
        {"name": f"{method}_cifar_resnet8_digits", "ratio": {"median": ratio}, "memory_ratio": 1.25}
        for method, ratio in (("ce", 1.0), ("kd", 1.784))
    ]
    (tmp_path / "step_time.json").write_text(json.dumps({"configs": costs}))
    for method, accuracies in (("ce", (90.0, 92.0)), ("kd", (91.0, 94.0))):
        for seed, accuracy in zip((1, 2), accuracies, strict=True):
            path = tmp_path / "digits" / method / f"seed{seed}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            figures = {"classification/top1": accuracy}
            path.write_text(json.dumps({"seed": seed, "test": figures, "options": {}}))
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "kd.md").write_text(PAGE)
    return tmp_path


def write_pages(folder, monkeypatch):
    arguments = ["method_pages.py", str(folder / "plan.yaml"), str(folder / "pages")]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(REPOSITORY / "tools" / "method_pages.py"), run_name="__main__")
    return (folder / "pages" / "kd.md").read_text()


def test_a_page_gets_the_rows_that_it_names_and_no_empty_column(folder, monkeypatch):
    text = write_pages(folder, monkeypatch)
    assert text.splitlines()[2:8] == [
        "<!-- measured: ce kd -->",
        "| config | digits | to `ce`, digits | step time | memory |",
        "| --- | --- | --- | --- | --- |",
        "| `ce` | 91.00 ± 1.41 |  | 1.00 | 1.2 |",
        # differences 1 and 2: mean 1.5, half-width 12.7062 * 0.5
        "| `kd` | 92.50 ± 2.12 | +1.50 ± 6.35 | 1.78 | 1.2 |",
        "<!-- end -->",
    ]
    assert text.startswith("Before.\n\n") and text.endswith("\n\nAfter.\n")


def test_writing_twice_changes_nothing(folder, monkeypatch):
    assert write_pages(folder, monkeypatch) == write_pages(folder, monkeypatch)
