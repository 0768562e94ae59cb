"""What is wrong with data, said to people."""

import traceback


class DataError(ValueError):
    """Data that cannot be used; the message is one sentence that names the thing and the fix."""


def last_word_of_worker(message: str) -> str | None:
    """Out of a loader's worker an error comes as the text of a traceback, which ends with it.

    Returns:
        The last line, "Kind: reason"; None where the message is no such text.
    """
    return message.strip().splitlines()[-1] if message.startswith("Caught ") else None


def in_words(error: Exception) -> str:
    """Kind, place in the code and first line of an error, for the middle of a sentence."""
    frames = traceback.extract_tb(error.__traceback__)
    # An assertion may have no reason but itself.
    lines = str(error).strip().splitlines() or [frames[-1].line if frames else "no reason given"]
    line = last_word_of_worker(str(error)) or lines[0]
    place = ""
    if frames:
        file = "/".join(frames[-1].filename.split("/")[-2:])
        place = f" in {file}, line {frames[-1].lineno}"
    return f"{type(error).__name__}{place}: {line.strip(' .')[:300]}"
