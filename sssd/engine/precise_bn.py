"""Which layers PreciseBN may measure: those that run."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

__all__ = ["RunningParts"]


class RunningParts(nn.Module):
    """The parts of a model that a pass without gradients runs, for Detectron2's PreciseBN.

    It measures every layer of what it is given that is in training mode, and takes a layer that
    does not run for one whose inputs are 0.
    """

    def __init__(self, parts: Iterable[nn.Module], run: Callable[[Any], Any]) -> None:
        """
        Args:
            parts: that run.
            run: the pass, of a batch.
        """
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self._run = run

    def forward(self, batched_inputs: Any) -> Any:
        return self._run(batched_inputs)
