"""One run of a plan, in a process of its own, and its record."""

import fcntl
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode

from ..engine.config_check import check_values
from ..engine.config_file import load_config
from ..engine.signals import REASON, STATUS
from ..visualization import read_metrics
from .plan import Plan, Training
from .records import commit, config_digest, public_log, read_json, same_settings, write_record

__all__ = ["Processes", "TrainingFailed", "TrainingStopped", "check", "read_record", "train"]

Metrics = Sequence[Mapping[str, float]]

_IDENTITY = "training.txt"
_AVERAGED = "averaged/"
# By these a training is stopped on purpose; by another signal it has failed.
_STOPS = {-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP, *REASON}


class TrainingFailed(RuntimeError):
    """A run has ended with an error."""


class TrainingStopped(RuntimeError):
    """A run was told to end, and will go on from where it was."""


class Processes:
    """Those that run, from any thread; told to stop, they end in order, and no other begins."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen] = set()
        self._stopped = False

    def run(self, command: Sequence[str], **options: Any) -> int:
        """Waits for a process; returns its exit status, that of SIGTERM if none may begin."""
        with self._lock:
            if self._stopped:
                return STATUS[signal.SIGTERM]
            # Ctrl-C is not for it: whoever began it ends it in order.
            process = subprocess.Popen(command, start_new_session=True, **options)
            self._running.add(process)
        status = process.wait()
        with self._lock:
            self._running.discard(process)
        return status

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()


def check(plan: Plan, training: Training) -> None:
    """Raises ValueError for a run whose config cannot be used, or that will not have the figure by
    which the plan judges, before hours are spent on others."""
    try:
        cfg = _config(training)
        check_values(cfg)
    except (ValueError, OSError, KeyError, AssertionError) as error:
        raise ValueError(f"{training.name} cannot be run: {error}") from error
    if plan.metric.startswith(_AVERAGED) and not cfg.MODEL.SSSD.AVERAGING.DECAY:
        raise ValueError(
            f"{training.name} will have no {plan.metric}, by which the plan judges: give it "
            "MODEL.SSSD.AVERAGING.DECAY, or judge by another metric."
        )


def read_record(folder: Path, training: Training) -> dict[str, Any] | None:
    """What is kept of a run that is complete; None if its settings were others.

    Args:
        folder: of the plan.
    """
    record = read_json(folder / training.name)
    if record is None or not same_settings(record["settings"], _settings(training)):
        return None
    return record


def train(
    plan: Plan,
    training: Training,
    folder: Path,
    output: Path,
    tools: Path,
    environment: Mapping[str, str],
    processes: Processes,
) -> dict[str, Any]:
    """Makes a run, or goes on with it, and writes its record.

    Args:
        plan: that has it.
        folder: of the plan, where records are kept.
        output: folder of its checkpoints and logs; they stay.
        tools: folder of train_net.py.
        environment: variables of the process, besides this one's.
        processes: which it becomes one of.

    Returns:
        The record: settings, figures by split, share of the distillation, seconds of an iteration,
        commit.

    Raises:
        TrainingFailed: it has ended with an error, another process trains in its folder, or that
            holds something else.
        TrainingStopped: it was told to end.
    """
    with _locked(output, training) as lock:
        settings = _settings(training)  # of now: the config may be edited while it runs
        _keep_only_what_continues(output, settings)
        labelenc = _config(training).MODEL.SSSD.TEACHER.NAME == "label_map"
        script = tools / ("train_labelenc.py" if labelenc else "train_net.py")
        command = [
            sys.executable, script, "--resume", "--config-file", training.config,
            "SEED", training.seed, "OUTPUT_DIR", output, *training.options,
        ]  # fmt: skip
        with open(output / "console.txt", "a") as console:
            status = processes.run(
                list(map(str, command)),
                env={**os.environ, **environment},
                stdout=console,
                stderr=subprocess.STDOUT,
                pass_fds=(lock,),  # it holds the folder, also when it outlives this process
            )
        if status in _STOPS:
            raise TrainingStopped(f"{training.name} was stopped")
        if status:
            lines = (output / "console.txt").read_text(errors="replace").strip().splitlines()
            reason = lines[-1] if lines else f"status {status}"
            if status < 0:
                reason = f"ended by {signal.Signals(-status).name}"
            raise TrainingFailed(
                f"{training.name} has failed ({reason}); see {output / 'console.txt'}"
            )
        return _keep(plan, training, settings, folder, output, "step2" if labelenc else "")


def _config(training: Training) -> CfgNode:
    return load_config(training.config, [_as_option(x) for x in training.options])


def _as_option(value: Any) -> Any:
    """As a command line has it."""
    return value if isinstance(value, str) else str(value)


def _settings(training: Training) -> dict[str, Any]:
    """What tells a run from one that only has its name."""
    options = [_as_option(x) for x in training.options]
    return {"config": training.config, "options": options, **config_digest(training.config)}


@contextmanager
def _locked(output: Path, training: Training) -> Iterator[int]:
    """Nobody else trains in the folder meanwhile; gives the descriptor that holds it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output.with_name(f"{output.name}.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingFailed(
                f"{training.name} has failed (another process trains in {output}: wait for its "
                "end, or stop it)"
            ) from None
        yield file.fileno()


def _keep_only_what_continues(output: Path, settings: Mapping[str, Any]) -> None:
    """Of a run with other settings nothing is gone on with.

    Raises:
        TrainingFailed: the folder is none of a comparison's.
    """
    identity = output / _IDENTITY
    wanted = str(settings)
    if output.is_dir() and any(output.iterdir()):
        if not identity.is_file():
            raise TrainingFailed(
                f"{output} holds something else than a run of compare.py: move it, or give another "
                "--scratch"
            )
        if identity.read_text() != wanted:
            shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    identity.write_text(wanted)


def _keep(
    plan: Plan,
    training: Training,
    settings: Mapping[str, Any],
    folder: Path,
    output: Path,
    step: str,
) -> dict[str, Any]:
    metrics = read_metrics(output / step / "metrics.json")
    record = {
        "detector": training.detector,
        "variant": training.variant,
        "seed": training.seed,
        "settings": settings,
        **{
            split: final_figures(metrics, name, alone=not plan.test)
            for split, name in (("validation", plan.validation), ("test", plan.test))
            if name
        },
        "share": shares(metrics, plan.early),
        # What is logged when all is over has an iteration that is one too high.
        "iterations": 1 + max(int(line["iteration"]) for line in metrics if "total_loss" in line),
        "seconds_per_iteration": _median(metrics, "time"),
        "commit": commit(),
        "torch": torch.__version__,
    }
    places = {"$OUTPUT_DIR": output}
    if root := os.environ.get("DETECTRON2_DATASETS"):
        places["$DETECTRON2_DATASETS"] = Path(root)
    log = public_log(output / step / "log.txt", places)
    write_record(folder / training.name, record, metrics, log)
    return record


def figures_of(line: Mapping[str, float], dataset: str, *, alone: bool) -> dict[str, float]:
    """The figures of a dataset in a line of metrics.json, such as {"bbox/AP": 40.0}.

    Args:
        alone: whether the run has evaluated no other dataset; then its name is left out there.
    """
    prefix = "" if alone else f"{dataset}/"
    return {
        key.removeprefix(prefix): value
        for key, value in line.items()
        if key.startswith(prefix) and "bbox/AP" in key
    }


def final_figures(metrics: Metrics, dataset: str, *, alone: bool) -> dict[str, float]:
    """The figures of the last evaluation."""
    evaluations = [figures_of(line, dataset, alone=alone) for line in metrics]
    return {k: round(v, 4) for k, v in next(filter(None, reversed(evaluations)), {}).items()}


def shares(metrics: Metrics, early: int) -> dict[str, float] | None:
    """Mean share of the distillation in the total loss, at first and in the last tenth.

    Args:
        early: number of first iterations that count as the first.

    Returns:
        None for a run without distillation.
    """
    key = "loss_distill/share"
    values = {int(line["iteration"]): line[key] for line in metrics if key in line}
    if not values:
        return None
    last = max(values)
    parts = {
        "early": [v for i, v in values.items() if i < early],
        "end": [v for i, v in values.items() if i > 0.9 * last],
    }
    return {name: round(statistics.mean(v), 4) for name, v in parts.items() if v}


def _median(metrics: Metrics, key: str) -> float | None:
    values = [line[key] for line in metrics if key in line]
    return round(statistics.median(values), 4) if values else None
