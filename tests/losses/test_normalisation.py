import math

import pytest
import torch
import torch.nn.functional as F

from sssd.losses import instance_norm, layer_norm
from tests.losses.pyramids import padding_masks, pyramid


def torch_layer_norm(x):
    return F.group_norm(x, num_groups=1)


BOTH = pytest.mark.parametrize(
    ("norm", "of_torch"), [(instance_norm, F.instance_norm), (layer_norm, torch_layer_norm)]
)


@BOTH
def test_norm_equals_torch(norm, of_torch):
    x = pyramid(seed=0)["p3"] * 3 + 5
    torch.testing.assert_close(norm(x), of_torch(x))
    half = x.half()
    assert norm(half).dtype == torch.float32
    torch.testing.assert_close(norm(half), of_torch(half.float()))


@BOTH
@pytest.mark.parametrize("hidden", [0.0, 1e4, math.nan])
def test_masked_norm_equals_that_of_the_crop(norm, of_torch, hidden):
    x, mask = pyramid(seed=0)["p3"], padding_masks()["p3"]
    crops = [(0, 4, 4), (1, 3, 6)]
    expected = [of_torch(x[None, i, :, :rows, :columns]) for i, rows, columns in crops]
    x[~mask[:, None].expand_as(x)] = hidden
    normalised = norm(x, mask)
    assert normalised.isfinite().all()
    for (i, rows, columns), y in zip(crops, expected, strict=True):
        torch.testing.assert_close(normalised[None, i, :, :rows, :columns], y)
    everywhere = torch.ones_like(mask)
    x = pyramid(seed=0)["p3"]
    torch.testing.assert_close(norm(x, everywhere), of_torch(x))


@BOTH
@pytest.mark.parametrize("masked", [False, True])
def test_norm_gradients(norm, of_torch, masked):
    x = pyramid(seed=0, images=2, channels=2, sizes={"p": (2, 3)})["p"].requires_grad_()
    extents = [{"p": (2, 2)}, {"p": (1, 3)}]
    mask = padding_masks(extents, {"p": (2, 3)})["p"] if masked else None
    assert torch.autograd.gradcheck(lambda x: norm(x, mask), x)


def test_instance_norm_of_a_single_cell_is_zero():
    x = torch.tensor([3.0, -2e4])[None, :, None, None].requires_grad_()
    for mask in (None, torch.ones(1, 1, 1, dtype=torch.bool)):
        normalised = instance_norm(x, mask)
        assert normalised.abs().max() == 0
        (grad,) = torch.autograd.grad(normalised.sum(), x)
        assert grad.abs().max() == 0


def test_a_constant_map_has_a_bounded_slope():
    x = torch.full((1, 2, 4, 4), 7.0, requires_grad=True)
    normalised = instance_norm(x)
    assert normalised.abs().max() == 0
    (grad,) = torch.autograd.grad(normalised[0, 0, 0, 0], x)
    assert grad.abs().max() <= 1 / math.sqrt(1e-5)
