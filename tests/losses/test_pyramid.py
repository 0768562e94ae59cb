import itertools
import math

import pytest
import torch

from sssd.losses import instance_norm, js_divergence, pyramid_distance
from sssd.losses.pyramid import AXES, DISTANCES, LEVEL_REDUCTIONS, REDUCTIONS
from tests.losses.pyramids import oracle, padding_masks, pyramid

COMBINATIONS = list(itertools.product(DISTANCES, AXES, REDUCTIONS))


@pytest.mark.parametrize("level_reduction", LEVEL_REDUCTIONS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("distance", "axis", "reduction"), COMBINATIONS)
def test_equals_the_definition(distance, axis, reduction, level_reduction, masked):
    student, teacher = pyramid(seed=0), pyramid(seed=1)
    masks = padding_masks() if masked else None
    options = {
        "distance": distance,
        "axis": axis,
        "reduction": reduction,
        "level_reduction": level_reduction,
    }
    expected = oracle(student, teacher, masks, **options)
    value = pyramid_distance(student, teacher, masks=masks, **options).item()
    assert value == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_worked_example():
    # One image, two channels, two positions side by side. Over the channels, position 0 has
    # student (1/4, 3/4) and teacher (1/2, 1/2), which are JS = 0.04879 bits apart (worked out in
    # test_divergence.py); position 1 is equal. There are 4 elements and 2 distributions:
    #   element_mean: sqrt(0.04879 / 4) = 0.11045; per_distribution: sqrt(0.04879) / 2 = 0.11045
    half = torch.tensor([1 / 2, 1 / 2]).log()
    student = {"p": torch.stack([torch.tensor([1 / 4, 3 / 4]).log(), half], dim=1)[None, :, None]}
    teacher = {"p": torch.stack([half, half], dim=1)[None, :, None]}
    for reduction in REDUCTIONS:
        value = pyramid_distance(student, teacher, reduction=reduction)
        assert value.item() == pytest.approx(0.11045, abs=1e-5)
    # A third of the positions equal: the two reductions part.
    #   element_mean: sqrt(0.04879 / 6) = 0.09018; per_distribution: sqrt(0.04879) / 3 = 0.07363
    student = {"p": torch.cat([student["p"], half[None, :, None, None]], dim=3)}
    teacher = {"p": torch.cat([teacher["p"], half[None, :, None, None]], dim=3)}
    value = pyramid_distance(student, teacher, reduction="element_mean")
    assert value.item() == pytest.approx(0.09018, abs=1e-5)
    value = pyramid_distance(student, teacher, reduction="per_distribution")
    assert value.item() == pytest.approx(0.07363, abs=1e-5)
    # KL is of the student from the teacher: 1/2 log2(2) + 1/2 log2(2/3) = 0.20752, over 3.
    value = pyramid_distance(student, teacher, distance="kl", reduction="per_distribution")
    assert value.item() == pytest.approx(0.20752 / 3, abs=1e-5)


def test_level_weights_and_reductions_by_hand():
    # Mean squared differences 1 (4 elements) and 9 (1 element).
    student = {"fine": torch.ones(1, 1, 2, 2), "coarse": torch.full((1, 1, 1, 1), 3.0)}
    teacher = {level: torch.zeros_like(x) for level, x in student.items()}

    def distance(level_reduction, *weights):
        return pyramid_distance(
            student,
            teacher,
            distance="mse",
            level_reduction=level_reduction,
            level_weights=weights,
        ).item()

    assert distance("mean") == (1 + 9) / 2
    assert distance("sum") == 1 + 9
    assert distance("elements") == pytest.approx((4 * 1 + 1 * 9) / 5)
    assert distance("mean", 3, 1) == (3 * 1 + 1 * 9) / 4
    assert distance("sum", 3, 1) == 3 * 1 + 1 * 9
    assert distance("elements", 3, 1) == pytest.approx((12 * 1 + 1 * 9) / 13)
    assert distance("mean", 0, 1) == 9
    # The weights follow the order of the student.
    teacher = dict(reversed(teacher.items()))
    assert distance("mean", 0, 1) == 9


def test_element_mean_is_the_root_of_the_mean_over_positions_by_the_root_of_the_width():
    student = pyramid(seed=0, channels=16, sizes={"p": (5, 7)})
    teacher = pyramid(seed=1, channels=16, sizes={"p": (5, 7)})
    over_positions = js_divergence(student["p"], teacher["p"], reduction="mean")
    value = pyramid_distance(student, teacher)
    torch.testing.assert_close(value, over_positions.sqrt() / 4, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("correlation", "per_element", "per_position"),
    [(0.0, 0.0335, 0.447), (0.2, 0.0306, 0.407), (0.5, 0.0250, 0.332)],
)
def test_scale_that_the_published_coefficients_assume(correlation, per_element, per_position):
    # Unit-variance Gaussian stand-ins 256 wide; the values are those of the method's description:
    # the first in bits, the second in nats.
    generator = torch.Generator().manual_seed(0)
    teacher, noise = torch.randn(2, 1, 256, 32, 32, generator=generator)
    student = {"p": instance_norm(correlation * teacher + (1 - correlation**2) ** 0.5 * noise)}
    teacher = {"p": instance_norm(teacher)}
    value = pyramid_distance(student, teacher)
    assert value.item() == pytest.approx(per_element, rel=0.01)
    value = pyramid_distance(student, teacher, reduction="per_distribution", log_base=math.e)
    assert value.item() == pytest.approx(per_position, rel=0.01)
    value = pyramid_distance(student, teacher, distance="mse")
    assert value.item() == pytest.approx(2 - 2 * correlation, rel=0.01)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("distance", "axis", "reduction"), COMBINATIONS)
def test_gradients(distance, axis, reduction, masked):
    sizes = {"p3": (2, 3), "top": (1, 1)}
    masks = None
    if masked:
        extents = [{"p3": (2, 2), "top": (1, 1)}, {"p3": (1, 3), "top": (1, 1)}]
        masks = padding_masks(extents, sizes)
    student = [x.requires_grad_() for x in pyramid(seed=0, sizes=sizes).values()]
    teacher = [x.requires_grad_() for x in pyramid(seed=1, sizes=sizes).values()]

    def function(a, b, c, d):
        return pyramid_distance(
            {"p3": a, "top": b},
            {"p3": c, "top": d},
            distance=distance,
            axis=axis,
            reduction=reduction,
            masks=masks,
            temperature=1.5,
            level_weights=(2, 1),
        )

    assert torch.autograd.gradcheck(function, (*student, *teacher))


@pytest.mark.parametrize(("distance", "axis", "reduction"), COMBINATIONS)
def test_the_size_of_the_batch_does_not_scale_the_distance(distance, axis, reduction):
    options = {"distance": distance, "axis": axis, "reduction": reduction}
    student, teacher = pyramid(seed=0), pyramid(seed=1)
    thrice = [{level: x.repeat(3, 1, 1, 1) for level, x in m.items()} for m in (student, teacher)]
    torch.testing.assert_close(
        pyramid_distance(*thrice, **options), pyramid_distance(student, teacher, **options)
    )


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_equal_pyramids_give_zero_and_a_finite_gradient(distance, axis, reduction):
    student = {
        level: x.requires_grad_() for level, x in pyramid(seed=0, dtype=torch.float32).items()
    }
    teacher = {level: x.detach().clone() for level, x in student.items()}
    value = pyramid_distance(student, teacher, distance=distance, axis=axis, reduction=reduction)
    value.backward()
    assert value.item() == 0
    for x in student.values():
        assert x.grad.abs().max() <= (1e-6 if distance == "kl" else 0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("level_reduction", LEVEL_REDUCTIONS)
@pytest.mark.parametrize(("distance", "axis", "reduction"), COMBINATIONS)
def test_an_empty_batch_gives_zero_and_keeps_the_graph(
    distance, axis, reduction, level_reduction, masked
):
    student = {level: x.requires_grad_() for level, x in pyramid(seed=0, images=0).items()}
    value = pyramid_distance(
        student,
        pyramid(seed=1, images=0),
        distance=distance,
        axis=axis,
        reduction=reduction,
        level_reduction=level_reduction,
        masks=padding_masks([]) if masked else None,
    )
    value.backward()
    assert value.item() == 0
    assert all(x.grad.shape == x.shape for x in student.values())


@pytest.mark.parametrize("distance", ["js", "kl"])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_at_its_limits(distance, axis, dtype):
    limit = torch.finfo(dtype).max
    student = {"p": torch.full((2, 4, 3, 3), limit, dtype=dtype)}
    student["p"][:, ::2, 1] = -limit
    teacher = {"p": -student["p"]}
    student["p"].requires_grad_()
    for reduction in REDUCTIONS:
        value = pyramid_distance(
            student, teacher, distance=distance, axis=axis, reduction=reduction
        )
        (grad,) = torch.autograd.grad(value, student["p"])
        assert value.dtype == torch.float32
        assert value.isfinite() and value > 0
        assert grad.isfinite().all()
        if (distance, reduction) == ("js", "per_distribution"):
            assert value <= 1 + 1e-6


def test_half_precision_equals_single_precision_of_the_same_values():
    student = pyramid(seed=0, dtype=torch.float16)
    teacher = pyramid(seed=1, dtype=torch.float16)
    wide = [{level: x.float() for level, x in maps.items()} for maps in (student, teacher)]
    for distance in DISTANCES:
        value = pyramid_distance(student, teacher, distance=distance)
        assert torch.equal(value, pyramid_distance(*wide, distance=distance))


@pytest.mark.parametrize(("distance", "axis", "reduction"), COMBINATIONS)
def test_no_value_is_read_back_from_the_device(distance, axis, reduction):
    # Tensors on "meta" hold no values: reading one, as .item() or an if would, raises.
    def on_meta(maps):
        return {level: x.to("meta") for level, x in maps.items()}

    value = pyramid_distance(
        on_meta(pyramid(seed=0)),
        on_meta(pyramid(seed=1)),
        distance=distance,
        axis=axis,
        reduction=reduction,
        level_reduction="elements",
        masks=on_meta(padding_masks()),
    )
    assert value.shape == () and value.device.type == "meta"


def test_errors_name_the_value():
    student, teacher = pyramid(seed=0), pyramid(seed=1)

    def raises(match, **options):
        with pytest.raises(ValueError, match=match):
            pyramid_distance(student, teacher, **options)

    raises("Unknown distance 'wasserstein'; use one of js, kl, mse", distance="wasserstein")
    raises("Unknown axis 'width'; use one of channel, spatial, flatten", axis="width")
    raises("Unknown reduction 'max'; use one of element_mean", reduction="max")
    raises("Unknown level_reduction 'max'; use one of mean, sum", level_reduction="max")
    raises("2 level weights were given for the 3 levels p3, p4, top", level_weights=(1, 2))
    raises(r"finite and >= 0, got -1 in \[1, -1, 1\]", level_weights=(1, -1, 1))
    raises(r"got nan", level_weights=(1, math.nan, 1))
    raises(r"\[0, 0, 0\] are all 0", level_weights=(0, 0, 0))
    # Also where the distance uses neither.
    raises(r"temperature must be positive, got 0\.0", temperature=0.0, distance="mse")
    raises(r"greater than 1, got 0\.5", log_base=0.5, distance="mse")


def test_errors_name_the_level():
    student, teacher, masks = pyramid(seed=0), pyramid(seed=1), padding_masks()
    with pytest.raises(ValueError, match=r"different levels: \['p3', 'p4', 'top'\] \(student\)"):
        pyramid_distance(student, {"p3": teacher["p3"]})
    with pytest.raises(ValueError, match="different levels"):
        pyramid_distance({}, {})
    # Maps that broadcast are refused as well.
    wrong = {**teacher, "p4": teacher["p4"][:1]}
    with pytest.raises(ValueError, match=r"'p4'.*\(2, 3, 2, 3\) \(student\), \(1, 3, 2, 3\)"):
        pyramid_distance(student, wrong)
    with pytest.raises(ValueError, match="no mask for level 'top', only for p3, p4"):
        pyramid_distance(student, teacher, masks={k: masks[k] for k in ("p3", "p4")})
    with pytest.raises(ValueError, match=r"'p4' must be bool with the shape \(2, 2, 3\)"):
        pyramid_distance(student, teacher, masks={**masks, "p4": masks["p4"][:1]})
    with pytest.raises(ValueError, match=r"'p4' must be bool .*float32"):
        pyramid_distance(student, teacher, masks={**masks, "p4": masks["p4"].float()})
