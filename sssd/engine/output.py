"""The output folder: found to be writable before anything is done, and the log in it."""

import logging
import os
import sys
import tempfile
from contextlib import suppress
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig

from ..disk import complaint
from .processes import on_main

__all__ = ["begin_output", "check_output_folder"]

_LOGGERS = ("fvcore", "detectron2", "sssd")
# Bytes: less than any checkpoint has.
_ROOM = 2**20


def begin_output(cfg: CfgNode | DictConfig, args: Any) -> None:
    """Detectron2's ``default_setup``, and a log for ``sssd``, after a look at the output folder.

    Raises:
        OSError: the folder cannot be written.
    """
    if isinstance(cfg, CfgNode):
        folder, key = cfg.OUTPUT_DIR, "OUTPUT_DIR"
    else:
        folder, key = cfg.train.output_dir, "train.output_dir"
    check_output_folder(folder, key)
    default_setup(cfg, args)
    setup_logger(folder, distributed_rank=comm.get_rank(), name="sssd")
    for name in _LOGGERS:
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.handleError = lambda record, handler=handler: _end_log(handler, record)


def check_output_folder(folder: str, key: str = "OUTPUT_DIR") -> None:
    """Makes the folder, and sees on the main process whether it can be written.

    Args:
        folder: a path, or the address of a storage service, which is left alone.
        key: of the config, that names the folder.

    Raises:
        OSError: it cannot, said in one sentence; in all processes.
    """

    def write() -> None:
        try:
            os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(_ROOM))
                file.flush()
        except OSError as error:
            error.filename = folder  # not that of the temporary file
            raise OSError(
                f"{complaint(error)}, or set {key} to a folder that can be written."
            ) from error

    if folder and "://" not in folder:
        on_main(write)


def _end_log(handler: logging.StreamHandler, record: logging.LogRecord) -> None:
    """Ends a log that cannot be written: the file, or what is printed. The run goes on.

    Python would print a traceback for each line, and of the file another one at the end.
    """
    error, stream = sys.exc_info()[1], handler.stream
    if not isinstance(error, OSError):
        logging.StreamHandler.handleError(handler, record)
        return
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        for other in list(logger.handlers):
            if getattr(other, "stream", None) is stream:
                logger.removeHandler(other)
    if stream not in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.close()
    error.filename = stream.name
    logging.getLogger("sssd").warning("One of the logs ends: %s.", complaint(error))
