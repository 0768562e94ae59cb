"""The picture of a comparison."""

import pytest

import sssd  # noqa: F401  (before Detectron2: it applies the compatibility layer)
from sssd.benchmark.chart import draw_chart, stacked_parts

BREAKDOWN = {
    "steps": 2,
    "step_seconds": 0.4,
    "parts": {"student forward": 0.1, "teacher": 0.05, "backward": 0.2, "rest": 0.05},
    "backward_of": {"student forward": 0.15, "teacher": 0.05},
}


def config(name, **more):
    return {
        "name": name,
        "step_seconds": 0.3,
        "ratio": {"median": 1.5, "q1": 1.4, "q3": 1.7},
        "memory": {"above": 2**20},
        "memory_ratio": 1.1,
        **more,
    }


def test_stacked_parts_add_up_to_the_ratio_of_the_step():
    stack = stacked_parts(config("A", breakdown=BREAKDOWN))
    assert [(part, backward) for part, backward, _ in stack] == [
        ("student forward", False),
        ("student forward", True),
        ("teacher", False),
        ("teacher", True),
        ("rest", False),
    ]
    assert sum(height for *_, height in stack) == pytest.approx(1.5)
    assert stack[1][2] == pytest.approx(1.5 * 0.15 / 0.4)


@pytest.mark.parametrize("more", [{}, {"breakdown": BREAKDOWN}])
def test_a_picture_is_written(tmp_path, more):
    path = tmp_path / "steps.png"
    unknown = config("B", **more, memory_ratio=None) if not more else config("B", **more)
    draw_chart(path, [config("A", **more), unknown], [config("A"), config("B")], "a device")
    assert path.read_bytes().startswith(b"\x89PNG")
