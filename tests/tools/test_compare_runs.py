"""Means, spreads and paired differences of runs."""

import json
import runpy

import pytest

from tests.conftest import REPOSITORY

COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@pytest.fixture
def runs(tmp_path):
    """Two variants with three seeds, of which two are common."""
    figures = {"plain_seed1": 50, "plain_seed2": 60, "plain_seed3": 10,
               "ours_seed1": 51, "ours_seed2": 63, "ours_seed4": 90}  # fmt: skip
    for name, value in figures.items():
        folder = tmp_path / name
        folder.mkdir()
        lines = [{"bbox/AP": 0.0}, {f"bbox/{column}": value for column in COLUMNS}, {"time": 1.0}]
        (folder / "metrics.json").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return tmp_path


def call(*args):
    tool = runpy.run_path(str(REPOSITORY / "tools/compare_runs.py"))
    tool["main"](tool["parse"](list(map(str, args))))


def test_differences_are_paired_by_seed(runs, capsys):
    call(*sorted(runs.iterdir()), "--reference", "plain")
    output = capsys.readouterr().out.splitlines()
    assert output[2].startswith("| ours | 3 | 68.00 ± 19.97 |")
    assert output[3].startswith("| plain | 3 | 40.00 ± 26.46 |")
    # +1 and +3: mean 2, deviation 1.414, error 1, and t of one degree of freedom 12.706.
    assert output[-1].startswith("| ours | 2 | +2.00 ± 12.71 |")


def test_without_a_reference_there_are_no_differences(runs, capsys):
    call(*sorted(runs.iterdir()))
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_figures_of_several_datasets_are_chosen(tmp_path, capsys):
    folder = tmp_path / "ours_seed1"
    folder.mkdir()
    line = {f"{of}/bbox/{column}": value for of, value in (("val", 40), ("val/averaged", 41))
            for column in COLUMNS}  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(line) + "\n")
    call(folder, "--of", "val/averaged")
    assert "| ours | 1 | 41.00 |" in capsys.readouterr().out
    call(folder, "--of", "val", "val/averaged")
    assert "| ours | 1 | 40.50 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="has figures of 'val', 'val/averaged': choose with --of"):
        call(folder)


def test_an_unknown_reference_is_named(runs):
    with pytest.raises(SystemExit, match="--reference plan is none of the variants: ours, plain"):
        call(*sorted(runs.iterdir()), "--reference", "plan")
