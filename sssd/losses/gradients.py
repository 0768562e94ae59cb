"""Attention as the slope of the loss by the input (gradient-based attention transfer).

Zagoruyko and Komodakis, arXiv 1612.03928, section 3.2: J = d CE(f(x), y) / dx says where a change
of the image would change the loss. Neither the official code nor any of the peers has these losses.
B: images, C: channels, K: classes.

The losses differentiate J again by the student's parameters, which costs about one more backward
pass. ReLU and max-pooling have no second derivative; J depends on the parameters all the same.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .divergence import _widen, mean_of, mse, stable_root

__all__ = [
    "gradient_attention_loss",
    "gradient_symmetry_loss",
    "input_gradient",
    "input_gradient_of_logits",
    "twice_differentiable",
]


def input_gradient(
    network: nn.Module, images: Tensor, labels: Tensor, *, create_graph: bool = False
) -> tuple[Tensor, Tensor]:
    """Runs a network and differentiates its loss by the images.

    The pass is in float32 without autocast (float64 images: in float64), so that J needs no loss
    scaling; gradients are recorded even under ``torch.no_grad``. With ``create_graph``, the
    pass is under :func:`twice_differentiable`. ``.grad`` of the parameters and of the images stays
    as it is. The network runs in the mode it is in; in training mode, this is a pass that moves its
    running statistics.

    Args:
        network: from images to logits (B, K).
        images: (B, C, H, W), or any other shape that the network takes.
        labels: (B,), class indices.
        create_graph: True for a student. False for a teacher: both results are constants.

    Returns:
        The logits, and J in the shape of ``images`` (see :func:`input_gradient_of_logits`).

    Raises:
        ValueError: as :func:`input_gradient_of_logits`.
    """
    images = _widen(images.detach()).requires_grad_()
    with (
        torch.enable_grad(),
        torch.autocast(images.device.type, enabled=False),
        twice_differentiable() if create_graph else nullcontext(),
    ):
        logits = network(images)
    gradient = input_gradient_of_logits(logits, images, labels, create_graph=create_graph)
    return logits if create_graph else logits.detach(), gradient


def twice_differentiable() -> AbstractContextManager:
    """For a pass whose gradients are differentiated again: attention by its formula.

    Its fused kernels can be differentiated only once.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel  # torch 2.3, for these losses alone

    return sdpa_kernel(SDPBackend.MATH)


def input_gradient_of_logits(
    logits: Tensor, images: Tensor, labels: Tensor, *, create_graph: bool = False
) -> Tensor:
    """Differentiates the loss of logits that are there already by the images they came from.

    J = d sum_b CE(logits_b, labels_b) / d images: the sum, not the mean, so that the J of an image
    has the size that it would have alone, whatever B is. (Batch normalisation in training mode
    still couples the images.)

    The logits are of a pass with gradients, through ``images`` with ``requires_grad``. Where that
    pass was under autocast, J has its precision. If it is to be differentiated again and the
    network has attention, the pass must be under :func:`twice_differentiable`; otherwise, the
    second differentiation raises torch's "derivative for ... is not implemented".

    Args:
        logits: (B, K).
        images: (B, C, H, W), or any other shape.
        labels: (B,), class indices.
        create_graph: keep what it takes to differentiate J again, and the graph of the logits.
            False frees that graph, and gives a constant.

    Returns:
        J, in the shape and the type of ``images``.

    Raises:
        ValueError: if the logits have no gradient by the images.
    """
    gradient = None
    # Backward passes obey the autocast around them, too.
    with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
        loss = F.cross_entropy(_widen(logits), labels, reduction="sum")
        if logits.requires_grad and images.requires_grad:
            (gradient,) = torch.autograd.grad(
                loss, images, create_graph=create_graph, allow_unused=True
            )
    if gradient is None:
        raise ValueError(
            "The logits do not depend on the images as far as autograd knows, so there is no input "
            "gradient; set images.requires_grad_() before the network's pass, and take any "
            "torch.no_grad or detach out of that pass."
        )
    return gradient


def gradient_attention_loss(student_gradient: Tensor, teacher_gradient: Tensor) -> Tensor:
    """Gradient-based attention transfer: the mean over the images of 1/2 || J_S - J_T ||_2.

    The norm is over all elements of an image and not squared, as in the paper, whose total is
    CE + beta / 2 || J_S - J_T ||_2: the weight of this loss is beta. The teacher's J is a constant.

    Near 0 the root is rounded off (:func:`~sssd.losses.divergence.stable_root`): norms well below
    1e-6 count as their square, with a finite slope.

    Args:
        student_gradient: J_S (B, ...), with its graph, for the student's own loss.
        teacher_gradient: J_T (B, ...), of equal shape, for the teacher's.

    Raises:
        ValueError: for unequal shapes.
    """
    return _half_norm(student_gradient, teacher_gradient.detach())


def gradient_symmetry_loss(gradient: Tensor, gradient_of_flipped: Tensor) -> Tensor:
    """Symmetry of the attention, without a teacher: 1/2 || J(x) - flip(J(flip(x))) ||_2.

    flip is the horizontal mirror image. The mean over the images; norm and weight as in
    :func:`gradient_attention_loss`. Both gradients are the student's: neither is a constant.

    Args:
        gradient: J of the images, (B, C, H, W).
        gradient_of_flipped: J of ``images.flip(-1)``, as it comes: this function flips it back.

    Raises:
        ValueError: for unequal shapes.
    """
    return _half_norm(gradient, gradient_of_flipped.flip(-1))


def _half_norm(a: Tensor, b: Tensor) -> Tensor:
    squares = mse(a, b, dim=tuple(range(1, a.ndim)), reduction="none")
    return mean_of(stable_root(squares)) / 2
