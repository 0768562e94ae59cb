"""What torch allocates, counted: deterministic, unlike the memory of the process."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class NewBytes(TorchDispatchMode):
    """Bytes of the tensors that operations make; views and results in place are no new ones.

    The tensors that an operation needs for the time of its own run do not show.
    """

    def __init__(self):
        super().__init__()
        self.sizes: list[int] = []

    @property
    def largest(self) -> int:
        return max(self.sizes)

    @property
    def total(self) -> int:
        return sum(self.sizes)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and _storage(x) not in known:
                self.sizes.append(x.untyped_storage().nbytes())
        return result


def _storage(x):
    return x.untyped_storage().data_ptr()
