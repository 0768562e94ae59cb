"""Values for the log, which leave the device without anybody waiting for it."""

import torch
from torch import Tensor

__all__ = ["LoggedValue"]


class LoggedValue:
    """A scalar that is copied to the host in the background; ``float()`` gives it.

    By the time that a hook asks, backward pass and optimizer are queued behind the value.
    ``float(tensor)`` would wait for all of them; this waits for the copy, which is over by then.
    """

    def __init__(self, value: Tensor | float) -> None:
        """
        Args:
            value: one element on any device, or a number.
        """
        self._value, self._copied = value, None
        if isinstance(value, Tensor):
            self._value = value.detach()
            if value.is_cuda:
                on_host = torch.empty((), dtype=value.dtype, pin_memory=True)
                self._value = on_host.copy_(self._value.reshape(()), non_blocking=True)
                self._copied = torch.cuda.Event()
                self._copied.record()

    def __float__(self) -> float:
        if self._copied is not None:
            self._copied.synchronize()
        return float(self._value)
