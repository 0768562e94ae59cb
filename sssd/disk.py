"""What to say where the disk refuses: which file, why, and the fix."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["complaint", "is_of_a_file", "naming"]

# What cannot be done, and the fix.
_FULL = ("written", "make room")
_LOCKED = ("opened", "give the permission")
_WRONG = ("opened", "correct the path")
_COMPLAINTS = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: ("written", "make room, or raise the limit to the size of files"),
    errno.EROFS: ("written", "make its disk writable"),
    errno.EIO: ("read or written", "look after the disk"),
    errno.EACCES: _LOCKED,
    errno.EPERM: _LOCKED,
    errno.ENOENT: _WRONG,
    errno.ENOTDIR: _WRONG,
    errno.EISDIR: _WRONG,
    errno.EEXIST: _WRONG,
    errno.ENAMETOOLONG: _WRONG,
    errno.ELOOP: _WRONG,
}
_OTHER = ("read or written", "mend that")


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Inside, an error of the disk that names no file is one of ``path``.

    Raises:
        OSError: in place of the one that torch's writer makes of it, too.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch's writer complains about its position, after the disk has said why.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        if cause.errno is not None and cause.filename is None:
            cause.filename = path
        raise cause from None


def is_of_a_file(error: OSError) -> bool:
    """Whether :func:`complaint` says enough: it is no error of a connection or a process."""
    return error.errno is None or error.filename is not None or error.errno in _COMPLAINTS


def complaint(error: OSError) -> str:
    """What cannot be done, why, and the fix; a sentence without its full stop."""
    if error.errno is None:  # a sentence already
        return str(error).strip().removesuffix(".")
    what, fix = _COMPLAINTS.get(error.errno, _OTHER)
    name = "A file" if error.filename is None else os.fsdecode(error.filename)
    return f"{name} cannot be {what} ({error.strerror}): {fix}"
