"""What a run needs to go on exactly, besides the states of model, optimizer and schedules."""

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, JSONWriter
from fvcore.common.history_buffer import HistoryBuffer
from torch import nn

from ..random_state import random_state, set_random_state

__all__ = ["RunState", "cut_to_whole_lines"]

logger = logging.getLogger("sssd")

# Values of each scalar that are kept; writers look at the last 20.
_HISTORY = 100
# Belongs to the machine, and would be written as of an iteration that is over.
_CLOCK = ("time", "data_time", "rank_data_time", "eta_seconds", "max_memory_mb")
# Of RetinaNet and FCOS: the average number of positive anchors, a plain attribute.
_AVERAGE = "loss_normalizer"


class RunState(HookBase):
    """Keeps the state in which an iteration leaves the run, for every checkpoint of it.

    That is: of each process the random streams and what the model averages in plain attributes;
    the position in the training data; the values that have been logged, and which of them have been
    written. It goes before everything that saves, evaluates or writes, and a resume does that part
    of the iteration again (:class:`sssd.engine.training_hooks.GoOn`). So whatever is saved after an
    iteration, before or after its evaluation, goes on in the same way.
    """

    def __init__(self, model: nn.Module, loaders: Mapping[str, Any], periods: Sequence[int]):
        """
        Args:
            model: as it is trained, without DistributedDataParallel around it.
            loaders: those with a state, by name.
            periods: of what saves, evaluates or writes; only then the states of all processes are
                gathered.
        """
        self._model = model
        self._loaders = loaders
        self._periods = [period for period in periods if period > 0]
        self._state: dict[str, Any] = {}
        self.loaded: dict[str, Any] = {}

    def after_step(self) -> None:
        self.keep()
        following = self.trainer.iter + 1
        if following >= self.trainer.max_iter or any(following % p == 0 for p in self._periods):
            self.gather()

    def keep(self) -> None:
        """Keeps the state of this process as it is now."""
        device = next(self._model.parameters()).device
        averages = {
            name: getattr(module, _AVERAGE)
            for name, module in self._model.named_modules()
            if _AVERAGE in vars(module)
        }
        self._state = {
            "max_iter": self.trainer.max_iter,
            "processes": [{"random": random_state(device), "averages": averages}],
            "loaders": {name: loader.state_dict() for name, loader in self._loaders.items()},
            "events": _events(self.trainer.storage),
            "writers": [_writer_state(writer) for writer in _writers(self.trainer)],
        }

    def gather(self) -> None:
        """Brings what was kept by every process together on the main one."""
        processes = comm.gather(self._state["processes"][0])
        if comm.is_main_process():
            self._state["processes"] = processes

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state
        for name, loader in self._loaders.items():
            if name in state["loaders"]:
                loader.load_state_dict(state["loaders"][name])

    def put_back(self) -> None:
        """Streams, averages, logged values and files as they were when the state was kept."""
        processes, rank = self.loaded["processes"], comm.get_rank()
        if rank < len(processes):
            device = next(self._model.parameters()).device
            set_random_state(processes[rank]["random"], device)
            modules = dict(self._model.named_modules())
            for name, value in processes[rank]["averages"].items():
                setattr(modules[name], _AVERAGE, value)
        else:
            logger.warning(
                "The checkpoint has the random states of %d processes and there are %d: this one "
                "draws anew.",
                len(processes),
                comm.get_world_size(),
            )
        _set_events(self.trainer.storage, self.loaded["events"])
        for writer, state in zip(_writers(self.trainer), self.loaded["writers"], strict=False):
            if self.loaded["max_iter"] == self.trainer.max_iter:
                writer._last_write = state["last_write"]
                if isinstance(writer, JSONWriter):
                    # What was written after the checkpoint is about to be written again.
                    _cut(writer, state["size"])
                continue
            # A run that is made longer keeps the end of the shorter one and its evaluation.
            writer._last_write = self.trainer.start_iter - 1
            if isinstance(writer, JSONWriter):
                cut_to_whole_lines(writer)
                if os.path.getsize(writer._file_handle.name) <= state["size"]:  # it had no end
                    writer._last_write = state["last_write"]

    def begin(self) -> None:
        """In a folder that has been used, the logged values of the new run begin a new file."""
        for writer in _writers(self.trainer):
            if isinstance(writer, JSONWriter) and os.path.getsize(writer._file_handle.name):
                path = writer._file_handle.name
                shutil.copyfile(path, path + "_of_earlier_run")
                _cut(writer, 0)


def _events(storage: EventStorage) -> dict[str, Any]:
    return {
        "latest": {k: v for k, v in storage.latest().items() if k not in _CLOCK},
        "hints": {k: v for k, v in storage.smoothing_hints().items() if k not in _CLOCK},
        "histories": {
            name: {"values": history._data[-_HISTORY:], "count": history._count,
                   "average": history._global_avg}
            for name, history in storage.histories().items()
            if name not in _CLOCK
        },
    }  # fmt: skip


def _set_events(storage: EventStorage, state: dict[str, Any]) -> None:
    storage.latest().update(state["latest"])
    storage.smoothing_hints().update(state["hints"])
    for name, kept in state["histories"].items():
        history = HistoryBuffer()
        history._data = list(kept["values"])
        history._count, history._global_avg = kept["count"], kept["average"]
        storage.histories()[name] = history


def _writers(trainer: Any) -> list[Any]:
    """Writers that remember what they have written."""
    writers = [w for h in trainer._hooks if isinstance(h, hooks.PeriodicWriter) for w in h._writers]
    return [writer for writer in writers if isinstance(getattr(writer, "_last_write", None), int)]


def _writer_state(writer: Any) -> dict[str, int]:
    state = {"last_write": writer._last_write}
    if isinstance(writer, JSONWriter):
        state["size"] = os.fstat(writer._file_handle.fileno()).st_size
    return state


def cut_to_whole_lines(writer: JSONWriter) -> None:
    """Takes away the part of a line behind which the disk was full or the process killed."""
    with open(writer._file_handle.name, "rb") as file:
        _cut(writer, file.read().rfind(b"\n") + 1)


def _cut(writer: JSONWriter, size: int) -> None:
    path = writer._file_handle.name
    if os.path.getsize(path) > size:
        os.truncate(path, size)
