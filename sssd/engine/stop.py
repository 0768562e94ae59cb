"""Ends a run in order: on SIGTERM (pre-emptible machines) and when its time is over."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from ..random_state import undisturbed
from .checkpoint import Checkpointer
from .run_state import RunState
from .signals import REASON, STATUS

__all__ = ["EvalHook", "StopInOrder"]

logger = logging.getLogger("sssd")


class StopInOrder(HookBase):
    """Saves and exits after the iteration in which SIGTERM or the end of the time has come.

    An evaluation is broken off at once: a resume does it again. All processes stop after the same
    iteration, also when only one got the signal.
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
            self._group = dist.new_group(backend="gloo")

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

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Inside, a signal ends the run without waiting for the iteration."""
        status = torch.tensor(self._status)
        if self._group is not None:
            dist.all_reduce(status, dist.ReduceOp.MAX, self._group)
        self._evaluating = True
        try:
            if status:
                self._stop(int(status))
            yield
        finally:
            self._evaluating = False

    def _note(self, number: int, frame: Any) -> None:
        self._status = self._status or STATUS[signal.Signals(number)]
        if self._evaluating:
            self._evaluating = False
            self._stop(self._status)

    def _stop(self, status: int) -> None:
        self.stopped = True
        iteration = min(self.trainer.iter, self.trainer.max_iter - 1)
        if self._checkpointer.last_iteration != iteration:
            self._checkpointer.save("model_interrupted", iteration=iteration)
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
