"""A plan, as it stands in its file."""

from pathlib import Path
from typing import Any

import yaml

__all__ = ["read_plan"]


def read_plan(path: str | Path) -> Any:
    """
    Raises:
        ValueError: it cannot be read.
    """
    try:
        return yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"The plan {path} cannot be read ({error}).") from error
