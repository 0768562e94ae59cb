import pytest
import torch
import torch.nn.functional as F

from sssd.teacher import fusion
from sssd.teacher.fusion import MapPainter, RelationAdapter, paint, paint_and_convolve
from sssd.teacher.objects import object_cells
from tests.teacher.scenes import reference_painting, scene

VALID = torch.tensor([[True, True, True], [True, True, False], [False, False, False]])


def adapter(embed_dim=8, num_heads=2, label_residual=False):
    torch.manual_seed(0)
    module = RelationAdapter(
        embed_dim=embed_dim, num_heads=num_heads, label_residual=label_residual
    )
    torch.nn.init.normal_(module.attention.in_proj_bias, std=0.5)
    return module


def embeddings(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention_by_hand(module, queries, labels):
    """Of one image on one level, without padding: softmax(q k / sqrt(d)) v for each head."""
    width, heads = queries.shape[1], module.attention.num_heads
    labels = module.label_projection(labels)
    weights = module.attention.in_proj_weight.split(width)
    biases = module.attention.in_proj_bias.split(width)
    q, k, v = (
        F.linear(x, w, b).unflatten(1, (heads, -1))
        for x, w, b in zip((queries, labels, labels), weights, biases, strict=True)
    )
    result = torch.empty_like(q)
    for head in range(heads):
        scores = q[:, head] @ k[:, head].T / (width // heads) ** 0.5
        result[:, head] = scores.softmax(dim=1) @ v[:, head]
    return module.attention.out_proj(result.flatten(1))


# ---- Attention ----


@pytest.mark.parametrize("training", [True, False])
def test_attention_equals_that_of_each_image_and_level_alone(training):
    module = adapter().train(training)
    appearance, labels = embeddings(4, 3, 3, 8), embeddings(3, 3, 8, seed=2)
    with torch.set_grad_enabled(training):
        fused = module(appearance, labels, VALID)
    for level in range(4):
        for image in range(2):
            on = VALID[image]
            expected = attention_by_hand(module, appearance[level, image, on], labels[image, on])
            torch.testing.assert_close(fused[level, image, on], expected)


def test_label_residual_adds_each_objects_own_projected_label_on_every_level():
    plain, residual = adapter(), adapter(label_residual=True)
    appearance, labels = embeddings(4, 3, 3, 8), embeddings(3, 3, 8, seed=2)
    expected = plain(appearance, labels, VALID) + plain.label_projection(labels)
    torch.testing.assert_close(residual(appearance, labels, VALID), expected)


def test_attention_never_crosses_images():
    # Fault: one attention over the objects of the whole batch.
    module = adapter()
    appearance, labels = embeddings(2, 3, 3, 8), embeddings(3, 3, 8, seed=2)
    before = module(appearance, labels, VALID)
    appearance[:, 1] += 1
    labels[1] -= 2
    after = module(appearance, labels, VALID)
    assert torch.equal(after[:, 0], before[:, 0])
    assert not torch.allclose(after[:, 1], before[:, 1])


def test_attention_does_not_see_padding():
    module = adapter()
    appearance, labels = embeddings(2, 3, 3, 8), embeddings(3, 3, 8, seed=2)
    before = module(appearance, labels, VALID)
    appearance[:, ~VALID] = 50.0
    labels[~VALID] = -50.0
    assert torch.equal(module(appearance, labels, VALID)[:, VALID], before[:, VALID])


def test_what_attention_is_asked_for(monkeypatch):
    module, calls = adapter(), []
    original = F.multi_head_attention_forward

    def recording(query, key, *args, **kwargs):
        calls.append((tuple(query.shape), tuple(key.shape), kwargs["key_padding_mask"]))
        return original(query, key, *args, **kwargs)

    monkeypatch.setattr(F, "multi_head_attention_forward", recording)
    module(embeddings(4, 3, 3, 8), embeddings(3, 3, 8), VALID)
    ((queries, keys, ignored),) = calls
    # The keys of a query are the slots of its own image, not all objects of the batch:
    # (objects, levels x images, width).
    assert queries == keys == (3, 12, 8)
    # Older versions of torch make NaN of a softmax over nothing: no image ignores all its slots.
    assert not (ignored != 0).all(dim=1).any()


def test_an_image_without_objects_gives_finite_values_and_gradients():
    module = adapter()
    appearance, labels = embeddings(2, 3, 3, 8).requires_grad_(), embeddings(3, 3, 8, seed=2)
    fused = module(appearance, labels, VALID)
    assert fused.isfinite().all()
    fused[:, VALID].sum().backward()
    assert appearance.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_width_and_heads_must_fit():
    with pytest.raises(ValueError, match="width 100 is not a multiple of its 8 attention heads"):
        RelationAdapter(embed_dim=100, num_heads=8)


# ---- Painting ----


def test_painting_by_hand():
    # A 1 x 3 map; object 0 on cells 0 and 1, object 1 on cell 1: 2, (2 + 6) / 2, 0.
    values = torch.tensor([[[2.0], [6.0]]])
    cells = torch.tensor([[True, True, False], [False, True, False]])[None, :, None]
    assert paint(values, cells).tolist() == [[[[2, 4, 0]]]]


def test_two_identical_objects_paint_what_one_paints():
    # Fault: the embeddings of overlapping objects add up.
    value, cells = embeddings(1, 1, 6), torch.rand(1, 1, 4, 5) > 0.5
    once = paint(value, cells)
    for times in (2, 3, 10):
        again = paint(value.repeat(1, times, 1), cells.repeat(1, times, 1, 1))
        torch.testing.assert_close(again, once)


@pytest.mark.parametrize("stride", [8, 16, 64])
def test_painting_equals_loops(stride):
    objects = scene(8, 3, 0)
    size = (-(-80 // stride), -(-96 // stride))
    values, cells = embeddings(3, 8, 5), object_cells(objects, size, stride)
    painted = paint(values, cells)
    for image in range(3):
        torch.testing.assert_close(painted[image], reference_painting(values[image], cells[image]))
    assert (painted[2] == 0).all()


def test_painting_gradients():
    values = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    cells = torch.rand(2, 3, 2, 3, generator=torch.Generator().manual_seed(0)) > 0.5
    cells[1, 2] = False
    assert torch.autograd.gradcheck(lambda x: paint(x, cells), values)


@pytest.mark.parametrize("num_objects", [1, 3, 4, 5, 40])  # up to 4 of a width of 16 are few
def test_convolving_what_is_painted_without_painting_it(num_objects):
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(16, 6, 3, padding=1).double()
    values = torch.randn(3, num_objects, 16, dtype=torch.float64, requires_grad=True)
    objects = scene(num_objects, num_objects // 2, 0)
    cells = object_cells(objects, (10, 12), 8)
    inputs = (values, *convolution.parameters())
    weight = torch.randn(3, 6, 10, 12, dtype=torch.float64)

    convolved = paint_and_convolve(values, cells, convolution)
    expected = convolution(paint(values, cells))
    torch.testing.assert_close(convolved, expected, atol=1e-13, rtol=1e-12)
    gradients = torch.autograd.grad((convolved * weight).sum(), inputs)
    of_expected = torch.autograd.grad((expected * weight).sum(), inputs)
    for gradient, other in zip(gradients, of_expected, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize(("num_objects", "paints"), [(64, False), (65, True)])
def test_the_painted_map_is_made_for_many_objects_only(num_objects, paints, monkeypatch):
    painted = []
    monkeypatch.setattr(fusion, "paint", lambda *x: painted.append(x) or paint(*x))
    paint_and_convolve(
        torch.zeros(1, num_objects, 256),
        torch.zeros(1, num_objects, 2, 2, dtype=torch.bool),
        torch.nn.Conv2d(256, 4, 3, padding=1),
    )
    assert bool(painted) == paints


@pytest.mark.parametrize("with_context", [False, True])
@pytest.mark.parametrize(("refinement_dim", "width"), [(0, 6), (2, 2)])
def test_painter_by_its_parts(with_context, refinement_dim, width):
    torch.manual_seed(0)
    module = MapPainter(
        channels=6, embed_dim=8, with_context=with_context, refinement_dim=refinement_dim
    )
    assert module.canvas.weight.shape == (width, 8, 3, 3)
    values = embeddings(2, 5, 8)
    cells = object_cells(scene(5, 4), (10, 12), 8)
    canvas = paint(module.object_projection(values), cells)
    if with_context:
        # The last slot is the context: spread over the whole map, and not painted.
        canvas = paint(module.object_projection(values[:, :4]), cells[:, :4])
    x = F.conv2d(canvas, module.canvas.weight, module.canvas.bias, padding=1)
    if with_context:
        x = x + module.context_projection(values[:, 4])[..., None, None]
    x = x.relu()
    convolutions = [m for m in module.refinement if isinstance(m, torch.nn.Conv2d)]
    for index, convolution in enumerate(convolutions):
        x = x if index == 0 else x.relu()
        x = F.group_norm(F.conv2d(x, convolution.weight, convolution.bias, padding=1), 1)
    assert len(convolutions) == 3
    torch.testing.assert_close(module(values, cells), x)
    assert (x < 0).any()  # no ReLU at the end: a pyramid has both signs


def test_single_cell_level_in_training():
    module = MapPainter(channels=4, embed_dim=8, with_context=False).train()
    values = embeddings(1, 1, 8).requires_grad_()
    module(values, torch.ones(1, 1, 1, 1, dtype=torch.bool)).square().sum().backward()
    assert values.grad.isfinite().all()
