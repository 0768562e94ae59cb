"""Several trained classifiers as one."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..losses import mean_ensemble

__all__ = ["NetworkEnsemble"]


class NetworkEnsemble(nn.Module):
    """The mean of what several classifiers predict, for generations of students.

    Born-Again networks (arXiv 1805.04770) average the students without the first network, which
    learned without a teacher; both are reported.
    """

    def __init__(self, members: Mapping[str, nn.Module], *, average: str = "probabilities") -> None:
        """
        Args:
            members: name -> model that returns ``{"logits": {"student": (K,), ...}}`` for each
                image; from the first generation to the last.
            average: "probabilities" or "logits" (:func:`sssd.losses.mean_ensemble`).
        """
        super().__init__()
        self.members = nn.ModuleDict(members)
        self.average = average
        self.eval()

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Logits of the last member as "student", and those of the ensembles."""
        logits = [
            torch.stack([x["logits"]["student"] for x in member(batched_inputs)])
            for member in self.members.values()
        ]
        first, *students = logits
        named = {
            "student": logits[-1],
            "ensemble": mean_ensemble(students or [first], average=self.average),
            "ensemble_with_first": mean_ensemble(logits, average=self.average),
        }
        return [
            {"logits": {name: x[i] for name, x in named.items()}}
            for i in range(len(batched_inputs))
        ]
