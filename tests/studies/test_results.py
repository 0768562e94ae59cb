"""The tables in docs/results are those of the records beside them."""

import pytest

from sssd.studies.plan import load_plan
from sssd.studies.report import study_tables, variants_of
from sssd.studies.variation import variation_text
from tests.conftest import REPOSITORY

FOLDER = REPOSITORY / "docs/results/bccd"
PLAN = load_plan(FOLDER / "plan.yaml")
WRITTEN = [study for study in PLAN.studies if (FOLDER / f"{study.name}.md").is_file()]


@pytest.mark.parametrize("study", WRITTEN, ids=lambda study: study.name)
def test_a_table_is_that_of_its_records(study):
    tables = study_tables(PLAN, study, variants_of(PLAN, study.trainings, FOLDER))
    text = (FOLDER / f"{study.name}.md").read_text()
    assert text.startswith(tables), "tools/compare.py docs/results/bccd/plan.yaml --tables"
    pictures = text.removeprefix(tables).split()
    assert pictures
    for picture in pictures:
        assert (FOLDER / picture.rpartition("(")[2].rstrip(")")).is_file()


def test_what_runs_vary_by_is_that_of_the_records():
    text = (FOLDER / "variation.md").read_text()
    assert text == variation_text(PLAN, FOLDER), (
        "tools/compare.py docs/results/bccd/plan.yaml --tables"
    )
