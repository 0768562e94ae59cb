"""What is kept of a run: a record of its figures, and everything it has logged."""

import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..engine.config_file import read_keys
from ..engine.files import write_whole
from ..visualization import read_metrics

__all__ = [
    "commit",
    "config_digest",
    "public_log",
    "read_json",
    "read_metrics_of",
    "same_settings",
    "write_record",
]


def write_record(path: Path, record: dict[str, Any], metrics: Any, log: str = "") -> None:
    """Writes ``<path>.json`` last, and whole or not at all: where it is, the run is complete.

    Args:
        path: without a suffix.
        record: of the run.
        metrics: becomes ``<path>_metrics.json.gz``.
        log: becomes ``<path>_log.txt.gz``, unless it is empty.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without a time in them, equal contents are equal files.
    packed = gzip.compress(json.dumps(metrics).encode(), mtime=0)
    path.with_name(f"{path.name}_metrics.json.gz").write_bytes(packed)
    if log:
        packed = gzip.compress(log.encode(), mtime=0)
        path.with_name(f"{path.name}_log.txt.gz").write_bytes(packed)
    text = json.dumps(record, indent=1) + "\n"
    write_whole(str(path.with_name(f"{path.name}.json")), lambda file: file.write(text.encode()))


def read_json(path: Path) -> dict[str, Any] | None:
    """The record at ``<path>.json``; None if there is none."""
    file = path.with_name(f"{path.name}.json")
    return json.loads(file.read_text()) if file.is_file() else None


def read_metrics_of(path: Path) -> Any:
    """What :func:`write_record` was given as metrics."""
    return read_metrics(path.with_name(f"{path.name}_metrics.json.gz"))


def config_digest(config_file: str) -> dict[str, str]:
    """What tells a run from one whose config was edited since.

    Args:
        config_file: path.

    Returns:
        "digest": of the keys that the file and its bases set, whatever their comments. Empty where
        there is no such file: the results of a plan can be read without the project.

    Raises:
        ConfigError, OSError: the file or a base of it cannot be read.
    """
    if not os.path.isfile(config_file):
        return {}
    text = json.dumps(read_keys(config_file), sort_keys=True, default=str)
    return {"digest": hashlib.sha256(text.encode()).hexdigest()[:16]}


def same_settings(kept: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether those of a record are the wanted ones, wherever both have a value: the first records
    have no digest, nor has a run whose config is not at hand."""
    return all(kept[key] == wanted[key] for key in kept.keys() & wanted.keys())


def public_log(path: Path, places: Mapping[str, str | Path]) -> str:
    """A log without colours, and without the folders of the machine that wrote it.

    Args:
        path: of the log.
        places: name -> folder that the name stands for in the text, such as "$OUTPUT_DIR". Python's
            own folder is added as "$PREFIX", and the current one as ".".
    """
    text = re.sub(r"\x1b\[[\d;]*m", "", path.read_text(errors="replace"))
    named = {"$PREFIX": sys.prefix, ".": os.getcwd(), **places}
    # With links and without; of two folders of which one is in the other, the inner first.
    names = {
        str(path): name
        for name, folder in named.items()
        for path in (Path(folder).absolute(), Path(folder).resolve())
        if path != path.parent
    }
    for folder in sorted(names, key=len, reverse=True):
        whole = rf"(?<![\w./-]){re.escape(folder)}(?![\w.-])"
        text = re.sub(whole, lambda _, name=names[folder]: name, text)
    return text


def commit() -> str:
    """Of the code that runs; "unknown" outside of a repository."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
