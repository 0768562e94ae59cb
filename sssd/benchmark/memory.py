"""How much memory a process uses at most, and when its device has finished."""

import ctypes
import gc
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

__all__ = ["PeakMemory", "separate_blocks", "synchronise", "use_torch_once"]

# Of GNU's malloc.h.
_MMAP_THRESHOLD = -3
_TRIM_THRESHOLD = -1


class PeakMemory:
    """The most memory that was in use since it was made.

    It is that of weights, activations, gradients and the optimizer's state: on a GPU what torch has
    allocated there, on a CPU the resident set of the process without libraries and data set, which
    were there at the start. What tensors need shows with `separate_blocks` only.
    """

    def __init__(self, device: torch.device, model: nn.Module) -> None:
        """
        Args:
            model: whose weights are there already, and count.
        """
        self._device = device
        self._before: int | None = 0
        self._kept: dict[str, int | None] | None = None
        gc.collect()
        if device.type == "cuda":
            self.restart_peak()
            return
        # What was freed goes back to the system, or the steps would use it unseen.
        with suppress(AttributeError, OSError, TypeError):  # another C library than GNU's
            ctypes.CDLL(None).malloc_trim(0)
        try:
            self._before = _status("VmRSS") - _bytes_of(model)
        except OSError:
            self._before = None  # no Linux
        self.restart_peak()

    def restart_peak(self) -> None:
        """The peak starts at what is in use now; what was there before stays what it was."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self._before = None

    def stop_on_cpu(self) -> None:
        """What a CPU uses from now on does not count."""
        if self._device.type == "cpu":
            self._kept = self.read()

    def read(self) -> dict[str, int | None]:
        """``peak``, and how much of it does not count (``before``), in bytes; None if unknown."""
        if self._kept is not None:
            return self._kept
        if self._device.type == "cuda":
            return {"before": 0, "peak": torch.cuda.max_memory_allocated(self._device)}
        return {
            "before": self._before,
            "peak": None if self._before is None else _status("VmHWM"),
        }


def separate_blocks(separate: bool) -> None:
    """Whether the resident set is what tensors in use take, or what the allocator holds as well.

    GNU's allocator keeps freed blocks for others of their size, so a step whose tensors have many
    sizes can seem to need more memory than one whose tensors are larger. If they are separate, each
    tensor of 128 KiB or more has pages of its own, which the system gets back with it (and has to
    clear for the next one: steps take longer). That is to begin before any are freed. If not, the
    allocator's thresholds are those that it arrives at by itself.
    """
    with suppress(AttributeError, OSError, TypeError):  # another C library
        set_option = ctypes.CDLL(None).mallopt
        set_option(_MMAP_THRESHOLD, 2**17 if separate else 2**25)
        set_option(_TRIM_THRESHOLD, 2**17 if separate else 2**26)


def use_torch_once(device: torch.device) -> None:
    """A step of next to nothing, for what torch loads and starts in the first step of a process."""
    layers = nn.Sequential(
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 8)
    ).to(device)  # fmt: skip
    optimizer = torch.optim.SGD(layers.parameters(), 0.1, momentum=0.9)
    for precision in (torch.float32, torch.bfloat16):
        with torch.autocast(device.type, precision, enabled=precision is not torch.float32):
            layers(torch.zeros(2, 8, 4, 4, device=device)).sum().backward()
        optimizer.step()


def synchronise(device: torch.device) -> None:
    """Waits until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _bytes_of(model: nn.Module) -> int:
    return sum(x.nbytes for x in (*model.parameters(), *model.buffers()))


def _status(key: str) -> int:
    """Bytes that Linux reports of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
