import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sssd.losses import (
    DISTANCES,
    Distance,
    PyramidAdapter,
    PyramidDistillation,
    pyramid_distance,
)
from tests.losses import pyramids

SIZES = {"lateral0": (8, 12), "lateral1": (4, 6), "extra": (2, 3)}


def pyramid(**options):
    return pyramids.pyramid(**{"channels": 16, "sizes": SIZES, "dtype": torch.float32, **options})


def distillation(channels=16, **options):
    torch.manual_seed(7)
    return PyramidDistillation(channels=channels, **options)


def requiring_gradients(maps):
    return {level: x.requires_grad_() for level, x in maps.items()}


def gradients_of(module):
    return [p.grad for p in module.parameters()]


@pytest.mark.parametrize("channels", [16, 100])
def test_lgd_is_the_mean_squared_error_over_all_elements_of_all_levels(channels):
    # As LGD's code has it: both pyramids through InstanceNorm2d, flattened, concatenated.
    module = distillation(channels, distance="mse", level_reduction="elements")
    student, teacher = pyramid(seed=0, channels=channels), pyramid(seed=1, channels=channels)
    norm = nn.InstanceNorm2d(channels)
    adapted = torch.cat([norm(module.adapter(x)).flatten() for x in student.values()])
    target = torch.cat([norm(x).flatten() for x in teacher.values()])
    value = module(student, teacher)
    torch.testing.assert_close(value, F.mse_loss(adapted, target), atol=1e-6, rtol=1e-6)


def test_the_defaults_are_sssd():
    # Softmax over channels, base 2, mean over elements, root per level, mean over levels.
    module = distillation()
    student, teacher = pyramid(seed=0), pyramid(seed=1)
    roots = []
    for level in student:
        p = F.instance_norm(module.adapter(student[level])).softmax(1)
        q = F.instance_norm(teacher[level]).softmax(1)
        m = (p + q) / 2
        js = (p * (p / m).log2() + q * (q / m).log2()) / 2
        roots.append(js.mean().sqrt())
    torch.testing.assert_close(module(student, teacher), torch.stack(roots).mean())


def test_the_scale_and_offset_of_a_channel_do_not_count():
    # Instance normalisation takes them away on the teacher's side, as on the student's.
    module = distillation()
    student, teacher = pyramid(seed=0), pyramid(seed=1)
    moved = {level: x * torch.linspace(1, 9, 16)[:, None, None] + 5 for level, x in teacher.items()}
    expected = module(student, teacher)
    torch.testing.assert_close(module(student, moved), expected, atol=1e-5, rtol=1e-4)


def test_adapter():
    adapter = PyramidAdapter(256)
    # Three times 256 x 256 x 3 x 3 weights and 256 offsets: 1.77 million, as LGD's.
    assert sum(p.numel() for p in adapter.parameters()) == 3 * (256 * 256 * 9 + 256) == 1770240
    # A quarter as wide inside: 256 x 64 + 64 x 64 + 64 x 256 kernels.
    narrow = sum(p.numel() for p in PyramidAdapter(256, hidden_dim=64).parameters())
    assert narrow == (2 * 256 * 64 + 64 * 64) * 9 + 64 + 64 + 256 == 332160
    assert distillation(adapter_dim=3).adapter[2].weight.shape == (3, 3, 3, 3)


@pytest.mark.parametrize("hidden_dim", [0, 3])
def test_adapter_by_its_parts(hidden_dim):
    adapter = PyramidAdapter(5, hidden_dim)
    x = torch.randn(2, 5, 3, 4)
    first, second, third = (m for m in adapter if isinstance(m, nn.Conv2d))
    y = F.conv2d(x, first.weight, first.bias, padding=1).relu()
    y = F.conv2d(y, second.weight, second.bias, padding=1).relu()
    y = F.conv2d(y, third.weight, third.bias, padding=1)
    torch.testing.assert_close(adapter(x), y)


@pytest.mark.parametrize("distance", ["js", "kl", "mse"])
def test_gradient_reaches_student_and_adapter_and_never_the_teacher(distance):
    module = distillation(distance=distance)
    student = requiring_gradients(pyramid(seed=0))
    teacher = requiring_gradients(pyramid(seed=1))
    module(student, teacher).backward()
    assert all(x.grad is None for x in teacher.values())
    assert all(x.grad.abs().max() > 0 for x in student.values())
    assert all(x.abs().max() > 0 for x in gradients_of(module.adapter)[:-1])


def test_a_detached_student_trains_the_adapter_alone():
    module = distillation()
    student = requiring_gradients(pyramid(seed=0))
    teacher = pyramid(seed=1)
    expected = module(student, teacher)
    expected.backward()
    of_adapter = [x.clone() for x in gradients_of(module)]
    module.zero_grad()
    for x in student.values():
        x.grad = None
    value = module({level: x.detach() for level, x in student.items()}, teacher)
    value.backward()
    assert torch.equal(value, expected)
    assert all(x.grad is None for x in student.values())
    for x, y in zip(gradients_of(module), of_adapter, strict=True):
        assert torch.equal(x, y)


def test_masks_reach_normalisation_and_distance():
    # What lies on padding may be anything, once the adapter has passed.
    extent = {"lateral0": (5, 8), "lateral1": (3, 4), "extra": (2, 2)}
    masks = {}
    for level, (rows, columns) in extent.items():
        masks[level] = torch.zeros(2, *SIZES[level]).bool()
        masks[level][:, :rows, :columns] = True
    student, teacher = pyramid(seed=0), pyramid(seed=1)
    module = distillation()
    module.adapter = nn.Identity()

    def cropped(maps):
        return {
            level: maps[level][:, :, :rows, :columns] for level, (rows, columns) in extent.items()
        }

    expected = pyramid_distance(
        *({k: F.instance_norm(x) for k, x in cropped(m).items()} for m in (student, teacher))
    )
    for maps in (student, teacher):
        for level, x in maps.items():
            x.masked_fill_(~masks[level][:, None], 1e3)
    torch.testing.assert_close(module(student, teacher, masks), expected)


def test_mask_padding_off_ignores_the_masks():
    student, teacher = pyramid(seed=0), pyramid(seed=1)
    masks = {level: torch.zeros(2, *size).bool() for level, size in SIZES.items()}
    for mask in masks.values():
        mask[:, :1, :2] = True
    plain = distillation()(student, teacher)
    assert torch.equal(distillation(mask_padding=False)(student, teacher, masks), plain)
    assert not torch.equal(distillation()(student, teacher, masks), plain)


def test_single_cell_levels_train():
    # The shared fault of InstanceNorm2d: in training it raises for a level of one cell.
    sizes = {"p3": (4, 4), "p7": (1, 1)}
    student = requiring_gradients(pyramid(seed=0, sizes=sizes))
    teacher = pyramid(seed=1, sizes=sizes)
    module = distillation().train()
    value = module(student, teacher)
    value.backward()
    # A normalised cell is 0 on both sides: the level adds 0, and counts in the mean.
    fine = distillation()({"p3": student["p3"]}, {"p3": teacher["p3"]})
    torch.testing.assert_close(value, fine / 2)
    assert student["p7"].grad.abs().max() == 0
    assert all(x.isfinite().all() for x in gradients_of(module))


def test_an_empty_batch_gives_zero_and_gradients():
    module = distillation()
    masks = {level: torch.zeros(0, *size).bool() for level, size in SIZES.items()}
    value = module(pyramid(seed=0, images=0), pyramid(seed=1, images=0), masks)
    value.backward()
    assert value.item() == 0
    assert all(x is not None and x.isfinite().all() for x in gradients_of(module))


def test_equal_normalised_maps_give_zero_and_zero_gradients():
    # An adapter of zeros meets a teacher without contrast: both are uniform everywhere.
    module = distillation()
    nn.init.zeros_(module.adapter[-1].weight)
    nn.init.zeros_(module.adapter[-1].bias)
    teacher = {level: torch.ones_like(x) for level, x in pyramid(seed=1).items()}
    value = module(pyramid(seed=0), teacher)
    value.backward()
    assert value.item() == 0
    assert all((x == 0).all() for x in gradients_of(module))


@pytest.mark.parametrize("distance", ["js", "kl", "mse"])
def test_mixed_precision_computes_the_distance_in_single_precision(distance):
    module = distillation(distance=distance)
    student, teacher = pyramid(seed=0), pyramid(seed=1)
    expected = module(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = module(student, {level: x.bfloat16() for level, x in teacher.items()})
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=0.02)


def test_options_are_checked_when_it_is_made():
    with pytest.raises(ValueError, match="Unknown distance 'l1'"):
        PyramidDistillation(channels=8, distance="l1")
    with pytest.raises(ValueError, match="Unknown axis 'c'"):
        PyramidDistillation(channels=8, axis="c")
    with pytest.raises(ValueError, match=r"temperature must be positive, got 0\.0"):
        PyramidDistillation(channels=8, temperature=0.0)
    with pytest.raises(ValueError, match="got inf"):
        PyramidDistillation(channels=8, level_weights=(math.inf, 1.0))


def test_pyramids_must_match():
    module = distillation()
    student, teacher = pyramid(seed=0), pyramid(seed=1)
    short = {level: student[level] for level in ("lateral0", "extra")}
    for pair in ((short, teacher), (student, {level: teacher[level] for level in short})):
        with pytest.raises(ValueError, match="different levels: .*lateral1"):
            module(*pair)
    with pytest.raises(ValueError, match="no mask for level 'lateral0'"):
        module(student, teacher, {})


def test_the_printed_module_tells_its_options():
    text = repr(distillation(distance="kl", mask_padding=False))
    assert "distance=kl" in text and "mask_padding=False" in text


def test_layer_norm_instead_of_instance_norm():
    student, teacher = pyramid(seed=0), pyramid(seed=1)
    module = distillation(distance="mse", level_reduction="elements", norm="layer")

    def flat(maps):
        return torch.cat([F.group_norm(x, 1).flatten() for x in maps.values()])

    adapted = {level: module.adapter(x) for level, x in student.items()}
    expected = F.mse_loss(flat(adapted), flat(teacher))
    assert module(student, teacher).item() == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(ValueError, match=r"Unknown norm 'batch'; use one of instance, layer"):
        distillation(norm="batch")


def test_a_distance_of_ones_own(monkeypatch):
    def hellinger(student, teacher, *, dim, temperature, log_base, mask):
        p, q = ((x / temperature).softmax(dim) for x in (student, teacher))
        return 0.5 * (p.sqrt() - q.sqrt()).square().sum(dim)

    monkeypatch.setitem(DISTANCES, "hellinger", Distance(hellinger, root=True))
    a = {"p": torch.tensor([[1e-30, 1.0], [1.0, 1e-30]]).log()[None, :, None]}  # (1, 2, 1, 2)
    b = {"p": a["p"].flip(1)}  # disjoint distributions at both positions: the distance is 1
    value = pyramid_distance(a, b, distance="hellinger", reduction="per_distribution")
    assert value.item() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="use one of js, kl, mse, hellinger"):
        pyramid_distance(a, b, distance="other")
