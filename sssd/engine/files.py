"""Files that are there whole or not at all."""

import os
from collections.abc import Callable
from contextlib import suppress
from typing import IO

from ..disk import naming

__all__ = ["write_whole"]

PART = ".part"


def write_whole(path: str, write: Callable[[IO[bytes]], object]) -> None:
    """Writes a file under a temporary name, brings it to the disk, and only then gives it its name.

    Whatever happens in between, under ``path`` there is what was there before, or all of the new
    content.

    Args:
        path: of a local file.
        write: takes the open file.

    Raises:
        OSError: it cannot be written, with the name of the file; nothing is left behind.
    """
    part = path + PART
    try:
        with naming(path), open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            os.remove(part)
        raise
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name as well
    finally:
        os.close(folder)
