"""docs/performance.md says what its results and its preset say."""

import json
import re

import pytest
import yaml

from sssd.studies.plan import load_plan
from sssd.studies.report import variants_of
from sssd.studies.tables import paired_difference
from tests.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs/performance.md").read_text()
RESULTS = REPOSITORY / "docs/results/performance"
DETECTORS = ("faster_rcnn", "retinanet", "fcos")


def table_row(start):
    """Cells of the row that begins with a text, without that."""
    (line,) = (x for x in PAGE.splitlines() if x.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")[1:]]


def rows_of(column, part):
    """Method or variant -> its results; of the detector of a column, "configs" or "inference"."""
    report = json.loads((RESULTS / f"{DETECTORS[column]}.json").read_text())
    return {row["name"].split("/")[0]: row for row in report[part]}


@pytest.mark.parametrize("column", range(3), ids=DETECTORS)
def test_the_ratios_are_those_of_the_results(column):
    found, inference = rows_of(column, "configs"), rows_of(column, "inference")
    efficient = found["SSSD_efficient"]
    expected = {
        "SSSD, time": found["SSSD"]["ratio"]["median"],
        "LGD as a setting of sssd, time": found["LGD"]["ratio"]["median"],
        "SSSD, peak memory": found["SSSD"]["memory_ratio"],
        "SSSD, [efficient preset](#the-efficient-preset), time": efficient["ratio"]["median"],
        "SSSD, efficient preset, peak memory": efficient["memory_ratio"],
        "inference, time": inference["SSSD"]["ratio"]["median"],
    }
    for start, value in expected.items():
        assert table_row(start)[column] == f"{value:.2f}", start
    assert table_row("inference, operators and outputs")[column] == "the same"
    for config in list(inference.values())[1:]:
        assert config["same_detector"] and config["first_difference"] is None
        assert config["largest_difference"] == 0


@pytest.mark.parametrize("column", range(3), ids=DETECTORS)
def test_the_savings_of_each_key_are_those_of_the_results(column):
    found = rows_of(column, "configs")
    rows = {
        "SSSD, without these keys": "SSSD",
        "half as wide (`REFINEMENT_DIM`, `ADAPTER_DIM`)": "half as wide",
        "bfloat16": "bfloat16",
        "activation checkpointing": "activation checkpointing",
        "the preset": "SSSD_efficient",
    }
    for start, config in rows.items():
        ratio, memory = found[config]["ratio"]["median"], found[config]["memory_ratio"]
        assert table_row(start)[column] == f"{ratio:.2f}, {memory:.2f}", start


def test_the_goals_are_met_where_the_page_says_so():
    # Of issue 6: step 1.95 (Faster R-CNN), memory 1.8, crowds 1.1; the efficient preset 1.4.
    assert float(table_row("SSSD, time")[0]) <= 1.95
    assert max(map(float, table_row("SSSD, peak memory"))) <= 1.8
    of_regions, *of_maps = map(
        float, table_row("SSSD, [efficient preset](#the-efficient-preset), time")
    )
    assert of_regions <= 1.4 < min(of_maps)  # the page says that RetinaNet and FCOS miss it
    assert max(map(float, table_row("SSSD, efficient preset, peak memory"))) <= 1.4
    crowds = json.loads((RESULTS / "objects.json").read_text())["configs"]
    (crowded,) = (x for x in crowds if x["name"].startswith("SSSD") and "300" in x["name"])
    ratio = re.search(r"step \[([\d.]+) times as long\]", PAGE)[1]
    assert ratio == f"{crowded['ratio']['median']:.2f}" and float(ratio) <= 1.1


@pytest.mark.parametrize("detector", DETECTORS)
def test_the_preset_is_that_of_the_configs(detector):
    (block,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.S | re.M)
    expected = yaml.safe_load(block)["MODEL"]
    if detector != "faster_rcnn":
        del expected["SSSD"]["TEACHER"]["ACTIVATION_CHECKPOINT"]
    path = REPOSITORY / f"configs/SSSD_efficient/{detector}_R_50_FPN_1x.yaml"
    assert yaml.safe_load(path.read_text())["MODEL"] == expected


@pytest.mark.parametrize(
    "row, study, method",
    [
        ("[RetinaNet](results/bccd/efficient_retinanet.md)", "efficient_retinanet", "efficient"),
        ("[FCOS](results/bccd/efficient_fcos.md)", "efficient_fcos", "efficient"),
        ("half as wide alone", "efficient_keys", "half_width"),
        ("bfloat16 alone", "efficient_keys", "bfloat16"),
    ],
)
def test_the_accuracy_of_a_preset_is_that_of_its_runs(row, study, method):
    folder = REPOSITORY / "docs/results/bccd"
    plan = load_plan(folder / "plan.yaml")
    (variants,) = variants_of(plan, plan.trainings([study]), folder).values()
    (faithful,) = (v for v in variants if v.name == "sssd")
    (efficient,) = (v for v in variants if v.name == f"sssd_{method}")
    seeds = sorted(faithful.records.keys() & efficient.records.keys())
    expected = []
    for splits in (["validation"], ["test"], ["validation", "test"]):
        ours, theirs = (v.figures(plan.metric, *splits) for v in (efficient, faithful))
        expected.append(paired_difference([ours[s] for s in seeds], [theirs[s] for s in seeds]))
    assert table_row(row) == [str(len(seeds)), *expected]


def test_every_linked_file_is_there():
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (REPOSITORY / "docs" / target).exists(), target
