"""Polygons and bitmaps to cells: plain Python, one cell and one edge at a time, is the judge."""

import numpy as np
import pytest
import torch

from sssd.teacher import object_cells, pad_objects
from sssd.teacher.masks import bitmask_cells, polygon_cells
from tests.teacher.mask_scenes import rectangle
from tests.teacher.memory import NewBytes
from tests.teacher.scenes import STRIDES


def is_inside(x, y, polygons):
    """Whether any of the polygons has an odd number of edges to the left of a point."""
    for polygon in polygons:
        corners = polygon.reshape(-1, 2).tolist()
        crossed = 0
        for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
            if (y0 <= y) != (y1 <= y):
                crossed += x0 + (y - y0) / (y1 - y0) * (x1 - x0) <= x
        if crossed % 2:
            return True
    return False


def reference_polygon_cells(polygons, image_size, stride):
    height, width = (-(-length // stride) for length in image_size)
    cells = torch.zeros(len(polygons), height, width, dtype=torch.bool)
    for index, row, column in np.ndindex(*cells.shape):
        centre = (column + 0.5) * stride, (row + 0.5) * stride
        cells[index, row, column] = is_inside(*centre, polygons[index])
    return cells


def random_polygons(count, image_size, seed=0):
    """One to three for each object: convex, concave, crossing themselves, beyond the image."""
    random = np.random.default_rng(seed)

    def polygon():
        corners = random.uniform(-0.2, 1.2, (random.integers(3, 9), 2))
        return (corners * image_size[::-1]).ravel()

    return [[polygon() for _ in range(random.integers(1, 4))] for _ in range(count)]


# ---- Polygons. Stride 8 and 4 x 4 cells, unless said: their centres are at 4, 12, 20, 28 ----


def cells_of(*polygons, image_size=(32, 32), stride=8):
    """(row, column) of the cells of one object."""
    return polygon_cells([polygons], image_size, {"p": stride})["p"][0].nonzero().tolist()


def test_a_triangle_by_hand():
    # Below the diagonal from (0, 2) to (30, 32): row 1 (y = 12) is inside for x < 10.
    assert cells_of(np.array([0, 2, 0, 32, 30, 32.0])) == [
        [1, 0],
        [2, 0], [2, 1],
        [3, 0], [3, 1], [3, 2],
    ]  # fmt: skip


def test_a_ring_of_one_outline_has_a_hole():
    outer, inner = [0, 0, 32, 0, 32, 32, 0, 32, 0, 0], [8, 8, 24, 8, 24, 24, 8, 24, 8, 8]
    ring = cells_of(np.array([*outer, *inner], dtype=float))
    assert len(ring) == 12
    assert [1, 1] not in ring and [2, 2] not in ring


def test_the_polygons_of_an_object_add_up_where_they_overlap():
    # Not their parity: that would leave a hole of the cells 1 and 2.
    first, second = rectangle(1, 1, 23, 31), rectangle(9, 1, 31, 31)
    assert cells_of(first, second) == cells_of(rectangle(1, 1, 31, 31))
    assert cells_of(*[first] * 300) == cells_of(first)


def test_adjoining_polygons_share_no_cell_and_leave_none():
    # Outlines through the very centres: each centre on one belongs to one side.
    parts = [
        [np.array([4, 4, 28, 4, 12, 12.0])],
        [np.array([4, 4, 12, 12, 4, 28.0])],
        [np.array([28, 4, 28, 28, 4, 28, 12, 12.0])],
    ]
    parts_cells = polygon_cells(parts, (32, 32), {"p": 8})["p"]
    whole = polygon_cells([[rectangle(4, 4, 28, 28)]], (32, 32), {"p": 8})["p"][0]
    assert torch.equal(parts_cells.sum(0), whole.long())
    assert whole.nonzero().amax(0).tolist() == [2, 2]  # upper and left side alone


def test_polygons_beyond_the_image():
    assert cells_of(rectangle(-100, -50, 13, 1000)) == [
        [row, c] for row in range(4) for c in (0, 1)
    ]
    assert cells_of(rectangle(40, 40, 90, 90)) == []
    assert cells_of(rectangle(-9, -9, -1, -1)) == []


@pytest.mark.parametrize("image_size", [(64, 96), (37, 50), (5, 7)])
@pytest.mark.parametrize("seed", range(3))
def test_polygons_equal_the_reference(image_size, seed):
    polygons = random_polygons(12, image_size, seed)
    polygons[5] = []  # an object without any
    cells = polygon_cells(polygons, image_size, STRIDES)
    for level, stride in STRIDES.items():
        expected = reference_polygon_cells(polygons, image_size, stride)
        assert torch.equal(cells[level], expected)
        assert expected.any() or image_size == (5, 7)


def test_rectangles_are_boxes():
    # Boxes with corners off the grid: on it, a box takes all its sides and a polygon two.
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(30, 2, generator=generator) * 50
    boxes = torch.cat([corner, corner + 16 + torch.rand(30, 2, generator=generator) * 30], dim=1)
    objects = pad_objects([boxes], [torch.zeros(30).long()], [(80, 96)], num_classes=1)
    polygons = [[rectangle(*box)] for box in boxes.tolist()]
    cells = polygon_cells(polygons, (80, 96), {"p2": 4, "p4": 16})
    for level, stride in {"p2": 4, "p4": 16}.items():
        size = tuple(cells[level].shape[1:])
        assert torch.equal(cells[level], object_cells(objects, size, stride)[0])


def test_images_without_objects_or_polygons():
    assert polygon_cells([], (32, 24), {"p": 8})["p"].shape == (0, 4, 3)
    assert not polygon_cells([[], []], (32, 24), {"p": 8})["p"].any()


def test_polygons_of_a_crowd_take_memory_for_cells_and_not_for_pixels():
    image_size, strides = (800, 1344), {"p3": 8, "p5": 32}
    number_of_cells = 100 * 168
    largest = {}
    for count in (100, 200):
        polygons = random_polygons(count, image_size)
        with NewBytes() as made:
            polygon_cells(polygons, image_size, strides)
        largest[count] = made.largest
    # Two bytes a cell, and one column more.
    assert largest[200] <= 200 * 2 * number_of_cells * 1.01
    assert largest[200] <= 2 * largest[100]


# ---- Bitmaps ----


def test_bitmasks_are_sampled_at_the_centres():
    bitmasks = torch.zeros(2, 13, 8, dtype=torch.bool)
    bitmasks[0, 2, 6] = True  # the centre of cell (0, 1) at stride 4
    bitmasks[1, 10, 2] = True  # that of cell (2, 0)
    cells = bitmask_cells(bitmasks, {"p": 4})["p"]
    assert [x.nonzero().tolist() for x in cells] == [[[0, 1]], [[2, 0]]]
    # Row 3 has its centre at 14, beyond the image's 13 rows.
    assert cells.shape == (2, 3, 2)


def test_bitmasks_at_odd_strides_and_at_the_far_border():
    # Centres at 1.5, 4.5, 7.5: in the middle of the pixels 1, 4, 7.
    one = torch.zeros(1, 3, 10, dtype=torch.bool)
    one[0, 1, [1, 7]] = True
    assert bitmask_cells(one, {"p": 3})["p"].tolist() == [[[True, False, True]]]
    # An image of 4 x 4 at stride 8: the centre of its cell is its corner, and on it.
    corner = torch.zeros(1, 4, 4, dtype=torch.bool)
    corner[0, 3, 3] = True
    assert bitmask_cells(corner, {"p": 8})["p"].tolist() == [[[True]]]
