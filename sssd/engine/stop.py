"""Ends a run in order: on SIGTERM, when its time is over, and when the disk refuses."""

import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, JSONWriter

from ..disk import complaint, is_of_a_file, naming
from ..random_state import undisturbed
from .checkpoint import Checkpointer, CheckpointError
from .processes import gloo_group
from .run_state import RunState, cut_to_whole_lines
from .signals import REASON, STATUS

__all__ = ["EvalHook", "PeriodicWriter", "StopInOrder"]

logger = logging.getLogger("sssd")


class StopInOrder(HookBase):
    """Saves and exits after the iteration in which SIGTERM or the end of the time has come.

    An evaluation is broken off at once: a resume does it again. All processes stop after the same
    iteration, also when only one got the signal.

    When an evaluation fails, or what is logged cannot be written, the main process saves as well,
    if there is room; a resume does that part of the iteration again.
    """

    def __init__(self, checkpointer: Checkpointer, run_state: RunState) -> None:
        """
        Args:
            checkpointer: saves "model_interrupted", where the iteration is not saved already.
            run_state: comes before this hook.
        """
        self._checkpointer = checkpointer
        self._run_state = run_state
        self._status = 0  # with which to exit; 0 to go on
        self._evaluating = False
        self._before: dict[int, Any] = {}  # signal handlers
        self._group: Any = None
        self._agreement: tuple[Any, torch.Tensor] | None = None
        self.stopped = False

    def before_train(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # only there Python can handle signals
        self._before = {number: signal.signal(number, self._note) for number in STATUS}
        if comm.get_world_size() > 1:
            self._group = gloo_group()

    def put_back_handlers(self) -> None:
        """When the last evaluation is over, which is later than this hook's ``after_train``."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def before_step(self) -> None:
        if self._group is not None:
            # While the iteration computes, the processes tell each other.
            status = torch.tensor(self._status)
            work = dist.all_reduce(status, dist.ReduceOp.MAX, self._group, async_op=True)
            self._agreement = work, status

    def after_step(self) -> None:
        status = self._status
        if self._agreement is not None:
            work, agreed = self._agreement
            work.wait()
            status = int(agreed)
        if status:
            self._run_state.gather()
            self._stop(status)

    @property
    def folder(self) -> str:
        """Of the checkpoints."""
        return self._checkpointer.save_dir

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Inside, a signal ends the run without waiting for the iteration; so does a failure."""
        status = torch.tensor(self._status)
        if self._group is not None:
            dist.all_reduce(status, dist.ReduceOp.MAX, self._group)
        try:
            self._evaluating = True
            if status:
                raise SystemExit(int(status))
            yield
        # Saved is out here, where the model has its own weights: the averaged ones are evaluated
        # in their place.
        except SystemExit as ended:
            if ended.code in REASON:
                self._stop(ended.code)
            raise
        except Exception as error:
            self._evaluating = False
            if isinstance(error, OSError) and is_of_a_file(error):
                self.give_up(error)
            with suppress(CheckpointError):
                self._save()
            raise
        finally:
            self._evaluating = False

    def _note(self, number: int, frame: Any) -> None:
        self._status = self._status or STATUS[signal.Signals(number)]
        if self._evaluating:
            self._evaluating = False
            raise SystemExit(self._status)

    def _stop(self, status: int) -> NoReturn:
        self.stopped = True
        iteration = self._save()
        logger.info(
            "Stopped after iteration %d, which is saved, because %s; --resume goes on.",
            iteration,
            REASON[status],
        )
        if self._group is not None:
            # Whoever ends first must not take the one that saves with it.
            with suppress(RuntimeError):
                dist.monitored_barrier(self._group, timeout=timedelta(minutes=1))
        raise SystemExit(status)

    def give_up(self, error: OSError) -> NoReturn:
        """Saves, if there is room, and exits with what cannot be read or written.

        The other processes wait for this one, and end with it.

        Raises:
            SystemExit: with the sentence.
        """
        self.stopped = True
        begin = "the newest checkpoint"
        try:
            iteration = self._save()
            if comm.is_main_process():
                begin = f"iteration {iteration}, which is saved"
        except CheckpointError:
            begin += ", which is unharmed: this iteration cannot be saved either"
        raise SystemExit(f"error: {complaint(error)}, and go on with --resume from {begin}.")

    def _save(self) -> int:
        """Sees that a resume can go on behind the iteration; returns its number."""
        iteration = min(self.trainer.iter, self.trainer.max_iter - 1)
        if self._checkpointer.last_iteration != iteration:
            self._checkpointer.save("model_interrupted", iteration=iteration)
        return iteration


class EvalHook(hooks.EvalHook):
    """Detectron2's, which a signal can break off.

    It draws nothing from the streams of the training: mappers draw at test time as well, without
    workers in this process.
    """

    def __init__(self, eval_period: int, eval_function: Any, stop: StopInOrder) -> None:
        super().__init__(eval_period, eval_function)
        self._stop_in_order = stop

    def _do_eval(self) -> None:
        with self._stop_in_order.evaluation(), undisturbed():
            super()._do_eval()

    def after_train(self) -> None:
        # Detectron2 also evaluates after a failure in the last iteration.
        if self.trainer.iter >= self.trainer.max_iter and not self._stop_in_order.stopped:
            super().after_train()


class PeriodicWriter(hooks.PeriodicWriter):
    """Detectron2's, which ends the run in order when something cannot be written."""

    def __init__(self, writers: Sequence[EventWriter], period: int, stop: StopInOrder) -> None:
        super().__init__(writers, period)
        self._stop_in_order = stop

    def after_step(self) -> None:
        following = self.trainer.iter + 1
        if following % self._period and following != self.trainer.max_iter:
            return
        try:
            for writer in self._writers:
                with self._naming(writer):
                    writer.write()
        except OSError as error:
            self._stop_in_order.give_up(error)

    def after_train(self) -> None:
        complete = self.trainer.iter >= self.trainer.max_iter and not self._stop_in_order.stopped
        errors = []
        for writer in self._writers:
            try:
                with self._naming(writer):
                    writer.write()
                    writer.close()
            except OSError as error:
                errors.append(error)
                _close(writer)
        if errors and complete:
            self._stop_in_order.give_up(errors[0])
        if errors:  # beside whatever has ended the run
            logger.warning("%s.", complaint(errors[0]))

    def _naming(self, writer: EventWriter) -> Any:
        folder = self._stop_in_order.folder
        handle = getattr(writer, "_file_handle", None)
        return naming(handle.name if handle else f"{folder} ({type(writer).__name__})")


def _close(writer: EventWriter) -> None:
    """After a failure, with whole lines only."""
    with suppress(OSError):
        writer.close()
    if isinstance(writer, JSONWriter):
        with suppress(OSError):
            cut_to_whole_lines(writer)
