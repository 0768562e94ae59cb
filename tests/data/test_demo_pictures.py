import math

import numpy as np
import pytest

from sssd.data import demo_pictures
from sssd.data.demo_pictures import CLASS_NAMES, Dice, draw_picture

WINDOW = slice(0, 100), slice(0, 100)


def coverage(kind, half_u=30, half_v=30, turn=0):
    pose = demo_pictures._Pose(50, 50, half_u, half_v, turn)
    return demo_pictures._coverage(kind, pose, *WINDOW) / 9


@pytest.mark.parametrize(
    ("kind", "area"),  # in units of the half-axis squared
    [
        ("disc", math.pi),
        ("half_disc", math.pi / 2),
        ("ring", math.pi * (1 - (580 / 1024) ** 2)),
        ("block", (1800 / 1024) ** 2),
        ("triangle", 1000 * 1784 / 1024**2),
        # ten triangles between the centre, a tip and the notch 36 degrees further
        ("star", 10 * math.sin(math.pi / 5) / 2 * 421 / 1024),
        ("plus", (4 * 660 * 670 + 660**2) / 1024**2),
        ("corner", (700 * 1800 + 1100 * 700) / 1024**2),
    ],
)
@pytest.mark.parametrize("turn", [0, 5, 18])
def test_shapes_have_the_area_of_the_formula(kind, area, turn):
    assert coverage(kind, 30, 20, turn).sum() == pytest.approx(30 * 20 * area, rel=0.02)


def test_quarter_turn_swaps_the_axes():
    # 900 / 1024 of the half-axes 20 and 10 are 17.6 and 8.8 pixels around the centre at 50:
    # the first column that is covered by half is 33 (32.4 rounded up), the first row 42 or 41
    lying, standing = coverage("block", 20, 10, 0), coverage("block", 20, 10, 18)
    assert demo_pictures._tight_box(lying > 0.5) == (32, 41, 36, 18)
    assert demo_pictures._tight_box(standing > 0.5) == (41, 32, 18, 36)


def test_tight_box_by_hand():
    mask = np.zeros((5, 8), dtype=bool)
    mask[1, 6] = mask[3, 2] = True
    assert demo_pictures._tight_box(mask) == (2, 1, 5, 3)


def test_dice_follow_the_fixed_stream_of_pcg64():
    raw = [int(x) for x in np.random.PCG64(np.random.SeedSequence((1, 2))).random_raw(3)]
    dice = Dice(1, 2)
    assert [dice.integer(10, 19) for _ in range(3)] == [10 + x * 10 // 2**64 for x in raw]
    assert Dice(1, 2).integers(-5, 4, (3,)).tolist() == [-5 + (x >> 32) * 10 // 2**32 for x in raw]
    assert sorted(Dice(7).shuffled(range(50))) == list(range(50)) != Dice(7).shuffled(range(50))
    draws = Dice(3).integers(0, 2, (3000,))
    assert np.bincount(draws).min() > 900


def test_labels_are_the_shapes_drawn_and_each_can_be_seen(monkeypatch):
    painted = []
    paint = demo_pictures._paint

    def record(dice, canvas, kind, pose):
        painted.append((kind, pose))
        paint(dice, canvas, kind, pose)

    monkeypatch.setattr(demo_pictures, "_paint", record)
    overlapped = 0
    for seed in range(30):
        painted.clear()
        picture = draw_picture(Dice(seed))
        size = picture.pixels.shape[:2]
        masks = [
            (kind, demo_pictures._coverage(kind, pose, slice(0, size[0]), slice(0, size[1])) > 4)
            for kind, pose in painted
            if pose.half_v > 1  # a shape, not a line
        ]
        expected = [
            (CLASS_NAMES.index(kind), demo_pictures._tight_box(mask), int(mask.sum()))
            for kind, mask in masks
            if kind in CLASS_NAMES
        ]
        assert [(o.class_index, o.box, o.area) for o in picture.objects] == expected
        for index, (_, mask) in enumerate(masks):
            hidden = np.any([mask & later for _, later in masks[index + 1 :]], axis=0)
            assert 2 * hidden.sum() <= mask.sum()
            overlapped += hidden.sum() > 0.1 * mask.sum()
    assert overlapped > 5


def test_objects_stand_out_from_what_was_there(monkeypatch):
    # Drawn and not drawn differ clearly inside the box: no label for something invisible.
    paint, seen = demo_pictures._paint, []

    def compare(dice, canvas, kind, pose):
        window = pose.window(*canvas.shape[:2])
        before = canvas[window].copy()
        paint(dice, canvas, kind, pose)
        mask = demo_pictures._coverage(kind, pose, *window) > 4
        seen.append(abs(canvas[window] - before).sum(axis=2)[mask].mean())

    monkeypatch.setattr(demo_pictures, "_paint", compare)
    for seed in range(40):
        draw_picture(Dice(seed))
    assert min(seen) > 40
