"""What the command lines share."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from detectron2.engine import launch

from ..data import AnnotationError, ImageError
from .checkpoint import CheckpointError

__all__ = ["USER_ERRORS", "launch_script", "user_errors"]

# What the user can mend, said in one sentence each.
USER_ERRORS = (
    AnnotationError,
    CheckpointError,
    FileNotFoundError,
    FloatingPointError,
    ImageError,
    ValueError,
)


@contextmanager
def user_errors() -> Iterator[None]:
    """Ends the program with the sentence of an error that needs no traceback."""
    try:
        yield
    except USER_ERRORS as error:
        sys.exit(f"error: {error}")


def launch_script(main: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    """Detectron2's ``launch`` with the flags of its ``default_argument_parser``."""
    with user_errors():
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
