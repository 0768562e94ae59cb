import pytest
import torch
import torch.nn.functional as F

from sssd.teacher.spatial_transformer import SpatialTransformer, max_over_objects, pointwise

VALID = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])


def transformer(dim=6, *, at_identity=False):
    torch.manual_seed(0)
    module = SpatialTransformer(dim)
    if not at_identity:
        torch.nn.init.normal_(module.matrix.weight, std=0.1)
    return module


def descriptors(dim=6, seed=1):
    return torch.randn(3, 3, dim, generator=torch.Generator().manual_seed(seed))


def test_starts_at_the_identity():
    x = descriptors()
    assert torch.equal(transformer(at_identity=True)(x, VALID), x)


def test_leaves_the_identity_with_training():
    # A start of zeros keeps the layers below still in the first step only.
    module, x = transformer(at_identity=True), descriptors()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    target = descriptors(seed=2)
    for step in range(2):
        optimizer.zero_grad()
        (module(x, VALID) - target).square().mean().backward()
        assert all(p.grad is not None for p in module.parameters())
        moving = [name for name, p in module.named_parameters() if p.grad.abs().max() > 0]
        assert ("local.0.weight" in moving) == (step == 1)
        optimizer.step()
    assert not torch.allclose(module(x, VALID), x)


def test_one_matrix_serves_all_objects_of_an_image():
    module, x = transformer(), descriptors()
    y = module(x, VALID)
    for image in range(3):
        summary = torch.zeros(1024)
        if VALID[image].any():
            summary = module.local(x[image])[VALID[image]].amax(0)
        matrix = module.matrix(module.glob(summary)).view(6, 6)
        torch.testing.assert_close(y[image], x[image] @ matrix)


def test_the_matrix_depends_on_all_objects_of_the_image_and_on_no_other():
    # Fault: a maximum over an axis of length 1 makes it depend on one object alone.
    module, x = transformer(), descriptors()
    before = module(x, VALID)
    x[0, 2] += 5
    after = module(x, VALID)
    assert (after[0, :2] - before[0, :2]).abs().max() > 1e-3
    assert torch.equal(after[1:], before[1:])


def test_what_stands_in_padding_has_no_influence():
    module, x = transformer(), descriptors()
    before = module(x, VALID)
    x[~VALID] = 1e3
    assert torch.equal(module(x, VALID)[VALID], before[VALID])


def test_permuting_the_objects_permutes_the_result():
    module, x = transformer(), descriptors()
    order = torch.tensor([2, 0, 1])
    permuted = module(x[:, order], VALID[:, order])
    torch.testing.assert_close(permuted, module(x, VALID)[:, order])


@pytest.mark.parametrize("dim", [1, 64])
def test_any_width(dim):
    assert transformer(dim)(descriptors(dim), VALID).shape == (3, 3, dim)


def test_maximum_by_hand():
    x = torch.tensor([[[1.0, 5.0], [2.0, 3.0]], [[0.5, 0.0], [9.0, 9.0]], [[9.0, 9.0], [9.0, 9.0]]])
    valid = torch.tensor([[True, True], [True, False], [False, False]])
    assert max_over_objects(x, valid).tolist() == [[2, 5], [0.5, 0], [0, 0]]


def test_pointwise_layers():
    torch.manual_seed(0)
    layers = pointwise(3, 8, 5)
    x = torch.randn(2, 4, 3)
    y = x
    for linear in (layers[0], layers[3]):
        y = F.layer_norm(F.linear(y, linear.weight, linear.bias), (linear.out_features,)).relu()
    torch.testing.assert_close(layers(x), y)
    # Each object by itself.
    torch.testing.assert_close(layers(x)[1, 2], layers(x[1, 2]))
    assert sum(p.numel() for p in layers.parameters()) == (3 * 8 + 8) + (8 * 5 + 5)
