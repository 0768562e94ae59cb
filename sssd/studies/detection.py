"""Makes the runs of a plan of detectors, and writes what they say."""

import queue
import signal
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..engine.signals import limit_time
from .figures import draw_study
from .plan import VARIATION, Plan, Training
from .progress import complete, failure
from .report import study_tables, variants_of
from .training import Processes, TrainingFailed, TrainingStopped, check, read_record, train
from .variation import variation_text

__all__ = ["run_studies", "write_studies"]


def run_studies(
    plan: Plan,
    folder: Path,
    scratch: Path,
    tools: Path,
    *,
    names: Sequence[str] = (),
    places: Sequence[Mapping[str, str]],
    hours: float | None = None,
) -> list[str]:
    """Makes the runs that have no record; the first studies of the plan first.

    When its time is over, or on SIGTERM, SIGHUP or Ctrl-C, the runs that are going on save and
    stop; the next call goes on with them.

    Args:
        folder: of the plan and its records.
        scratch: folder of checkpoints and logs.
        tools: folder of train_net.py.
        names: of the studies; empty for all.
        places: environment variables of the runs that go on beside each other.
        hours: that it may take; None for no limit.

    Returns:
        A sentence for each run that has failed, without its full stop.

    Raises:
        ValueError: a run cannot begin, because of its config.
        SystemExit: it was told to stop.
    """
    trainings = [t for t in plan.trainings(names) if read_record(folder, t) is None]
    for training in trainings:
        check(plan, training)
    processes = Processes()
    failures: list[str] = []
    free: queue.Queue[Mapping[str, str]] = queue.Queue()
    for place in places:
        free.put(place)

    def make(training: Training) -> dict[str, Any]:
        place = free.get()
        try:
            return train(plan, training, folder, scratch / training.name, tools, place, processes)
        finally:
            free.put(place)

    def finished(training: Training, future: Future) -> str:
        try:
            figure = future.result()["validation"].get(plan.metric, float("nan"))
        except (TrainingFailed, TrainingStopped) as error:
            failures.append(str(error))
        except (OSError, ValueError) as error:  # a full disk, a config that was edited meanwhile
            failures.append(failure(training.name, error))
        else:
            return f"{training.name}: {figure:.2f} {plan.metric} on {plan.validation}"
        return failures[-1]

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores the latter
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    limit_time(None if hours is None else 3600 * hours)
    with ThreadPoolExecutor(len(places)) as pool:
        try:
            complete(
                trainings,
                lambda training: pool.submit(make, training),
                finished,
                at_a_time=len(places),
            )
        except (KeyboardInterrupt, SystemExit) as stop:
            # The pool waits for them.
            processes.stop()
            status = stop.code if isinstance(stop, SystemExit) else 128 + signal.SIGINT
            print("compare: stopped; the same command goes on with what is left.", file=sys.stderr)
            raise SystemExit(status) from None
    return failures


def write_studies(plan: Plan, folder: Path, names: Sequence[str] = ()) -> str:
    """Writes tables and pictures beside the plan; returns the tables.

    These are ``<study>.md`` of the studies named (of all, without a name), and ``variation.md`` of
    the whole plan.
    """
    texts = []
    for study in plan.chosen(names):
        found = variants_of(plan, study.trainings, folder)
        if not found:
            continue
        drawn = draw_study(plan, study, found, folder)
        pictures = [f"![{path.stem}]({path.name})\n" for path in drawn]
        text = "\n".join([study_tables(plan, study, found), *pictures])
        (folder / f"{study.name}.md").write_text(text)
        texts.append(text)
    if text := variation_text(plan, folder):
        (folder / f"{VARIATION}.md").write_text(text)
        texts.append(text)
    return "\n".join(texts)
