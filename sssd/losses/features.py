"""Distances between the intermediate features of a student and those of its teacher.

B: images, C: channels, H, W: height and width. The teacher's features are constants: no gradient
reaches them. Everything is computed in float32 (float64 stays float64), and an empty batch gives
0 with its graph. Each function compares one pair of features; weights and sums over several pairs
are the caller's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .divergence import _reduce, _widen, mean_of, mse

__all__ = [
    "activation_boundary_loss",
    "attention_loss",
    "attention_map",
    "factor_loss",
    "hint_loss",
    "self_feature_loss",
]


def hint_loss(student: Tensor, teacher: Tensor, *, reduction: str = "half_channel_sum") -> Tensor:
    """Hint of FitNets (Romero et al., arXiv 1412.6550): 1/2 || r(student) - teacher ||^2.

    The reductions differ by constants, so a weight belongs to its reduction: "half_channel_sum"
    is C / 2 times "mean", and "sum" B C H W times "mean".

    Args:
        student: (B, C, ...), after the regressor r that gives it the teacher's shape.
        teacher: (B, C, ...).
        reduction: "half_channel_sum" sums half the squared error over the channels, then takes the
            mean over images and cells (official code); "mean" is over all elements (RepDistiller
            and mdistiller, with a weight of 100); "sum" over all elements, divided by nothing
            (torchdistill's configurations).

    Raises:
        ValueError: for unequal shapes or an unknown reduction.
    """
    _check_equal(student, teacher, "The hint loss", "give the student a regressor")
    _check_choice("reduction", reduction, ("half_channel_sum", "mean", "sum"))
    if reduction == "half_channel_sum":
        return mse(student, teacher.detach(), dim=1) / 2
    return mse(student, teacher.detach(), reduction=reduction)


def attention_map(x: Tensor, *, p: float = 2) -> Tensor:
    """Spatial attention: the mean over channels of ``|x|^p``, flat, of unit L2 norm per image.

    Zagoruyko and Komodakis, arXiv 1612.03928. The paper sums over channels; the norm removes the
    difference. The absolute value, which RepDistiller omits, only counts for odd ``p``.

    Args:
        x: (B, C, H, W).
        p: exponent, at least 1; 2 in the official code.

    Returns:
        (B, H W), float32 or wider. An image whose features are all 0 has a map of zeros.

    Raises:
        ValueError: for another number of axes, or ``p`` below 1.
    """
    check_maps(x)
    if not p >= 1:
        raise ValueError(f"The exponent of an attention map must be at least 1, got {p}.")
    # The norm cancels any scale; without one, the powers of large half-precision values overflow.
    return unit_vectors(_scaled(_widen(x), (1, 2, 3)).abs().pow(p).mean(1).flatten(1))


def attention_loss(
    student: Tensor, teacher: Tensor, *, p: float = 2, mode: str = "code", resize: bool = True
) -> Tensor:
    """Distance of two attention maps (activation-based attention transfer, arXiv 1612.03928).

    Args:
        student, teacher: (B, C, H, W); the channels may differ.
        p: see :func:`attention_map`.
        mode: "code" is the mean of the squared differences over images and cells, as in the
            official code (weight 1000) and all peers. "paper" is the mean over images of the L2
            norm of the difference, not squared, without the equation's factor beta / 2.
        resize: average-pool features of unequal size to the smaller height and width, as
            RepDistiller and mdistiller do. If False, unequal sizes are an error (the official code
            and torchdistill do not pool).

    Raises:
        ValueError: for unequal sizes without ``resize``, unequal batches, or an unknown mode.
    """
    _check_choice("mode", mode, ("code", "paper"))
    check_maps(student, teacher)
    if not resize and student.shape[2:] != teacher.shape[2:]:
        raise ValueError(
            f"The attention maps of the student, {tuple(student.shape[2:])}, and of the teacher, "
            f"{tuple(teacher.shape[2:])}, must have equal sizes; set resize=True to pool the "
            "larger one."
        )
    student, teacher = pool_to_smaller(student, teacher.detach(), "avg")
    student, teacher = attention_map(student, p=p), attention_map(teacher, p=p)
    if mode == "code":
        return mse(student, teacher)
    norms = torch.linalg.vector_norm(student - teacher, dim=1)
    return mean_of(norms)


def factor_loss(student: Tensor, teacher: Tensor, *, p: int = 1) -> Tensor:
    """Factor transfer (Kim et al., arXiv 1802.04977): || F_T / ||F_T|| - F_S / ||F_S|| ||_p.

    The whole factor of an image is flattened and divided by its L2 norm. RepDistiller's
    FactorTransfer is another loss: it squares and averages over the channels first, which leaves
    the L1 distance of attention maps.

    Args:
        student: (B, ...), the translator's output.
        teacher: (B, ...) of equal shape, the paraphraser's output.
        p: 1 for the mean absolute difference over all elements (official code with a weight of
            500; torchdistill), 2 for the mean squared one. (torchdistill's p=2 is the mean over
            images of the un-squared L2 norm.)

    Raises:
        ValueError: for unequal shapes or another ``p``.
    """
    _check_equal(student, teacher, "The factor loss", "give the translator the paraphraser's width")
    _check_choice("p", p, (1, 2))
    student = unit_vectors(_widen(student).flatten(1))
    teacher = unit_vectors(_widen(teacher.detach()).flatten(1))
    if p == 2:
        return mse(student, teacher)
    return mean_of((student - teacher).abs())


def activation_boundary_loss(
    student: Tensor, teacher: Tensor, *, margin: float = 1.0, reduction: str = "batch_mean"
) -> Tensor:
    """Activation boundaries (Heo et al., arXiv 1811.03233): a squared hinge on the neurons' signs.

    Each neuron costs relu(margin - s)^2 where the teacher's is active (t > 0), and
    relu(margin + s)^2 where it is not (t <= 0).

    Args:
        student: (B, ...), before its ReLU, after the connector if the widths differ.
        teacher: (B, ...), before its ReLU. After it, "not active" would only mean exactly 0.
        margin: positive; 1 in all codes.
        reduction: "batch_mean" is the sum over all neurons divided by B (official code, which
            multiplies it by 3 / 1000, as RepDistiller does, and by 1, 1/2, 1/4, ... from the
            deepest layer up; torchdistill); "element_mean" the mean over all neurons
            (Knowledge-Distillation-Zoo).

    Raises:
        ValueError: for unequal shapes, an unknown reduction or a margin that is not positive.
    """
    _check_equal(
        student, teacher, "The activation-boundary loss", "give the student a 1x1 connector"
    )
    _check_choice("reduction", reduction, ("batch_mean", "element_mean"))
    if not margin > 0:
        raise ValueError(f"The margin of the activation boundaries must be positive, got {margin}.")
    student = _widen(student)
    hinge = F.relu(margin - torch.where(teacher.detach() > 0, student, -student))
    return _reduce(hinge.square().flatten(1).sum(1), hinge.numel(), _MEANS[reduction])


def self_feature_loss(feature: Tensor, deepest: Tensor, *, reduction: str = "mean") -> Tensor:
    """Feature term of Be Your Own Teacher (Zhang et al., arXiv 1905.08094): || F_i - F_C ||_2^2.

    The deepest feature is the target: it gets no gradient.

    Args:
        feature: (B, ...), of a shallow section, after its bottleneck or adapter.
        deepest: (B, ...), of the last section; maps or pooled vectors.
        reduction: not interchangeable, and the paper gives no weight for any of them.
            "mean" is the mean over images of the squared norm (our recommendation);
            "norm" one norm of the whole batch, not squared (official code and mmrazor, weight
            0.03), which grows with the root of B;
            "sum" the squared norm of the whole batch (luanyunteng, weight 1e-6, who leaves out
            elements where both features are <= 0: no difference after a ReLU).

    Raises:
        ValueError: for unequal shapes or an unknown reduction.
    """
    _check_equal(feature, deepest, "The feature loss", "give the section a bottleneck")
    _check_choice("reduction", reduction, ("mean", "norm", "sum"))
    if reduction == "norm":
        return torch.linalg.vector_norm(_widen(feature) - _widen(deepest.detach()))
    return mse(feature.flatten(1), deepest.detach().flatten(1), dim=1, reduction=reduction)


# The reductions of the activation boundaries by the names that divergence.py gives them.
_MEANS = {"batch_mean": "mean", "element_mean": "element_mean"}


def unit_vectors(x: Tensor) -> Tensor:
    """Divides the vectors along the last axis by their L2 norm; a vector of zeros stays one.

    Unlike ``F.normalize``, whose slope at 0 is 1e12, and which does not normalise below its eps.
    """
    x = _scaled(x, (-1,))
    # With a greatest element of 1, the norm of any vector but 0 is at least 1.
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1)


def pool_to_smaller(a: Tensor, b: Tensor, pool: str) -> tuple[Tensor, Tensor]:
    """Pools maps (B, C, H, W) adaptively to the smaller height and the smaller width of the two.

    Args:
        pool: "avg" or "max".

    Returns:
        Both maps, float32 or wider.
    """
    _check_choice("pool", pool, ("max", "avg"))
    check_maps(a, b)
    function = F.adaptive_max_pool2d if pool == "max" else F.adaptive_avg_pool2d
    size = tuple(map(min, a.shape[2:], b.shape[2:]))
    a, b = (x if x.shape[2:] == size else function(x, size) for x in (_widen(a), _widen(b)))
    return a, b


def check_maps(*maps: Tensor) -> None:
    """Raises ValueError for tensors that are not maps (B, C, H, W) of the same images."""
    for x in maps:
        if x.ndim != 4:
            raise ValueError(
                "A feature map must have four axes (images, channels, height, width), got the "
                f"shape {tuple(x.shape)}."
            )
    if len({x.shape[0] for x in maps}) > 1:
        raise ValueError(
            "Two feature maps must be of the same images, got batches of "
            f"{' and '.join(str(x.shape[0]) for x in maps)}."
        )


def _scaled(x: Tensor, dim: tuple[int, ...]) -> Tensor:
    # The scale is a constant: what follows does not depend on it, and neither does its gradient.
    peak = x.detach().abs().amax(dim, keepdim=True)
    return x / torch.where(peak > 0, peak, 1)


def _check_equal(student: Tensor, teacher: Tensor, loss: str, fix: str) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"{loss} needs features of equal shape, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}; {fix}."
        )


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"Unknown {name} {value!r}; use {' or '.join(map(repr, choices))}.")
