"""Padded cells of a batch take no part in the distance (``masks`` of ``pyramid_distance``)."""

import itertools
import math

import pytest
import torch

from sssd.losses import pyramid_distance
from sssd.losses.pyramid import AXES, DISTANCES, REDUCTIONS
from tests.losses.pyramids import SIZES, padding_masks, pyramid

COMBINATIONS = list(itertools.product(DISTANCES, AXES, REDUCTIONS))


@pytest.mark.parametrize("hidden", [0.0, 1e4, math.nan])
@pytest.mark.parametrize(("distance", "axis", "reduction"), COMBINATIONS)
def test_padded_cells_change_nothing(distance, axis, reduction, hidden):
    options = {"distance": distance, "axis": axis, "reduction": reduction}
    extent = {"p3": (3, 4), "p4": (2, 2), "top": (1, 1)}
    masks = padding_masks([extent, extent])
    student, teacher = pyramid(seed=0), pyramid(seed=1)

    def cropped(maps):
        return {
            level: maps[level][:, :, :rows, :columns] for level, (rows, columns) in extent.items()
        }

    inner = {level: x.clone().requires_grad_() for level, x in cropped(student).items()}
    expected = pyramid_distance(inner, cropped(teacher), **options)
    expected.backward()

    for level in SIZES:
        outside = ~masks[level][:, None].expand_as(student[level])
        student[level][outside] = hidden
        teacher[level][outside] = -hidden
        student[level].requires_grad_()
    value = pyramid_distance(student, teacher, masks=masks, **options)
    value.backward()
    torch.testing.assert_close(value, expected)
    gradients = {level: x.grad for level, x in student.items()}
    for level, x in cropped(gradients).items():
        torch.testing.assert_close(x, inner[level].grad)
        outside = ~masks[level][:, None].expand_as(student[level])
        assert (gradients[level][outside] == 0).all()


@pytest.mark.parametrize(("distance", "axis", "reduction"), COMBINATIONS)
def test_an_image_that_is_all_padding_does_not_count(distance, axis, reduction):
    options = {"distance": distance, "axis": axis, "reduction": reduction}
    student, teacher = pyramid(seed=0), pyramid(seed=1)
    masks = {level: torch.ones(2, *size).bool() for level, size in SIZES.items()}
    for mask in masks.values():
        mask[1] = False
    first = [{level: x[:1] for level, x in maps.items()} for maps in (student, teacher)]
    value = pyramid_distance(student, teacher, masks=masks, **options)
    torch.testing.assert_close(value, pyramid_distance(*first, **options))
