"""Curves are what was logged, each run in its colour."""

import gzip
import json

import matplotlib.pyplot as plt
import pytest

from sssd.visualization import curves, plot_panels, plot_runs, read_metrics

LINES = [
    {"iteration": 19, "loss_cls": 1.0, "loss_box_reg": 2.0, "teacher_loss_cls": 0.5,
     "loss_distill": 4.0, "loss_distill/share": 0.5, "loss_distill/coefficient": 50.0,
     "loss_distill/distance": 0.08, "lr": 0.1, "total_loss": 7.5, "time": 1.0},
    {"iteration": 39, "loss_cls": 0.5, "loss_box_reg": 1.0, "loss_distill": 2.0, "lr": 0.01},
    {"iteration": 40, "v/bbox/AP": 30.0, "v/averaged/bbox/AP": 31.0, "t/bbox/AP": 20.0,
     "v/teacher_with_ground_truth/bbox/AP": 90.0, "v/bbox/AP-red": 12.0},
]  # fmt: skip


@pytest.fixture
def figures(monkeypatch):
    """The figures that would be closed, to look into."""
    kept = []
    monkeypatch.setattr(curves.plt, "close", kept.append)
    yield kept
    monkeypatch.undo()
    for figure in kept:
        plt.close(figure)


def panel(figure, title):
    return next(axis for axis in figure.axes if axis.get_title() == title)


def points(line):
    return list(zip(*map(list, line.get_data()), strict=True))


def test_losses_are_summed_by_pass_without_the_distillation_term(figures, tmp_path):
    plot_runs(tmp_path / "x.png", {"": LINES})
    student, teacher, distillation = panel(figures[0], "losses").get_lines()
    assert points(student) == [(19, 3.0), (39, 1.5)]
    assert points(teacher) == [(19, 0.5)]
    assert points(distillation) == [(19, 4.0), (39, 2.0)]
    assert points(panel(figures[0], "distillation, % of the total loss").get_lines()[0]) == [
        (19, 50.0)
    ]
    assert len({line.get_color() for line in (student, teacher, distillation)}) == 3


def as_logged(line):
    """Detectron2's writer sorts the keys: the test split comes before the validation split."""
    return json.loads(json.dumps(line, sort_keys=True))


def test_ap_is_that_of_each_dataset_and_never_the_teachers(figures, tmp_path):
    evaluated = as_logged(LINES[2])
    plot_runs(tmp_path / "x.png", {"a": [*LINES[:2], evaluated], "b": LINES[:2]})
    axis = panel(figures[0], "AP")
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    found = dict(zip(names, map(points, axis.get_lines()), strict=True))
    assert found == {
        "last weights, t": [(40, 20.0)], "last weights, v": [(40, 30.0)],
        "averaged weights, v": [(40, 31.0)],
    }  # fmt: skip
    assert len({line.get_color() for line in axis.get_lines()}) == 1
    assert len({line.get_linestyle() for line in axis.get_lines()}) == 3
    (teacher,) = panel(figures[0], "AP of the teacher, with the ground truth").get_lines()
    assert points(teacher) == [(40, 90.0)]


def test_ap_of_one_dataset_has_no_name(figures, tmp_path):
    lines = [{"iteration": 40, "bbox/AP": 30.0, "averaged/bbox/AP": 31.0, "segm/AP": 5.0}]
    lines += [{"iteration": 50, "classification/top1": 90.0}]
    plot_runs(tmp_path / "x.png", {"a": [as_logged(line) for line in lines]})
    axis = panel(figures[0], "AP")
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    assert dict(zip(names, map(points, axis.get_lines()), strict=True)) == {
        "averaged weights": [(40, 31.0)], "last weights": [(40, 30.0)],
    }  # fmt: skip
    (accuracy,) = panel(figures[0], "top-1 accuracy, %").get_lines()
    assert points(accuracy) == [(50, 90.0)]


def test_more_than_ten_runs_have_colours_of_their_own(figures, tmp_path):
    plot_runs(tmp_path / "x.png", {str(i): LINES[:2] for i in range(12)}, panels=("lr",))
    colors = {line.get_color() for line in panel(figures[0], "learning rate").get_lines()}
    assert len(colors) == 12
    legend = figures[0].legends[0]
    assert {line.get_color() for line in legend.get_lines()} == colors


def test_a_run_has_one_colour_in_all_panels(figures, tmp_path):
    plot_runs(tmp_path / "x.png", {"plain": LINES[1:], "ours": LINES})
    (figure,) = figures
    first, second = panel(figure, "learning rate").get_lines()
    assert first.get_color() != second.get_color()
    (share,) = panel(figure, "distillation, % of the total loss").get_lines()
    assert share.get_color() == second.get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["plain", "ours"]


def test_panels_without_values_are_left_out(tmp_path):
    files = plot_panels(tmp_path, {"plain": [{"iteration": 19, "loss_cls": 1.0, "lr": 0.1}]})
    assert {path.name for path in files.values()} == {"curves_losses.png", "curves_lr.png"}
    assert all(path.stat().st_size for path in files.values())
    with pytest.raises(ValueError, match="nothing to plot in plain: .* after 20 iterations"):
        plot_runs(tmp_path / "x.png", {"plain": [{"iteration": 3}]})


def test_metrics_are_read_from_runs_and_from_records(tmp_path):
    running = tmp_path / "metrics.json"
    running.write_text('{"iteration": 19}\n{"iteration": 39}\n{"iterat')
    assert read_metrics(running) == [{"iteration": 19}, {"iteration": 39}]
    kept = tmp_path / "seed1_metrics.json.gz"
    kept.write_bytes(gzip.compress(json.dumps(LINES).encode()))
    assert read_metrics(kept) == LINES
