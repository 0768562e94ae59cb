"""What the command lines share."""

import argparse
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from detectron2.engine import default_argument_parser

from ..data.errors import last_word_of_worker
from ..disk import complaint, is_of_a_file
from .checkpoint import CheckpointError
from .processes import launch
from .signals import limit_time

__all__ = ["USER_ERRORS", "argument_parser", "launch_script", "user_errors"]

# What the user can mend, said in one sentence each.
USER_ERRORS = (
    CheckpointError,
    FileNotFoundError,
    FloatingPointError,
    ValueError,  # with those of the data
)


@contextmanager
def user_errors(*others: type[Exception]) -> Iterator[None]:
    """Ends the program with the sentence of an error that needs no traceback.

    Args:
        others: errors of this program's own, besides `USER_ERRORS`.
    """
    try:
        yield
    except OSError as error:
        if not is_of_a_file(error):
            raise
        sys.exit(f"error: {_reason(complaint(error))}.")
    except (*USER_ERRORS, *others) as error:
        sys.exit(f"error: {_reason(str(error))}")


def _reason(message: str) -> str:
    of_worker = last_word_of_worker(message)
    return message if of_worker is None else of_worker.partition(": ")[2]


def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's flags, ``--time-limit`` and ``--timeout``."""
    parser = default_argument_parser()
    parser.add_argument(
        "--time-limit",
        type=duration,
        metavar="TIME",
        help="seconds, or [[days-]hours:]minutes:seconds; then save, exit with status 75, and go "
        "on with --resume",
    )
    parser.add_argument(
        "--timeout",
        type=duration,
        metavar="TIME",
        default=1800.0,
        help="after which a process that waits for another one gives up (30:00)",
    )
    return parser


def duration(text: str) -> float:
    """Seconds of a time such as "90", "1:30", "2:00:00" or "1-12:00:00" (as SLURM writes it).

    Raises:
        argparse.ArgumentTypeError: it is none, or not above 0.
    """
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    try:
        seconds = float(days) * 86400 if dash else 0.0
        for unit, part in zip((1, 60, 3600), reversed(parts), strict=False):
            seconds += unit * float(part)
        if not 0 < seconds < float("inf") or len(parts) > 3:
            raise ValueError
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no time: give seconds, or [[days-]hours:]minutes:seconds"
        ) from error
    return seconds


def launch_script(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    """Runs ``main(args)`` in every process that the flags of :func:`argument_parser` ask for."""
    with user_errors():
        launch(
            _run,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(main, args),
            timeout=timedelta(seconds=getattr(args, "timeout", 1800)),
        )


def _run(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    limit_time(getattr(args, "time_limit", None))
    threading.excepthook = _except_tensorboard
    with user_errors():
        main(args)


def _except_tensorboard(args: threading.ExceptHookArgs) -> None:
    """Prints the traceback of a thread; TensorBoard's hands its error to whoever writes next."""
    if not type(args.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(args)
