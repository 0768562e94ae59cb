"""The hooks of a training, for yacs and for LazyConfig, and their order."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from detectron2.engine import HookBase, TrainerBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from torch import nn

from ..meta_arch import SelfDistiller
from .averaging import AveragedWeights, UpdateAverage
from .checkpoint import Checkpointer
from .hooks import BestCheckpointer, DistillationMetrics
from .run_state import RunState
from .stop import EvalHook, PeriodicWriter, StopInOrder

__all__ = ["save_last_good", "training_hooks"]


def training_hooks(
    model: nn.Module,
    checkpointer: Checkpointer,
    *,
    loaders: Mapping[str, Any],
    scheduler: hooks.LRScheduler,
    precise_bn: hooks.PreciseBN | None = None,
    checkpoint_period: int,
    eval_period: int,
    evaluate: Callable[[], Mapping[str, Any] | None],
    best_metric: str = "",
    make_writers: Callable[[], Sequence[EventWriter]],
    writer_period: int = 20,
    max_to_keep: int | None = None,
    averaged: AveragedWeights | None = None,
) -> list[HookBase]:
    """What happens around each iteration.

    Args:
        model: as it is trained, without DistributedDataParallel around it.
        checkpointer: of the run.
        loaders: that a resume goes on with, by name; those without a state are left out.
        scheduler: of the learning rate.
        precise_bn: estimates running statistics anew, before they are saved and evaluated.
        checkpoint_period, eval_period: in iterations; 0 for the end only.
        evaluate: returns results by task and metric.
        best_metric: by which the best checkpoint is chosen, such as "bbox/AP"; "" for none.
        make_writers: called by the main process only.
        writer_period: in iterations.
        max_to_keep: checkpoints of the period; None for all.
        averaged: weights that take every iteration into their average.
    """
    loaders = {name: loader for name, loader in loaders.items() if hasattr(loader, "state_dict")}
    run_state = RunState(model, loaders, [checkpoint_period, eval_period, writer_period])
    stop = StopInOrder(checkpointer, run_state)
    main = comm.is_main_process()
    found = [
        # First, so that every writer of the same iteration finds the values.
        DistillationMetrics(model) if isinstance(model, SelfDistiller) else None,
        hooks.IterationTimer(),
        scheduler,
        precise_bn,
        UpdateAverage(averaged) if averaged is not None else None,
        # What follows saves, evaluates or writes; a resume does it again (see GoOn).
        run_state,
        hooks.PeriodicCheckpointer(checkpointer, checkpoint_period, max_to_keep=max_to_keep)
        if main
        else None,
        stop,
        EvalHook(eval_period, evaluate, stop),
        BestCheckpointer(eval_period, checkpointer, best_metric) if main and best_metric else None,
        PeriodicWriter(make_writers(), writer_period, stop) if main else None,
        GoOn(run_state, stop),
    ]
    return [hook for hook in found if hook is not None]


class GoOn(HookBase):
    """The last hook: in a resumed run it first does what was left of the interrupted iteration."""

    def __init__(self, run_state: RunState, stop: StopInOrder) -> None:
        self._run_state, self._stop = run_state, stop

    def before_train(self) -> None:
        trainer = self.trainer
        if trainer.start_iter >= trainer.max_iter:
            # Detectron2 adds one after the last iteration, also where there was none.
            trainer.iter = trainer.max_iter - 1
        if not self._run_state.loaded:
            if trainer.start_iter == 0:
                self._run_state.begin()
            return
        self._run_state.put_back()
        trainer.iter = trainer.storage.iter = trainer.start_iter - 1
        self._run_state.keep()
        self._run_state.gather()
        registered = trainer._hooks
        following = registered[registered.index(self._run_state) + 1 : registered.index(self)]
        for hook in following:
            if not isinstance(hook, (hooks.PeriodicCheckpointer, StopInOrder)):
                hook.after_step()

    def after_train(self) -> None:
        self._stop.put_back_handlers()


def save_last_good(trainer: TrainerBase, checkpointer: Checkpointer) -> str:
    """Saves the state that the iteration before left, in one that fails; returns the file."""
    trainer.iter -= 1
    checkpointer.save("model_last_good", iteration=trainer.iter)
    return os.path.join(checkpointer.save_dir, "model_last_good.pth")
