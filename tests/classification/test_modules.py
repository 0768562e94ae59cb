"""The small parts between two networks: what they compute, and shapes that they cannot join."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sssd.classification.modules import (
    FactorDecoder,
    FactorEncoder,
    SectionHead,
    build_connector,
    build_regressor,
)


def random_maps(*shape, seed=0):
    return torch.randn(4, *shape, generator=torch.Generator().manual_seed(seed))


def kinds(module):
    return [type(layer) for layer in module]


@pytest.mark.parametrize(
    ("student", "teacher", "kernel"),
    [
        ((16, 8, 8), (32, 4, 4), (5, 5)),
        ((16, 8, 6), (32, 8, 4), (1, 3)),
        ((16, 4, 4), (8, 4, 4), (1, 1)),
    ],
)
def test_a_valid_regressor_shrinks_by_its_kernel(student, teacher, kernel):
    regressor = build_regressor(student, teacher, kind="valid")
    assert kinds(regressor) == [nn.Conv2d, nn.ReLU]
    maps = random_maps(*student)
    out = regressor(maps)
    assert regressor[0].kernel_size == kernel and out.shape == (4, *teacher)
    expected = F.conv2d(maps, regressor[0].weight, regressor[0].bias).clamp(min=0)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    ("student", "teacher", "convolution"),
    [
        ((16, 8, 8), (32, 4, 4), {"kernel_size": (3, 3), "stride": (2, 2), "padding": (1, 1)}),
        ((16, 7, 7), (32, 4, 4), {"kernel_size": (3, 3), "stride": (2, 2), "padding": (1, 1)}),
        ((16, 4, 4), (32, 8, 8), {"kernel_size": (4, 4), "stride": (2, 2), "padding": (1, 1)}),
        ((16, 8, 8), (32, 8, 8), {"kernel_size": (1, 1), "stride": (1, 1), "padding": (0, 0)}),
        ((16, 8, 8), (32, 5, 6), {"kernel_size": (4, 3), "stride": (1, 1), "padding": (0, 0)}),
    ],
)
def test_a_strided_regressor_halves_doubles_or_shrinks(student, teacher, convolution):
    regressor = build_regressor(student, teacher, kind="strided")
    doubles = teacher[1] > student[1]
    kind = nn.ConvTranspose2d if doubles else nn.Conv2d
    assert kinds(regressor) == [kind, nn.BatchNorm2d, nn.ReLU]
    assert {name: getattr(regressor[0], name) for name in convolution} == convolution
    maps = random_maps(*student)
    out = regressor(maps)
    assert out.shape == (4, *teacher)
    x = regressor[0](maps)
    normalised = (x - x.mean((0, 2, 3), True)) / (x.var((0, 2, 3), False, True) + 1e-5).sqrt()
    torch.testing.assert_close(out, normalised.clamp(min=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("student", "teacher", "kind", "message"),
    [
        ((16, 4, 4), (32, 8, 8), "valid", r"'valid' regressor .*\(16, 4, 4\) .*\(32, 8, 8\): choo"),
        ((16, 4, 4), (32, 6, 6), "strided", r"'strided' regressor cannot turn .*\(16, 4, 4\)"),
        ((16, 8, 4), (32, 4, 8), "strided", r"cannot turn .*\(16, 8, 4\) .*\(32, 4, 8\)"),
        ((16, 8, 8), (32, 4, 4), "linear", "regressor of the hint is 'linear': use 'valid' or 'st"),
        ((16,), (32, 4, 4), "valid", r"A regressor needs .*height, width\), got the shape \(16,\)"),
        ((16, 4, 4), (50, 32), "valid", r"A regressor needs layers .*got the shape \(50, 32\)"),
    ],
)
def test_a_regressor_that_cannot_be(student, teacher, kind, message):
    with pytest.raises(ValueError, match=message):
        build_regressor(student, teacher, kind=kind)


def test_a_connector_joins_unequal_widths_alone():
    maps = random_maps(8, 3, 5)
    assert build_connector((8, 3, 5), (8, 3, 5), ("a", "b"))(maps) is maps
    connector = build_connector((8, 3, 5), (6, 3, 5), ("a", "b"))
    assert kinds(connector) == [nn.Conv2d, nn.BatchNorm2d]
    assert [p.shape for p in connector.parameters()] == [(6, 8, 1, 1), (6,), (6,)]  # no bias
    x = torch.einsum("bchw,dc->bdhw", maps, connector[0].weight[:, :, 0, 0])
    normalised = (x - x.mean((0, 2, 3), True)) / (x.var((0, 2, 3), False, True) + 1e-5).sqrt()
    # No ReLU: the signs are what counts.
    torch.testing.assert_close(connector(maps), normalised, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((8, 4, 4), (8, 2, 2), r"student's 'a', .*\(8, 4, 4\), and the teacher's 'b', \(8, 2, 2\)"),
        ((8, 4, 2), (6, 4, 4), r"student's 'a', .*\(8, 4, 2\).* heights and widths must be equal"),
        ((8,), (8,), r"A connector needs layers .*got the shape \(8,\): name other layers"),
    ],
)
def test_a_connector_that_cannot_be(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        build_connector(student, teacher, ("a", "b"))


@pytest.mark.parametrize("norm", [False, True])
def test_the_factor_coders_mirror_each_other(norm):
    encoder, decoder = FactorEncoder(8, 4, norm=norm), FactorDecoder(4, 8, norm=norm)
    layers = [nn.BatchNorm2d, nn.LeakyReLU] if norm else [nn.LeakyReLU]
    assert kinds(encoder) == [nn.Conv2d, *layers] * 3
    assert kinds(decoder) == [nn.ConvTranspose2d, *layers] * 3
    # (out, in) of a convolution, (in, out) of a transposed one.
    widths = [m.weight.shape[:2] for m in encoder if isinstance(m, nn.Conv2d)]
    assert widths == [(8, 8), (4, 8), (4, 4)]
    mirrored = [m.weight.shape[:2] for m in decoder if isinstance(m, nn.ConvTranspose2d)]
    assert mirrored == widths[::-1]
    maps = random_maps(8, 5, 3)
    factors = encoder(maps)
    assert factors.shape == (4, 4, 5, 3) and decoder(factors).shape == maps.shape
    if not norm:
        for convolution in list(encoder)[::2]:
            x = F.conv2d(maps, convolution.weight, convolution.bias, padding=1)
            maps = torch.where(x > 0, x, 0.1 * x)
        torch.testing.assert_close(factors, maps)


@pytest.mark.parametrize(
    ("section", "deepest", "stride", "pooled"),
    [
        ((16, 8, 8), (64, 2, 2), (4, 4), (2, 2)),
        ((16, 8, 8), (64, 8, 8), (1, 1), (8, 8)),
        ((16, 7, 6), (64, 2, 3), (3, 2), (2, 3)),
        ((16, 4, 4), (3, 1, 1), (4, 4), (1, 1)),
    ],
)
def test_a_section_s_head_takes_on_the_shape_of_the_deepest(section, deepest, stride, pooled):
    head = SectionHead(section, deepest, 5, "layer1")
    narrow, strided, wide = (m for m in head.bottleneck if isinstance(m, nn.Conv2d))
    middle = max(deepest[0] // 4, 1)
    assert narrow.weight.shape == (middle, section[0], 1, 1)
    assert strided.weight.shape == (middle, middle, *stride) and strided.stride == stride
    assert wide.weight.shape == (deepest[0], middle, 1, 1)
    maps = random_maps(*section)
    inner = head.bottleneck(maps)
    assert inner.shape == (4, deepest[0], *pooled)
    logits, feature = head(maps)
    torch.testing.assert_close(feature, inner.mean((2, 3)))
    torch.testing.assert_close(logits, feature @ head.classifier.weight.T + head.classifier.bias)
    assert logits.shape == (4, 5)


@pytest.mark.parametrize(
    ("section", "deepest", "message"),
    [
        ((64, 2, 2), (16, 4, 4), r"'layer1' has .*\(64, 2, 2\), smaller than .*\(16, 4, 4\): name"),
        ((16, 4, 2), (16, 2, 4), r"'layer1' has .*\(16, 4, 2\), smaller than .*\(16, 2, 4\)"),
        ((50, 64), (64, 2, 2), r"A head on 'layer1' needs layers .*got the shape \(50, 64\)"),
        ((16, 4, 4), (64,), r"A head on 'layer1' needs layers .*got the shape \(64,\)"),
    ],
)
def test_a_section_s_head_that_cannot_be(section, deepest, message):
    with pytest.raises(ValueError, match=message):
        SectionHead(section, deepest, 5, "layer1")
