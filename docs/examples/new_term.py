"""A method of one's own, by name in configs: similarity-preserving distillation.

new_term.py --config-file docs/examples/new_term.yaml [--resume] [KEY VALUE ...]
"""

import sssd  # noqa: F401  (before Detectron2: it applies the compatibility layer)

# isort: split
import torch.nn.functional as F
from torch import Tensor

from sssd.classification import register_term
from sssd.classification.layers import PairedTerm
from sssd.engine import argument_parser, launch_script, run_stages, setup
from sssd.losses import mse


def similarities(features: Tensor) -> Tensor:
    """How alike the images of a batch are, (B, B) with rows of unit norm, for (B, ...)."""
    features = features.flatten(1).float()
    return F.normalize(features @ features.T, dim=1)


# Now a term of a config may have the name "similarity", and the options of PairedTerm: layers.
@register_term("similarity")
class Similarity(PairedTerm):
    """Images that are alike to the teacher are so to the student (Tung and Mori, 1907.09682)."""

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The mean squared difference of the similarities, for maps (B, ...) of any widths."""
        return mse(similarities(student), similarities(teacher))


def main(args):
    return run_stages(setup(args), args.resume)


if __name__ == "__main__":
    launch_script(main, argument_parser().parse_args())
