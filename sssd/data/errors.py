"""What is wrong with data, said to people."""


class DataError(ValueError):
    """Data that cannot be used; the message is one sentence that names the thing and the fix."""
