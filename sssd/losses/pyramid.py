"""Distance between two feature pyramids.

A pyramid is a dict of maps, level name -> (N, C, H, W).
N: images, C: channels, H, W: height and width of a level, P: levels.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .divergence import check_scales, js_divergence, kl_divergence, mse, stable_root
from .fused import normalised_js_divergence

__all__ = [
    "AXES",
    "DISTANCES",
    "Distance",
    "LEVEL_REDUCTIONS",
    "REDUCTIONS",
    "check_choice",
    "check_options",
    "check_pyramids",
    "pyramid_distance",
]


class Distance(NamedTuple):
    """What DISTANCES holds."""

    divergence: Callable[..., Tensor]
    """Called with the values of student and teacher and the keywords ``dim``, ``temperature``,
    ``log_base`` and ``mask`` (bool, broadcastable; None when all count). Returns what it sums over
    ``dim``."""
    root: bool
    """Whether the distance is the root of the divergence."""
    of_unnormalised: Callable[..., Tensor] | None = None
    """Sum of the divergences over all positions of two maps that it normalises itself, as
    :func:`sssd.losses.normalised_js_divergence`; None where there is no quicker way."""


# Name -> distance. One of your own becomes available to configs by adding it here.
DISTANCES: dict[str, Distance] = {
    "js": Distance(js_divergence, root=True, of_unnormalised=normalised_js_divergence),
    "kl": Distance(
        lambda student, teacher, **kw: kl_divergence(teacher, student, **kw), root=False
    ),
    "mse": Distance(
        lambda student, teacher, dim, **_: mse(student, teacher, dim=dim, reduction="none"),
        root=False,
    ),
}
AXES = ("channel", "spatial", "flatten")
REDUCTIONS = ("element_mean", "per_distribution")
LEVEL_REDUCTIONS = ("mean", "sum", "elements")

Pyramid = Mapping[str, Tensor]


def pyramid_distance(
    student: Pyramid,
    teacher: Pyramid,
    *,
    distance: str = "js",
    axis: str = "channel",
    reduction: str = "element_mean",
    level_reduction: str = "mean",
    level_weights: Sequence[float] = (),
    masks: Pyramid | None = None,
    temperature: float = 1.0,
    log_base: float = 2.0,
) -> Tensor:
    """Distance between the maps of two pyramids, one scalar.

    SSSD (arXiv 2303.05015) writes ``(1/N) sum_p D_JS(k^p || k_e^p)^(1/2)`` and leaves open how a
    map becomes a distribution, how positions are reduced and what N counts. The defaults are the
    reading under which the published coefficients have the published effect (our inference):
    softmax over channels, the divergence averaged over all elements of a level, its root per
    level, the mean over the P levels.

    Args:
        student, teacher: pyramids with the same keys and shapes. No gradient is stopped here.
        distance: a name in DISTANCES: "js" (root of the Jensen-Shannon divergence), "kl"
            (KL(teacher || student), no root), "mse" (squared difference, no softmax, no root).
        axis: what one distribution is: "channel", the C values at a position; "spatial", the
            H x W values of a channel; "flatten", all values of a level of an image.
        reduction: "element_mean", the divergence averaged over all elements of the level, then
            the root; "per_distribution", the root of each distribution's divergence, then the
            mean over the distributions (within [0, 1] for "js" in base 2).
        level_reduction: "mean" or "sum" over levels, or "elements": levels weighted by their
            number of elements, as if all maps were one (LGD's mean squared error).
        level_weights: a factor for each level, in the order of ``student``; empty for equal. They
            are relative (the mean is divided by their sum) unless levels are summed.
        masks: level -> bool (N, H, W), False on padded cells, which then take no part in any
            distribution or mean, whatever they hold; None when every cell counts.
        temperature, log_base: of the softmax and of the logarithm (unused by "mse").

    Returns:
        Scalar, float32 or wider. 0 for an empty batch.

    Raises:
        ValueError: for an unknown option, or pyramids and masks that do not match.
    """
    check_options(
        distance=distance,
        axis=axis,
        reduction=reduction,
        level_reduction=level_reduction,
        level_weights=level_weights,
        temperature=temperature,
        log_base=log_base,
    )
    check_pyramids(student, teacher, masks)
    levels = {
        level: _level_distance(
            student[level],
            teacher[level],
            mask=None if masks is None else masks[level],
            distance=distance,
            axis=axis,
            reduction=reduction,
            temperature=temperature,
            log_base=log_base,
        )
        for level in student
    }
    return combine_levels(levels, level_reduction, level_weights)


def combine_levels(
    levels: Mapping[str, tuple[Tensor, Tensor | float]],
    level_reduction: str,
    level_weights: Sequence[float],
) -> Tensor:
    """The distance between two pyramids from those of their levels.

    Args:
        levels: level -> distance, and number of elements that it covers.
        level_reduction, level_weights: see :func:`pyramid_distance`.

    Raises:
        ValueError: there are not as many weights as levels.
    """
    if level_weights and len(level_weights) != len(levels):
        raise ValueError(
            f"{len(level_weights)} level weights were given for the {len(levels)} levels "
            f"{', '.join(levels)}; give one for each level or none."
        )
    total, total_weight = 0.0, 0.0
    for (value, num_elements), weight in zip(
        levels.values(), level_weights or [1.0] * len(levels), strict=True
    ):
        if level_reduction == "elements":
            weight = weight * num_elements
        total = total + weight * value
        total_weight = total_weight + weight
    if level_reduction == "sum":
        return total
    return total / total_weight


def _level_distance(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None,
    distance: str,
    axis: str,
    reduction: str,
    temperature: float,
    log_base: float,
) -> tuple[Tensor, Tensor | float]:
    """Returns the distance at one level and the number of elements that it covers."""
    num_elements = count_elements(student, mask)
    if mask is not None:
        mask = mask[:, None]  # (N, 1, H, W)
        # Equal on both sides, padded cells add exactly 0, and not even a NaN gets out of them.
        student = student.masked_fill(~mask, 0)
        teacher = teacher.masked_fill(~mask, 0)

    # One distribution per position (N, H, W), per channel (N, C) or per image (N,).
    if axis == "spatial":
        student, teacher = student.flatten(2), teacher.flatten(2)
        mask = None if mask is None else mask.flatten(2)
    elif axis == "flatten":
        mask = None if mask is None else mask.expand_as(student).flatten(1)
        student, teacher = student.flatten(1), teacher.flatten(1)
    dim = 2 if axis == "spatial" else 1
    softmax = {
        "dim": dim,
        "temperature": temperature,
        "log_base": log_base,
        # Over channels, a padded position is a distribution of its own, equal on both sides.
        "mask": None if axis == "channel" else mask,
    }

    chosen = DISTANCES[distance]
    divergence = chosen.divergence(student, teacher, **softmax)

    def root(x: Tensor) -> Tensor:
        return stable_root(x) if chosen.root else x

    if reduction == "element_mean":
        return root(divergence.sum() / num_elements), num_elements
    num_distributions: Tensor | int = max(divergence.numel(), 1)
    if mask is not None:
        # Those with any cell on an image.
        num_distributions = mask.any(dim).expand_as(divergence).sum().clamp(min=1)
    return root(divergence).sum() / num_distributions, num_elements


def count_elements(maps: Tensor, mask: Tensor | None) -> Tensor | float:
    """Values of (N, C, H, W) maps in cells where the (N, H, W) mask is True; at least 1."""
    if mask is None:
        return float(max(maps.numel(), 1))
    return (mask.sum() * maps.shape[1]).clamp(min=1)


def check_options(
    *,
    distance: str,
    axis: str,
    reduction: str,
    level_reduction: str,
    level_weights: Sequence[float],
    temperature: float,
    log_base: float,
) -> None:
    """Raises ValueError for options that :func:`pyramid_distance` does not take."""
    check_choice("distance", distance, DISTANCES)
    check_choice("axis", axis, AXES)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("level_reduction", level_reduction, LEVEL_REDUCTIONS)
    for weight in level_weights:
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(
                f"A level weight must be finite and >= 0, got {weight} in {list(level_weights)}."
            )
    if level_weights and not sum(level_weights):
        raise ValueError(
            f"The level weights {list(level_weights)} are all 0, which compares nothing; give one "
            "level at least a weight above 0."
        )
    check_scales(temperature=temperature, log_base=log_base)


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raises ValueError for a name that is not among the choices."""
    if value not in choices:
        raise ValueError(f"Unknown {name} {value!r}; use one of {', '.join(choices)}.")


def check_pyramids(student: Pyramid, teacher: Pyramid, masks: Pyramid | None = None) -> None:
    """Raises ValueError for pyramids, or masks, whose levels or shapes do not match."""
    if not student or set(student) != set(teacher):
        raise ValueError(
            f"The pyramids have different levels: {sorted(student)} (student) and "
            f"{sorted(teacher)} (teacher)."
        )
    for level in student:
        if student[level].shape != teacher[level].shape:
            raise ValueError(
                f"The maps of level {level!r} have different shapes: "
                f"{tuple(student[level].shape)} (student), {tuple(teacher[level].shape)} (teacher)."
            )
        if masks is None:
            continue
        if level not in masks:
            raise ValueError(
                f"There is no mask for level {level!r}, only for {', '.join(masks) or 'none'}; "
                "give one for each level or none."
            )
        mask, cells = masks[level], (len(student[level]), *student[level].shape[2:])
        if mask.dtype != torch.bool or mask.shape != cells:
            raise ValueError(
                f"The mask of level {level!r} must be bool with the shape {tuple(cells)} (images, "
                f"height, width), got {mask.dtype} with {tuple(mask.shape)}."
            )
