"""A distance of one's own: the Hellinger distance, by name in configs."""

import torch

from sssd.losses import DISTANCES, Distance


def squared_hellinger(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    dim: int,
    temperature: float,
    log_base: float,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Half the squared distance of the roots of two distributions, summed over ``dim``.

    Args:
        student, teacher: values, of which a softmax over ``dim`` makes distributions.
        mask: bool, False on values that do not count; None when all do.
    """
    if mask is not None:
        student, teacher = (x.masked_fill(~mask, -torch.inf) for x in (student, teacher))
    p, q = ((x / temperature).softmax(dim) for x in (student, teacher))
    # A root has no slope at 0: what is this small counts as 0.
    roots = [x.clamp(min=1e-12).sqrt() for x in (p, q)]
    return 0.5 * (roots[0] - roots[1]).square().sum(dim)


# Now MODEL.SSSD.DISTANCE.NAME may be "hellinger". The root is taken after the reduction.
DISTANCES["hellinger"] = Distance(squared_hellinger, root=True)
