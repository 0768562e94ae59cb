"""Options of another type than a constructor takes, as a sentence."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

__all__ = ["explained_options"]


@contextmanager
def explained_options(what: str, options: Mapping[str, Any], fix: str) -> Iterator[None]:
    """What is made inside raises a ValueError that names its options, where it would a TypeError.

    Args:
        what: is made, such as "The term 'kd'".
        options: with which it is made.
        fix: what to do about it.
    """
    try:
        yield
    except TypeError as error:
        given = ", ".join(f"{option} {value!r}" for option, value in options.items())
        reason = str(error).partition("\n")[0].strip(" :")
        raise ValueError(
            f"{what} cannot be made with {given or 'its defaults'} ({reason}): {fix}."
        ) from error
