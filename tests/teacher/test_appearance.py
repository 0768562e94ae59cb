import pytest
import torch
import torch.nn.functional as F

from sssd.teacher.appearance import AppearanceEncoder, pool_over_cells
from sssd.teacher.objects import object_cells
from tests.teacher.scenes import reference_pooling, scene


def test_pooling_by_hand():
    # A 1 x 3 map with the values 1, 2, 6: cells 0 and 2 have the mean 3.5.
    features = torch.tensor([1.0, 2.0, 6.0]).view(1, 1, 1, 3)
    cells = torch.tensor([[True, False, True], [False, True, False], [False, False, False]])
    assert pool_over_cells(features, cells[None, :, None]).flatten().tolist() == [3.5, 2, 0]


@pytest.mark.parametrize("stride", [8, 16, 64])
def test_pooling_equals_loops(stride):
    objects = scene(8, 3, 0)
    size = (-(-80 // stride), -(-96 // stride))
    features = torch.randn(3, 5, *size, generator=torch.Generator().manual_seed(0))
    cells = object_cells(objects, size, stride)
    pooled = pool_over_cells(features, cells)
    for image in range(3):
        torch.testing.assert_close(pooled[image], reference_pooling(features[image], cells[image]))
    assert (pooled[~objects.valid] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_objects_do_not_overflow_half_precision(dtype):
    # The sum over 300 x 300 cells of 10 is 900000; float16 ends at 65504.
    features = torch.full((1, 2, 300, 300), 10, dtype=dtype)
    pooled = pool_over_cells(features, torch.ones(1, 1, 300, 300, dtype=torch.bool))
    assert pooled.dtype == dtype
    torch.testing.assert_close(pooled.float(), torch.full((1, 1, 2), 10.0), rtol=0.01, atol=0)


def test_pooling_gradients():
    features = torch.randn(2, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    cells = torch.rand(2, 3, 2, 3, generator=torch.Generator().manual_seed(0)) > 0.5
    cells[1, 2] = False
    assert torch.autograd.gradcheck(lambda x: pool_over_cells(x, cells), features)


@pytest.mark.parametrize(("channels", "embed_dim"), [(16, 24), (100, 104)])
def test_encoder_is_convolution_group_norm_relu_and_mean(channels, embed_dim):
    torch.manual_seed(0)
    module = AppearanceEncoder(channels=channels, embed_dim=embed_dim)
    features = torch.randn(2, channels, 10, 12)
    cells = object_cells(scene(4, 2), (10, 12), 8)
    convolution = module.projection[0]
    x = F.conv2d(features, convolution.weight, convolution.bias, padding=1)
    # GroupNorm(1): one mean and variance for all channels and cells of an image.
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (x - mean) / ((x - mean).square().mean((1, 2, 3), keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(
        module(features, cells), pool_over_cells(x.relu(), cells), rtol=1e-4, atol=1e-5
    )
    assert sum(p.numel() for p in module.parameters()) == 9 * channels * embed_dim + embed_dim


def test_single_cell_level_in_training():
    module = AppearanceEncoder(channels=4, embed_dim=8).train()
    features = torch.randn(1, 4, 1, 1, requires_grad=True)
    module(features, torch.ones(1, 2, 1, 1, dtype=torch.bool)).square().sum().backward()
    assert features.grad.isfinite().all()


def test_images_do_not_mix():
    torch.manual_seed(0)
    module = AppearanceEncoder(channels=4, embed_dim=8)
    features, cells = torch.randn(2, 4, 10, 12), object_cells(scene(4, 2), (10, 12), 8)
    before = module(features, cells)
    features[1] *= -2
    after = module(features, cells)
    assert torch.equal(after[0], before[0])
    assert not torch.allclose(after[1, :2], before[1, :2])
