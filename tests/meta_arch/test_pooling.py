"""RoIAlign as a sum over cells, against torchvision's."""

import pytest
import torch
from torchvision.ops import roi_align as torchvision_roi_align

import sssd  # noqa: F401  (before Detectron2: it applies the compatibility layer)

# isort: split
from detectron2.layers import ROIAlign

from sssd.meta_arch import pooling
from sssd.meta_arch.pooling import pooled_over_cells, roi_align
from tests.detectors import build, losses_at, tiny_config, training_batch

SCALE = 0.25
# x1 y1 x2 y2 in pixels, of maps of 9 x 13 cells: 36 x 52 pixels.
REGIONS = [
    (3.0, 2.0, 30.0, 21.0),
    (0.0, 0.0, 52.0, 36.0),  # all of it
    (10.3, 7.7, 11.0, 8.1),  # within one cell
    (-30.0, -25.0, 8.0, 9.0),  # beyond the upper left corner
    (44.0, 30.0, 90.0, 80.0),  # beyond the lower right one
    (-90.0, -90.0, -40.0, -50.0),  # outside
    (1.0, 20.0, 51.0, 20.5),  # flat
    (20.0, 20.0, 20.0, 20.0),  # without extent
    (30.0, 20.0, 12.0, 9.0),  # turned over
]


def scene(dtype=torch.float64, num_images=2):
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(num_images, 5, 9, 13, generator=generator, dtype=torch.float64)
    corner = torch.rand(40, 2, generator=generator, dtype=torch.float64) * 60 - 8
    side = torch.rand(40, 2, generator=generator, dtype=torch.float64) * 40
    boxes = torch.cat(
        [torch.tensor(REGIONS, dtype=torch.float64), torch.cat([corner, corner + side], 1)]
    )
    image = torch.randint(num_images, (len(boxes), 1), generator=generator)
    return maps.to(dtype).requires_grad_(), torch.cat([image, boxes], 1).to(dtype)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2, 3])
@pytest.mark.parametrize("output_size", [7, (2, 3), 1])
@pytest.mark.parametrize("regions_at_once", [256, 7])
def test_value_and_gradient_are_torchvisions(
    aligned, sampling_ratio, output_size, regions_at_once, monkeypatch
):
    monkeypatch.setattr(pooling, "_REGIONS", regions_at_once)
    maps, regions = scene()
    options = {
        "output_size": output_size,
        "spatial_scale": SCALE,
        "sampling_ratio": sampling_ratio,
        "aligned": aligned,
    }
    pooled = roi_align(maps, regions, **options)
    expected = torchvision_roi_align(maps, regions, **options)
    torch.testing.assert_close(pooled, expected, atol=1e-13, rtol=1e-12)
    weight = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1)).double()
    (gradient,) = torch.autograd.grad((pooled * weight).sum(), maps)
    (of_expected,) = torch.autograd.grad((expected * weight).sum(), maps)
    torch.testing.assert_close(gradient, of_expected, atol=1e-12, rtol=1e-12)
    assert gradient.abs().max() > 0.1


def test_a_constant_map_is_pooled_to_its_constant():
    # By hand: the samples of a region within the map have weights that sum to 1.
    maps = torch.full((1, 2, 9, 13), 3.0)
    regions = torch.tensor([[0, 3.0, 2.0, 30.0, 21.0]])
    pooled = roi_align(maps, regions, output_size=2, spatial_scale=SCALE)
    torch.testing.assert_close(pooled, torch.full((1, 2, 2, 2), 3.0))


def test_one_bin_by_hand():
    # 4 x 4 pixels are one cell, at 8..12: between the centres of the cells 1.5 and 2.5 lies cell 2.
    maps = torch.arange(117.0).view(1, 1, 9, 13)
    regions = torch.tensor([[0, 8.0, 8.0, 12.0, 12.0]])
    pooled = roi_align(maps, regions, output_size=1, spatial_scale=SCALE)
    assert pooled.item() == 2 * 13 + 2
    half_further = roi_align(
        maps, torch.tensor([[0, 10.0, 8.0, 14.0, 12.0]]), output_size=1, spatial_scale=SCALE
    )
    assert half_further.item() == 2 * 13 + 2.5


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_no_region_gives_nothing_and_a_gradient_of_zeros(layout):
    maps, regions = scene(torch.float32)
    maps = maps.detach().contiguous(memory_format=layout).requires_grad_()
    pooled = roi_align(maps, regions[:0], output_size=7, spatial_scale=SCALE)
    assert pooled.shape == (0, 5, 7, 7)
    pooled.sum().backward()
    assert maps.grad.shape == maps.shape and not maps.grad.any()


def test_the_layout_of_the_map_does_not_count():
    maps, regions = scene(torch.float32)
    last = maps.detach().contiguous(memory_format=torch.channels_last)
    options = {"output_size": 7, "spatial_scale": SCALE}
    assert torch.equal(roi_align(maps, regions, **options), roi_align(last, regions, **options))


@pytest.mark.parametrize(
    "detector", ["faster_rcnn", "cascade_mask_rcnn", "keypoint_rcnn", "panoptic_fpn"]
)
def test_the_teachers_pass_has_the_losses_and_gradients_of_torchvisions_pooling(
    detector, monkeypatch
):
    def run():
        model = build(tiny_config(detector=detector))
        losses, _ = losses_at(model, batch=training_batch(detector=detector))
        sum(losses.values()).backward()
        return losses, {name: p.grad for name, p in model.named_parameters()}

    sizes = []
    monkeypatch.setattr(
        pooling, "roi_align", lambda *a, **kw: sizes.append(len(a[1])) or roi_align(*a, **kw)
    )
    losses, gradients = run()
    assert sum(sizes) > 0
    monkeypatch.setattr(pooling, "_quicker", lambda layer: layer.forward)
    expected, of_expected = run()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, atol=1e-6, rtol=1e-5)
        if not name.startswith("teacher_") and name != "loss_distill":
            assert torch.equal(losses[name], value), name  # the student's pooling is the stock one
    for name, gradient in of_expected.items():
        scale = gradient.abs().max().clamp(min=1e-3)
        assert (gradients[name] - gradient).abs().max() < 1e-4 * scale, name


def test_the_layers_have_their_own_forward_afterwards():
    model = build(tiny_config())
    with pytest.raises(RuntimeError, match="in the middle"), pooled_over_cells(model.student):
        raise RuntimeError("in the middle")
    assert not any("forward" in vars(module) for module in model.student.modules())


def test_half_precision_is_torchvisions_under_autocast():
    model = build(tiny_config())
    pooler = model.student.roi_heads.box_pooler.level_poolers[0]
    maps, regions = scene(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = pooler(maps, regions)
        with pooled_over_cells(model.student):
            pooled = pooler(maps, regions)
    assert pooled.dtype == expected.dtype == torch.bfloat16
    # Sums are rounded to the same 8 bits, from the one side or from the other.
    torch.testing.assert_close(pooled, expected, atol=1e-6, rtol=2**-7)


def test_maps_of_half_precision_are_pooled_where_the_regions_are():
    # bfloat16 has 4 pixels between neighbours at 1001.3.
    class Pooler(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.align = ROIAlign((7, 7), SCALE, 0, aligned=True)

    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(1, 5, 40, 300, generator=generator).bfloat16()
    regions = torch.tensor([[0, 1001.3, 33.3, 1025.7, 60.1]])
    pooler = Pooler()
    exact = pooler.align(maps.float(), regions)
    with pooled_over_cells(pooler):
        pooled = pooler.align(maps, regions)
    assert pooled.dtype == torch.bfloat16
    torch.testing.assert_close(pooled.float(), exact, atol=0.02, rtol=0.02)
    rounded = pooler.align(maps.float(), regions.bfloat16().float())
    assert (rounded - exact).abs().max() > 0.5  # what it would be otherwise
