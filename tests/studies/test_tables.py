import pytest

from sssd.studies.tables import (
    Row,
    comparison_rows,
    markdown_table,
    paired_interval,
)


def record(seed, accuracy, ensemble=None, **options):
    figures = {"classification/top1": accuracy, "classification/top5": 100.0}
    if ensemble is not None:
        figures |= {"ensemble/top1": ensemble, "ensemble/top5": 100.0}
    return {"seed": seed, "validation": figures, "test": figures, "options": options}


def test_the_interval_is_that_of_the_paired_t_test():
    # differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t(0.975, 2) = 4.302653
    mean, half = paired_interval([11.0, 22.0, 33.0], [10.0, 20.0, 30.0])
    assert mean == pytest.approx(2)
    assert half == pytest.approx(4.302653 / 3**0.5, rel=1e-6)


def test_a_row_pairs_by_seed_and_names_its_own_settings():
    records = {
        "ce": [record(1, 90.0), record(2, 92.0), record(3, 91.0)],
        # out of order, and a seed less: paired with seeds 1 and 2 of the baseline
        "kd": [
            record(2, 93.0, ensemble=95.0, **{"kd.weight": 0.5, "SOLVER.BASE_LR": 0.1}),
            record(1, 92.0, ensemble=94.0, **{"kd.weight": 0.5}),
        ],
        "none": [],
    }
    ce, kd = comparison_rows(records, baseline="ce", metric="classification/top1")
    assert ce == Row("ce", 3, "91.00 ± 1.00", "", "", "")
    # differences 1 and 2: mean 1.5, half-width 12.7062 * 0.5
    assert kd == Row("kd", 2, "92.50 ± 0.71", "+1.50 ± 6.35", "94.50 ± 0.71", "kd.weight 0.5")
    table = markdown_table(["a", "b"], [["x", 1], ["y", 2]])
    assert table == "| a | b |\n| --- | --- |\n| x | 1 |\n| y | 2 |\n"
