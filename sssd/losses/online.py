"""Losses of classifiers that are trained together: peers, branches, and the heads of one network.

B: images, C: classes, M: branches. Each learns from the labels and from the predictions of the
others, which are constants to it. Everything is computed in float32 (float64 stays float64), each
loss is a mean over the batch, and an empty batch gives 0 with its graph.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .divergence import _widen, kl_divergence, log_probabilities, mean_of
from .logits import check_logits, cross_entropies, kd_loss, soft_cross_entropy

__all__ = [
    "gated_ensemble",
    "gaussian_rampup",
    "mean_ensemble",
    "mutual_learning_loss",
    "one_loss",
    "own_teacher_loss",
]


def mutual_learning_loss(
    logits: Tensor, peers: Sequence[Tensor], *, reduction: str = "mean", target: str = "peer"
) -> Tensor:
    """KL(p_peer || p) at T = 1 over the peers: deep mutual learning (Zhang et al., 1706.00384).

    The peer gets no gradient; each network takes its own cross-entropy besides.
    The official code bounds the quotient of the probabilities by an epsilon, which changes the
    value by about 2e-6 of it; here the logarithms are exact.

    Args:
        logits: (B, C), of the network that learns.
        peers: logits (B, C) of each of the others, at least one.
        reduction: over the peers: "mean", the paper's 1 / (K - 1) for K networks, or "sum"
            (official code).
        target: whose predictions weigh the logarithms: "peer" for KL(p_peer || p) (paper and
            codes), or "own" for KL(p || p_peer), as lecture notes write it down.

    Raises:
        ValueError: for no peer, logits of other or unequal shapes, or an unknown reduction or
            target.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"Unknown reduction {reduction!r} over the peers; use 'mean' or 'sum'.")
    if target not in ("peer", "own"):
        raise ValueError(f"Unknown target {target!r} of mutual learning; use 'peer' or 'own'.")
    if len(peers) == 0:
        raise ValueError("Mutual learning needs the logits of at least one peer, got none.")
    check_logits("Mutual learning", logits, *peers)
    pairs = [
        (peer.detach(), logits) if target == "peer" else (logits, peer.detach()) for peer in peers
    ]
    total = sum(kl_divergence(p, q, reduction="mean") for p, q in pairs)
    return total / len(peers) if reduction == "mean" else total


def gated_ensemble(branches: Tensor, gates: Tensor) -> Tensor:
    """Logits of an ensemble: those of its branches, weighted by gates (ONE; 1806.04606).

    Args:
        branches: logits (B, M, C).
        gates: (B, M), weights of the branches for each image; the softmax is the gate's own.

    Returns:
        (B, C), float32 or wider.

    Raises:
        ValueError: for other shapes.
    """
    if branches.ndim != 3 or gates.shape != branches.shape[:2]:
        raise ValueError(
            "An ensemble needs logits (images, branches, classes) and gates (images, branches), "
            f"got {tuple(branches.shape)} and {tuple(gates.shape)}."
        )
    return (_widen(gates)[:, :, None] * _widen(branches)).sum(1)


def mean_ensemble(logits: Sequence[Tensor], *, average: str = "probabilities") -> Tensor:
    """Logits of an ensemble in which all members count alike.

    Args:
        logits: (B, C) of each member, at least one.
        average: "probabilities", whose mean is given as its logarithm, or "logits". Born-Again
            networks (1805.04770) leave open which; BYOT's official code averages logits.

    Returns:
        (B, C), float32 or wider.

    Raises:
        ValueError: for no member, logits of other or unequal shapes, or an unknown average.
    """
    if average not in ("probabilities", "logits"):
        raise ValueError(f"Unknown average {average!r}; use 'probabilities' or 'logits'.")
    if len(logits) == 0:
        raise ValueError("An ensemble needs the logits of at least one member, got none.")
    check_logits("An ensemble", *logits)
    if average == "logits":
        return torch.stack([_widen(x) for x in logits]).mean(0)
    log_p = torch.stack([log_probabilities(x) for x in logits])
    return log_p.logsumexp(0) - math.log(len(logits))


def one_loss(
    branches: Tensor,
    gates: Tensor,
    labels: Tensor,
    *,
    temperature: float = 3.0,
    distill_weight: float = 1.0,
) -> dict[str, Tensor]:
    """On-the-fly native ensemble: branches learn from the labels and from their gated ensemble.

    Lan et al., arXiv 1806.04606:
    sum_i CE(z_i) + CE(z_e) + w sum_i T^2 KL(p_e || p_i), with z_e of :func:`gated_ensemble`.
    The last term takes the ensemble as a constant, as the official code does, so that the gate
    learns from CE(z_e) alone.

    Args:
        branches: logits (B, M, C).
        gates: (B, M).
        labels: (B,), int64, within 0..C-1.
        temperature: 3 in the official code.
        distill_weight: the w above: 1 in the paper's equation, :func:`gaussian_rampup` over the
            first 80 of 300 epochs in the official code.

    Returns:
        Three scalars, whose sum is the loss: "cross_entropy" of the branches (summed over them),
        "ensemble_cross_entropy", and "distillation", weighted.

    Raises:
        ValueError: for other shapes, labels outside 0..C-1 (on the CPU), or a temperature <= 0.
    """
    ensemble = gated_ensemble(branches, gates)
    each = branches.unbind(1)
    distances = (kd_loss(branch, ensemble, temperature=temperature) for branch in each)
    return {
        "cross_entropy": sum(mean_of(cross_entropies(branch, labels)) for branch in each),
        "ensemble_cross_entropy": mean_of(cross_entropies(ensemble, labels)),
        "distillation": distill_weight * sum(distances),
    }


def gaussian_rampup(progress: float) -> float:
    """exp(-5 (1 - progress)^2): from 0.0067 at 0 to 1 at 1, and 1 from there on.

    How ONE's official code lets the distillation set in, with the progress counted in the ramp's
    80 epochs; it is not in the paper's equation.
    """
    return math.exp(-5 * (1 - min(progress, 1.0)) ** 2)


def own_teacher_loss(
    heads: Sequence[Tensor],
    labels: Tensor,
    *,
    alpha: float = 0.3,
    temperature: float = 3.0,
    t_square: bool = True,
    soft: str = "kl",
    deepest_weight: float = 1.0,
) -> dict[str, Tensor]:
    """Be your own teacher: earlier heads learn from the labels and from the deepest one.

    Zhang et al., arXiv 1905.08094 (BYOT), without its feature term: the deepest head has
    deepest_weight CE(z_C), every other (1 - alpha) CE(z_i) + alpha T^2 KL(p_C || p_i). The deepest
    predictions are constants in the latter. The codes differ, and their weights with them:

    ==================  =============  ===========  =======
    argument            official code  luanyunteng  mmrazor
    ==================  =============  ===========  =======
    ``alpha``           0.3            0.1          0.3
    ``soft``            "ce"           "ce"         "kl"
    ``t_square``        False          True         True
    ``deepest_weight``  1              0.9          1
    ==================  =============  ===========  =======

    The paper gives no value for alpha. That it has the deepest cross-entropy at weight 1 is from
    memory, not verified.

    Args:
        heads: logits (B, C) of each head, the deepest last, at least two.
        labels: (B,), int64, within 0..C-1.
        alpha: from 0 to 1.
        temperature: 3 in all three.
        t_square: multiply the soft term by T^2.
        soft: "kl" or "ce", of equal gradients (:func:`kd_loss`, :func:`soft_cross_entropy`).
        deepest_weight: of the deepest cross-entropy.

    Returns:
        Three scalars, whose sum is the loss, each weighted: "deepest_cross_entropy",
        "cross_entropy" of the earlier heads, and their "distillation", both summed over them.

    Raises:
        ValueError: for fewer than two heads, logits of other or unequal shapes, an alpha outside
            0..1, an unknown ``soft``, labels outside 0..C-1 (on the CPU), or a temperature <= 0.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"The weight alpha of the deepest head must be from 0 to 1, got {alpha}.")
    if soft not in ("kl", "ce"):
        raise ValueError(f"Unknown soft loss {soft!r}; use 'kl' or 'ce'.")
    if len(heads) < 2:
        raise ValueError(
            f"A network that is its own teacher needs at least two heads, got {len(heads)}: the "
            "deepest one teaches the others."
        )
    check_logits("Its own teacher", *heads)
    function = kd_loss if soft == "kl" else soft_cross_entropy
    *earlier, deepest = heads
    distances = (
        function(head, deepest, temperature=temperature, t_square=t_square) for head in earlier
    )
    hard = sum(mean_of(cross_entropies(head, labels)) for head in earlier)
    return {
        "deepest_cross_entropy": deepest_weight * mean_of(cross_entropies(deepest, labels)),
        "cross_entropy": (1 - alpha) * hard,
        "distillation": alpha * sum(distances),
    }
