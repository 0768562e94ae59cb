"""What stands around a stock model in training and, to everybody else, is that model."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["StudentWrapper"]


class StudentWrapper(nn.Module):
    """A module with a ``student`` whose state dict and attributes are the student's.

    What else training needs is in ``training_parts``, a module that lies beside the student in
    checkpoints. ``frozen_parameters(iteration)`` lists the parameters that a step leaves alone
    although they have gradients.
    """

    student: nn.Module
    training_parts: nn.Module
    without_training_parts: str  # what to say of a file that lacks them where they are evaluated

    @property
    def device(self) -> torch.device:
        return next(self.student.parameters()).device

    def frozen_parameters(self, iteration: int) -> list[nn.Parameter]:
        """Parameters that ``iteration`` leaves as they are although the config trains them."""
        raise NotImplementedError

    def untouched(self, iteration: int) -> Tensor | float:
        """0, through every parameter that this iteration leaves out of the graph otherwise.

        DistributedDataParallel waits for a gradient of each parameter.
        """
        return 0.0 * sum((p.sum() for p in self.frozen_parameters(iteration)), 0.0)

    def __getattr__(self, name: str) -> Any:
        """What the wrapper lacks is looked up in the student: ``model.backbone`` and the like.

        Checkpointers walk the modules by the names in the state dict; other people's code
        expects the attributes of the model that it knows.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "student" or name.startswith("__"):
                raise
            return getattr(self.student, name)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The student's, under its stock names."""
        return self.student.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Loads a stock state dict into the student; the training parts stay as they are."""
        return self.student.load_state_dict(state_dict, *args, **kwargs)

    def _load_from_state_dict(self, state_dict, prefix, *args: Any) -> None:
        # Reached only when an enclosing module loads: that walks our children by attribute names,
        # which are not the names that state_dict() gives.
        name = type(self).__name__
        raise RuntimeError(
            f"The state dict of {name} has the names of its student; load it into the {name} "
            "itself (model.module of a DistributedDataParallel), not into a module around it."
        )
