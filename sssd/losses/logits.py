"""Losses on the predictions of a classifier, and on those of its teacher.

B: images, C: classes; logits are (B, C). The teacher's are constants: no gradient reaches them.
Everything is computed in float32 (float64 stays float64), each loss is the mean over the batch of a
sum over the classes, and an empty batch gives 0 with its graph. Weights against the cross-entropy
are the caller's, unless a loss is defined by them.
"""

import torch
from torch import Tensor

from .divergence import kl_divergence, log_probabilities, mean_of

__all__ = [
    "confidence_penalty",
    "confidence_weighted_cross_entropy",
    "cross_entropy",
    "eta_from_target_confidence",
    "kd_loss",
    "permute_dark_knowledge",
    "soft_cross_entropy",
    "target_confidence",
    "tolerant_teacher_loss",
    "top_score_difference",
]


def kd_loss(
    student: Tensor, teacher: Tensor, *, temperature: float = 4.0, t_square: bool = True
) -> Tensor:
    """T^2 KL(p_teacher || p_student), both softened by T (Hinton et al., arXiv 1503.02531).

    The same function is the pair term of CS-KD (Yun et al., 2003.13964), where the teacher is the
    student's own prediction for another image of the class (T = 4 with the square), and, with
    T = 1, the loss of Born-Again networks (Furlanello et al., 1805.04770).

    Args:
        student, teacher: logits (B, C).
        temperature: 4 in the CIFAR recipes of RepDistiller and mdistiller; 3 in AB and FitNets.
        t_square: keeps the size of the gradients when T changes; False is AB's official code.

    Raises:
        ValueError: for logits that are not (B, C) or not of equal shape, or a temperature <= 0.
    """
    check_logits("The distillation loss", student, teacher)
    loss = kl_divergence(teacher.detach(), student, temperature=temperature, reduction="mean")
    return loss * temperature**2 if t_square else loss


def soft_cross_entropy(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, t_square: bool = False
) -> Tensor:
    """Cross-entropy of the student with the softened predictions of the teacher as targets.

    It is :func:`kd_loss` plus the entropy of the teacher: equal gradients, but a value that does
    not reach 0. BYOT's official code logs it (T = 3, without the square), and the second stage of
    FitNets (Romero et al., 1412.6550) is defined by it (T = 3, without the square).

    Arguments and errors as for :func:`kd_loss`.
    """
    check_logits("The soft cross-entropy", student, teacher)
    targets = log_probabilities(teacher.detach(), temperature=temperature).exp()
    loss = mean_of(-(targets * log_probabilities(student, temperature=temperature)).sum(1))
    return loss * temperature**2 if t_square else loss


def cross_entropy(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with the labels, where need be smoothed (Szegedy et al., 1512.00567).

    Args:
        logits: (B, C).
        labels: (B,), int64, within 0..C-1.
        label_smoothing: share of each target that is spread evenly over all C classes.

    Raises:
        ValueError: for a share that is not in [0, 1), or labels as in :func:`cross_entropies`.
    """
    check_label_smoothing(label_smoothing)
    loss = mean_of(cross_entropies(logits, labels))
    if not label_smoothing:
        return loss
    spread = mean_of(-log_probabilities(logits).mean(1))
    return (1 - label_smoothing) * loss + label_smoothing * spread


def confidence_penalty(logits: Tensor) -> Tensor:
    """Negative entropy of the predictions, from -ln C (uniform) to 0 (Pereyra et al., 1701.06548).

    Added to the cross-entropy with the paper's weight beta.

    Args:
        logits: (B, C).

    Raises:
        ValueError: for logits that are not (B, C).
    """
    check_logits("The confidence penalty", logits)
    log_p = log_probabilities(logits)
    return mean_of((log_p.exp() * log_p).sum(1))


def confidence_weighted_cross_entropy(student: Tensor, labels: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy with the labels, each image weighted by how sure the teacher is.

    "Confidence weighted by teacher max" of Born-Again networks (CWTM; Furlanello et al.,
    1805.04770), which shows what of distillation is the weighting alone: the weight of an image is
    the teacher's greatest probability at T = 1, right or wrong, over the sum of the batch.

    Args:
        student, teacher: logits (B, C).
        labels: (B,), int64, within 0..C-1.

    Raises:
        ValueError: for logits of other or unequal shapes, or labels as in :func:`cross_entropies`.
    """
    check_logits("The weighted cross-entropy", student, teacher)
    confidence = log_probabilities(teacher.detach()).exp().amax(1)
    # The division comes first: an empty batch, whose weights sum to 0, has nothing to divide.
    return (confidence / confidence.sum() * cross_entropies(student, labels)).sum()


def permute_dark_knowledge(teacher: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """The teacher's logits, with the entries that are not the greatest permuted in each image.

    "Dark knowledge with permuted predictions" of Born-Again networks (DKPP; Furlanello et al.,
    1805.04770): the teacher stays as sure as it is, but no longer says which classes are alike.
    Permuting logits permutes the probabilities, at every temperature.

    Args:
        teacher: logits (B, C).
        generator: makes the result reproducible; the numbers are drawn on its device.

    Returns:
        (B, C) of the same type, without a graph.

    Raises:
        ValueError: for logits that are not (B, C).
    """
    check_logits("The permutation of dark knowledge", teacher)
    teacher = teacher.detach()
    best = teacher.argmax(1, keepdim=True)
    device = generator.device if generator is not None else teacher.device
    noise = torch.rand(teacher.shape, generator=generator, device=device).to(teacher.device)
    # Two orders of the classes that both end with the best one: at random, and ascending.
    sources = noise.scatter(1, best, 2.0).argsort(1)
    classes = torch.arange(teacher.shape[1], device=teacher.device).expand_as(teacher)
    targets = classes.scatter(1, best, teacher.shape[1]).argsort(1)
    return torch.empty_like(teacher).scatter(1, targets, teacher.gather(1, sources))


def top_score_difference(logits: Tensor, k: int = 5) -> Tensor:
    """The greatest probability minus the mean of the k - 1 that follow (TSD; 1805.05551).

    The classes are ranked for each image by its own scores, whatever its label; the ranks are
    constants, and the gradient goes through the scores. (A third-party implementation divides the
    sum of the k - 1 by k.)

    Args:
        logits: (B, C).
        k: classes that count, from 2 to C; 5 in the paper.

    Raises:
        ValueError: for logits that are not (B, C), or a k outside 2..C.
    """
    check_logits("The top-score difference", logits)
    if not 2 <= k <= logits.shape[1]:
        raise ValueError(
            f"K of the top-score difference is {k}; it must be from 2 to the number of classes, "
            f"{logits.shape[1]}."
        )
    scores = log_probabilities(logits).exp().topk(k, dim=1).values
    return mean_of(scores[:, 0] - scores[:, 1:].mean(1))


def tolerant_teacher_loss(logits: Tensor, labels: Tensor, *, k: int = 5, eta: float) -> Tensor:
    """eta CE + (1 - eta) TSD: a first generation that leaves secondary classes some confidence.

    Yang et al., arXiv 1805.05551, Eq. 3. The weighting of the two terms is from memory, not
    verified against the paper. Later generations learn by cross-entropy and :func:`kd_loss`, T = 1.

    Args:
        logits: (B, C).
        labels: (B,), int64, within 0..C-1.
        k: see :func:`top_score_difference`.
        eta: from 0 to 1, which is plain cross-entropy. Only a narrow range tells (for k = 5, from
            1/5 to 5/9): see :func:`eta_from_target_confidence`.

    Raises:
        ValueError: for an eta outside 0..1, a k outside 2..C, or labels as in
            :func:`cross_entropies`.
    """
    _check_eta(eta)
    difference = top_score_difference(logits, k)
    return eta * mean_of(cross_entropies(logits, labels)) + (1 - eta) * difference


def target_confidence(eta: float, k: int = 5) -> float:
    """Confidence u of the best class at which :func:`tolerant_teacher_loss` is least.

    Our interpretation of the u(eta) that the paper names its teachers by: with all probability
    among k classes, of which the k - 1 secondary ones share equally, the minimum lies at
    u = (k - 1) / k * eta / (1 - eta), within 1/k and 1.

    Raises:
        ValueError: for an eta outside 0..1 or a k below 2.
    """
    _check_eta(eta)
    _check_rank(k)
    if eta == 1:
        return 1.0
    return min(max((k - 1) / k * eta / (1 - eta), 1 / k), 1.0)


def eta_from_target_confidence(u: float, k: int = 5) -> float:
    """The eta with :func:`target_confidence` u: k u / (k - 1 + k u), and 1 for u >= 1.

    Our interpretation, as there. Every eta from k / (2k - 1) on gives u = 1; we take 1, so that a
    strict teacher is one trained by plain cross-entropy (the paper's best teacher has u = 0.6).

    Raises:
        ValueError: for a u below 1/k, which the best of k classes cannot have, or a k below 2.
    """
    _check_rank(k)
    if not u >= 1 / k:
        raise ValueError(
            f"The target confidence is {u}; the best of K={k} classes has at least {1 / k:g}."
        )
    return 1.0 if u >= 1 else k * u / (k - 1 + k * u)


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each image, (B,), for logits (B, C) and labels (B,).

    Raises:
        ValueError: for labels of another shape or type than (B,) int64, or, on the CPU, outside
            0..C-1. On CUDA looking at them would make every iteration wait for the device; there
            the gather below stops the program with the device's own assertion.
    """
    num_images, num_classes = logits.shape
    if labels.shape != (num_images,) or labels.dtype != torch.int64:
        raise ValueError(
            f"The labels must be {num_images} class indices, one for each image, of type int64; "
            f"got {tuple(labels.shape)} of {labels.dtype}."
        )
    if labels.device.type == "cpu":
        bad = labels[(labels < 0) | (labels >= num_classes)]
        if len(bad):
            raise ValueError(
                f"A label is {bad[0].item()}, but the classifier has {num_classes} classes: labels "
                f"must be from 0 to {num_classes - 1}."
            )
    # Not nll_loss, which would pass over a label of -100 without a word.
    return -log_probabilities(logits).gather(1, labels[:, None]).squeeze(1)


def check_logits(loss: str, *logits: Tensor) -> None:
    """Raises ValueError for logits that are not (B, C), or not of equal shape."""
    shapes = [tuple(x.shape) for x in logits]
    if len(shapes[0]) != 2 or shapes.count(shapes[0]) != len(shapes):
        raise ValueError(
            f"{loss} needs logits (images, classes), for the same images and classes; got "
            f"{' and '.join(map(str, shapes))}."
        )


def check_label_smoothing(share: float) -> None:
    """Raises ValueError for a share of the target that cannot be spread."""
    if not 0 <= share < 1:
        raise ValueError(f"The label smoothing must be at least 0 and below 1, got {share}.")


def _check_eta(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise ValueError(f"The weight eta of the tolerant teacher must be from 0 to 1, got {eta}.")


def _check_rank(k: int) -> None:
    if k < 2:
        raise ValueError(f"K of the top-score difference is {k}; it must be at least 2.")
