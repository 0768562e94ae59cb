"""Normalisation and divergence in one, against one after the other."""

import math

import pytest
import torch

from sssd.losses import PyramidDistillation, fused, js_divergence, normalised_js_divergence
from sssd.losses.normalisation import NORMS
from sssd.losses.pyramid import DISTANCES
from tests.losses import pyramids


def one_after_the_other(student, teacher, mask, norm, temperature):
    student, teacher = (NORMS[norm](x, mask) for x in (student, teacher))
    if mask is not None:
        student, teacher = (x.masked_fill(~mask[:, None], 0) for x in (student, teacher))
    return js_divergence(
        student, teacher, temperature=temperature, log_base=math.e, reduction="sum"
    )


def maps(shape=(2, 5, 3, 4), seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)
    )
    mask = torch.rand(shape[0], *shape[2:], generator=generator) < 0.7
    return student.requires_grad_(), teacher, mask


@pytest.fixture(params=[7, 25, 2**18], ids=lambda size: f"piece of {size}")
def piece(request, monkeypatch):
    """One channel's cells, two or three of the twelve cells, or all at once."""
    monkeypatch.setattr(fused, "_PIECE", request.param)


def padding(shape=(2, 3, 4)):
    """What batches have: the cells to the right of an image and below are padded."""
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[0, :2, :3] = mask[1, :3, :1] = True
    return mask


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("masked", ["", "padding", "scattered"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_value_and_gradient_are_those_of_one_after_the_other(piece, norm, masked, temperature):
    student, teacher, scattered = maps()
    mask = {"": None, "padding": padding(), "scattered": scattered}[masked]

    def at_once(x):
        return normalised_js_divergence(
            x, teacher, mask, across_channels=norm == "layer", temperature=temperature
        )

    value = at_once(student)
    expected = one_after_the_other(student, teacher, mask, norm, temperature)
    torch.testing.assert_close(value, expected, atol=1e-13, rtol=1e-12)
    (gradient,) = torch.autograd.grad(3 * value, student)
    (of_expected,) = torch.autograd.grad(3 * expected, student)
    torch.testing.assert_close(gradient, of_expected, atol=1e-14, rtol=1e-11)
    assert gradient.abs().max() > 1e-3
    assert torch.autograd.gradcheck(at_once, (student,))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 2, 1, 1), (2, 64, 7, 9), (0, 4, 3, 3)])
def test_odd_shapes(shape):
    student, teacher, mask = maps(shape)
    for chosen in (None, mask, torch.zeros_like(mask)):
        value = normalised_js_divergence(student, teacher, chosen)
        expected = one_after_the_other(student, teacher, chosen, "instance", 1.0)
        torch.testing.assert_close(value, expected, atol=1e-12, rtol=1e-12)
        (gradient,) = torch.autograd.grad(value, student)
        (of_expected,) = torch.autograd.grad(expected, student)
        torch.testing.assert_close(gradient, of_expected, atol=1e-13, rtol=1e-11)


@pytest.mark.parametrize("hidden", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("scattered", [False, True])
def test_padded_cells_change_nothing(piece, hidden, scattered):
    student, teacher, mask = maps()
    mask = mask if scattered else padding()
    clean = normalised_js_divergence(student, teacher, mask)
    (expected,) = torch.autograd.grad(clean, student)
    padded = ~mask[:, None].expand_as(student)
    dirty = student.detach().masked_fill(padded, hidden).requires_grad_()
    value = normalised_js_divergence(dirty, teacher.masked_fill(padded, -hidden), mask)
    (gradient,) = torch.autograd.grad(value, dirty)
    assert torch.equal(value, clean) and torch.equal(gradient, expected)
    assert not gradient[padded].any()


def test_equal_maps_have_no_distance_and_no_gradient(piece):
    student, _, mask = maps(dtype=torch.float32)
    value = normalised_js_divergence(student, student.detach().clone(), mask)
    (gradient,) = torch.autograd.grad(value, student)
    assert value == 0 and not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    student, teacher, mask = maps((2, 8, 5, 6), dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = normalised_js_divergence(student, teacher, mask)
    (gradient,) = torch.autograd.grad(value, student)
    wide = student.detach().float().requires_grad_()
    expected = normalised_js_divergence(wide, teacher.float(), mask)
    (of_expected,) = torch.autograd.grad(expected, wide)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    assert torch.equal(value, expected) and torch.equal(gradient, of_expected.to(dtype))
    limit = torch.full((1, 4, 2, 2), torch.finfo(dtype).max, dtype=dtype)
    limit[:, ::2] *= -1
    limit[..., 0] = 0
    value = normalised_js_divergence(limit.requires_grad_(), -limit.detach())
    (gradient,) = torch.autograd.grad(value, limit)
    if dtype == torch.float16:  # the variance of bfloat16's largest values is beyond float32
        assert torch.isfinite(value) and torch.isfinite(gradient).all()


def test_what_is_infinite_shows():
    student, teacher, _ = maps()
    student.data[0, 0, 0, 0] = math.inf
    assert normalised_js_divergence(student, teacher).isnan()


def test_nothing_but_the_map_and_one_more_is_kept_for_backward():
    student, teacher, mask = maps((2, 16, 32, 32), dtype=torch.float32)
    kept = {}

    def keep(x):
        kept[x.data_ptr()] = x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        normalised_js_divergence(student, teacher, mask)
    large = [pointer for pointer, size in kept.items() if size > student.numel() * 4 // 8]
    assert student.data_ptr() in large and len(large) == 2  # the other is the gradient
    assert sum(kept.values()) < 2.1 * student.numel() * 4


def test_without_a_gradient_nothing_is_kept():
    student, teacher, mask = maps((2, 16, 32, 32), dtype=torch.float32)
    with torch.no_grad():
        value = normalised_js_divergence(student, teacher, mask)
    assert value.item() == normalised_js_divergence(student, teacher, mask).item()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("level_reduction", ["mean", "sum", "elements"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_distillation_is_the_same_either_way(monkeypatch, norm, level_reduction, masked):
    masks = pyramids.padding_masks() if masked else None
    torch.manual_seed(3)
    module = PyramidDistillation(
        channels=3, norm=norm, level_reduction=level_reduction, level_weights=(1.0, 2.0, 0.5)
    ).double()
    student, teacher = pyramids.pyramid(seed=0), pyramids.pyramid(seed=1)
    at_once = module(student, teacher, masks)
    gradients = torch.autograd.grad(at_once, list(module.parameters()))
    monkeypatch.setitem(DISTANCES, "js", DISTANCES["js"]._replace(of_unnormalised=None))
    apart = module(student, teacher, masks)
    torch.testing.assert_close(at_once, apart, atol=1e-12, rtol=1e-10)
    for one, other in zip(
        gradients, torch.autograd.grad(apart, list(module.parameters())), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-9)
