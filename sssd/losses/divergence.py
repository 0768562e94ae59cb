"""Distances between real-valued maps read as distributions.

The functions take logits ``p`` and ``q`` of equal shape, turn them into distributions with a
softmax at ``temperature`` along ``dim``, and return one value per distribution (the shape of the
input without ``dim``), which ``reduction`` then summarises.

Softmax, logarithm and root run in float32 whatever the input is (float64 stays float64), so that
half-precision features at the limits of their range (65504 in float16, 3.4e38 in bfloat16) give
finite values and gradients. Features that are infinite or NaN give NaN: it shows in the loss.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["js_distance", "js_divergence", "kl_divergence", "log_probabilities", "mse"]

# The least log-probability, for elements that take no part in a distribution or lie further below
# its maximum than float32 reaches. It is finite on purpose: the terms of such an element are
# 0 * finite = 0, where -inf would give 0 * inf = NaN.
_LOG_ZERO = -1e30

Dims = int | Sequence[int]


def log_probabilities(
    logits: Tensor,
    *,
    dim: int = 1,
    temperature: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Log-softmax of ``logits / temperature`` along ``dim``, in float32 or wider.

    Args:
        logits: any shape, any floating type.
        dim: the axis along which the probabilities sum to 1.
        temperature: softens the distribution when > 1; must be positive.
        mask: bool, broadcastable to ``logits``; elements that are False get probability 0.
            A distribution without any element left becomes uniform.

    Returns:
        Tensor of the shape of ``logits``, float32 (float64 for float64 logits), >= -1e30.

    Raises:
        ValueError: for a temperature that is not positive.
    """
    check_scales(temperature=temperature)
    logits = _widen(logits) / temperature
    if mask is not None:
        # The least finite number, below the logits that count even at bfloat16's limits.
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    return F.log_softmax(logits, dim=dim).clamp(min=_LOG_ZERO)


def kl_divergence(
    p: Tensor,
    q: Tensor,
    *,
    dim: int = 1,
    temperature: float = 1.0,
    log_base: float = math.e,
    mask: Tensor | None = None,
    reduction: str = "none",
) -> Tensor:
    """Kullback-Leibler divergence KL(p || q) = sum p (log p - log q).

    Unbounded and not symmetric: it grows without limit where ``q`` is near 0 and ``p`` is not.
    In distillation ``p`` is the teacher and ``q`` the student (Hinton et al., 1503.02531).

    Args:
        p, q: logits of equal shape.
        dim, temperature, mask: see :func:`log_probabilities`.
        log_base: base of the logarithm; e gives nats, 2 gives bits.
        reduction: "none", "mean" or "sum" over the distributions, or "element_mean", the sum
            divided by the number of elements of ``p``.

    Returns:
        The shape of ``p`` without ``dim`` for "none", else a scalar.

    Raises:
        ValueError: for unequal shapes, an unknown reduction, a temperature <= 0 or a base <= 1.
    """
    _check_shapes(p, q)
    log_p = log_probabilities(p, dim=dim, temperature=temperature, mask=mask)
    log_q = log_probabilities(q, dim=dim, temperature=temperature, mask=mask)
    divergence = (log_p.exp() * (log_p - log_q)).sum(dim)
    return _reduce(_to_base(divergence, log_base), p.numel(), reduction)


def js_divergence(
    p: Tensor,
    q: Tensor,
    *,
    dim: int = 1,
    temperature: float = 1.0,
    log_base: float = 2.0,
    mask: Tensor | None = None,
    reduction: str = "none",
) -> Tensor:
    """Jensen-Shannon divergence: KL(p || m) / 2 + KL(q || m) / 2 with m = (p + q) / 2.

    Symmetric, finite for any two distributions, and within [0, 1] in base 2 (within
    [0, ln 2] in nats). Arguments and result as in :func:`kl_divergence`.
    """
    _check_shapes(p, q)
    log_p = log_probabilities(p, dim=dim, temperature=temperature, mask=mask)
    log_q = log_probabilities(q, dim=dim, temperature=temperature, mask=mask)
    # p / m = 2 p / (p + q) = 2 sigmoid(log p - log q). Unlike log p - log m, this leaves exactly 0
    # where p = q, and so does its gradient, which the root multiplies by up to 5e5.
    ratio = log_p - log_q
    divergence = log_p.exp() * (F.logsigmoid(ratio) + math.log(2))
    divergence = divergence + log_q.exp() * (F.logsigmoid(-ratio) + math.log(2))
    # Rounding can leave a sum of near-equal terms a hair below 0.
    divergence = (divergence.sum(dim) / 2).clamp(min=0)
    return _reduce(_to_base(divergence, log_base), p.numel(), reduction)


def js_distance(
    p: Tensor,
    q: Tensor,
    *,
    dim: int = 1,
    temperature: float = 1.0,
    log_base: float = 2.0,
    mask: Tensor | None = None,
    reduction: str = "none",
    eps: float = 1e-12,
) -> Tensor:
    """Jensen-Shannon distance, the root of the divergence: a metric within [0, 1] in base 2.

    This is the distance of SSSD (arXiv 2303.05015). Arguments and result as in
    :func:`kl_divergence`; ``eps`` as in :func:`stable_root`.
    """
    divergence = js_divergence(p, q, dim=dim, temperature=temperature, log_base=log_base, mask=mask)
    return _reduce(stable_root(divergence, eps), p.numel(), reduction)


def stable_root(x: Tensor, eps: float = 1e-12) -> Tensor:
    """Root of non-negative ``x`` with a finite slope at 0: ``sqrt(x + eps) - sqrt(eps)``.

    The slope of the plain root is infinite at 0, and autograd multiplies it by the 0 that equal
    inputs give: NaN. Subtracting ``sqrt(eps)`` keeps the value at 0 exactly 0; it is the same as
    the quotient below, which loses no digits for small ``x``.
    """
    return x / (torch.sqrt(x + eps) + math.sqrt(eps))


def mse(a: Tensor, b: Tensor, *, dim: Dims | None = None, reduction: str = "mean") -> Tensor:
    """Squared difference of ``a`` and ``b``, summed over ``dim`` and then reduced.

    Args:
        a, b: tensors of equal shape.
        dim: axes that are summed before the reduction; none by default.
        reduction: "none", "mean", "sum" or "element_mean"; without ``dim``, "mean" is the mean
            squared error.

    Returns:
        float32 (float64 for float64 input): infinite where the inputs differ by more than 1.8e19,
        whose square float32 cannot hold.

    Raises:
        ValueError: for unequal shapes or an unknown reduction.
    """
    _check_shapes(a, b)
    squared = (_widen(a) - _widen(b)).square()
    if dim is not None:
        squared = squared.sum(dim)
    return _reduce(squared, a.numel(), reduction)


def mean_of(values: Tensor) -> Tensor:
    """Mean of all values; 0 with its graph when there are none."""
    return _reduce(values, values.numel(), "mean")


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def check_scales(*, temperature: float = 1.0, log_base: float = math.e) -> None:
    """Raises ValueError for a temperature or a base that no distance can be computed with."""
    if not temperature > 0:
        raise ValueError(f"The temperature must be positive, got {temperature}.")
    if not log_base > 1:
        raise ValueError(f"The base of the logarithm must be greater than 1, got {log_base}.")


def _check_shapes(a: Tensor, b: Tensor) -> None:
    # Tensors that broadcast would be compared, and reduced by the wrong counts, without a word.
    if a.shape != b.shape:
        raise ValueError(
            f"The two inputs of a distance must have equal shapes, got {tuple(a.shape)} and "
            f"{tuple(b.shape)}."
        )


def _to_base(nats: Tensor, log_base: float) -> Tensor:
    check_scales(log_base=log_base)
    return nats / math.log(log_base)


def _reduce(values: Tensor, num_elements: int, reduction: str) -> Tensor:
    # The divisors are at least 1 so that empty input gives 0 (and keeps its graph), not NaN.
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    if reduction == "mean":
        return values.sum() / max(values.numel(), 1)
    if reduction == "element_mean":
        return values.sum() / max(num_elements, 1)
    raise ValueError(
        f"Unknown reduction {reduction!r}; use 'none', 'mean', 'sum' or 'element_mean'."
    )
