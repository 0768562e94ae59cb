"""Relations among the embeddings of a batch (RKD, Park et al., arXiv 1904.05068).

B: samples, D: numbers in an embedding. The teacher's embeddings are constants: no gradient reaches
them. The widths D of student and teacher may differ, and so may what the axes after the first
mean: maps are flattened. Everything is computed in float32 (float64 stays float64), and a batch
too small to have a relation gives 0 with its graph. The samples are those of the call: with several
processes, each compares its own unless the caller gathers them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .divergence import _widen, mean_of
from .features import unit_vectors

__all__ = ["rkd_angle_loss", "rkd_distance_loss"]


def rkd_distance_loss(student: Tensor, teacher: Tensor, *, normalize: bool = False) -> Tensor:
    """Distance-wise RKD: the distances of all pairs follow the teacher's, up to a scale.

    Each network's distances are divided by their mean over the B (B - 1) pairs of two samples, and
    compared by SmoothL1 (beta 1), averaged over all B^2 entries, the zeros of the diagonal among
    them (official code and all peers). The student's mean has a gradient. The codes weigh this by
    25 (RepDistiller, mdistiller, mmrazor) or 1 (the authors' metric learning).

    Two samples with the same embedding are at distance 0 and give each other no gradient; in the
    codes, the root of 1e-12 there has slopes of 1e6 and more. The computation holds a few times
    B^2 + B D numbers.

    Args:
        student: (B, D, ...).
        teacher: (B, D', ...), of the same samples.
        normalize: divide each embedding by its L2 norm first. mmrazor does, the paper and the
            other codes do not.

    Raises:
        ValueError: for different numbers of samples, or a tensor without a second axis.
    """
    relations = []
    for embeddings in _embeddings(student, teacher, normalize):
        distances = _Distances.apply(embeddings)
        mean = distances.sum() / max(len(distances) * (len(distances) - 1), 1)
        # Nothing to scale where all distances are 0.
        relations.append(distances / torch.where(mean > 0, mean, 1))
    return _smooth_l1(*relations)


def rkd_angle_loss(student: Tensor, teacher: Tensor, *, normalize: bool = False) -> Tensor:
    """Angle-wise RKD: the cosines of the angles in all triangles follow the teacher's.

    The cosine of the angle at sample j between the directions to i and k, for all B^3 ordered
    triples, compared by SmoothL1 (beta 1) and averaged. Where i or k is j, or has the embedding of
    j, there is no direction: the cosine is 0 and has no gradient (official code and peers: the
    same value). The codes weigh this by 50 or (the authors' metric learning) 2, see
    :func:`rkd_distance_loss`.

    The cosines come from the lengths of the sides (law of cosines). Backward needs about six times
    B^3 numbers (B = 256: 0.4 GB, B = 1024: 26 GB in float32) and B D, where the difference vectors
    of the codes need several times B^2 D more. Rounding moves a cosine by about 1e-7 times the
    ratio of the two sides, so the direction to a sample that is almost at j is not exact; as in the
    paper, its gradient grows with the inverse of that side.

    Arguments and errors as of :func:`rkd_distance_loss`.
    """
    relations = (_cosines(x) for x in _embeddings(student, teacher, normalize))
    return _smooth_l1(*relations)


def _cosines(embeddings: Tensor) -> Tensor:
    """(B, B, B), indexed by the vertex and the two ends."""
    sides = _Distances.apply(embeddings)
    squares = sides.square()
    inverse = torch.where(sides > 0, 1 / torch.where(sides > 0, sides, 1), 0)
    doubled = squares[:, :, None] + squares[:, None, :] - squares
    return doubled * inverse[:, :, None] * (inverse[:, None, :] / 2)


class _Distances(torch.autograd.Function):
    """Euclidean distances (B, B) of all pairs of vectors (B, D).

    Equal vectors are at distance 0 exactly, with a slope of 0, which distances from products are
    not: their rounding errors grow with the vectors' norm, and the root magnifies them near 0.
    Autograd's own backward of ``cdist`` holds B^2 D numbers on a GPU; here it is a product.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
        ctx.save_for_backward(x, distances)
        return distances

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, distances = ctx.saved_tensors
        # The slope of |x_i - x_j| by x_i is (x_i - x_j) / |x_i - x_j|.
        pull = torch.where(distances > 0, (grad + grad.mT) / distances, 0)
        # The sum of pull_ij (x_i - x_j) over j, of centred vectors for the digits.
        x = x - x.mean(0)
        with torch.autocast(x.device.type, enabled=False):
            return pull.sum(1, keepdim=True) * x - pull @ x


def _embeddings(student: Tensor, teacher: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    if student.ndim < 2 or teacher.ndim < 2 or len(student) != len(teacher):
        raise ValueError(
            "RKD needs embeddings (samples, ...) of the same samples from student and teacher, got "
            f"the shapes {tuple(student.shape)} and {tuple(teacher.shape)}; flatten or pool the "
            "features of each sample, and keep the batch axis first."
        )
    student, teacher = (_widen(x).flatten(1) for x in (student, teacher.detach()))
    return (unit_vectors(student), unit_vectors(teacher)) if normalize else (student, teacher)


def _smooth_l1(student: Tensor, teacher: Tensor) -> Tensor:
    return mean_of(F.smooth_l1_loss(student, teacher, reduction="none"))
