"""What the benchmark tools share besides their tables: where it was measured, flags and files."""

import argparse
import importlib
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import __version__

__all__ = ["circumstances", "cpu_name", "environment", "positive", "print_progress", "reserve"]


def environment(
    script: str, packages: Sequence[str] = ("torch", "torchvision", "detectron2", "timm")
) -> dict[str, Any]:
    """Command, versions, cores, and the load of the machine: to be asked before measuring.

    Args:
        script: path of the program in the repository.
        packages: whose versions matter, where they are installed.
    """
    return {
        "command": _command_line(script),
        "versions": _versions(packages),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
    }


def circumstances(report: dict[str, Any]) -> str:
    """Where and how it was measured.

    Args:
        report: what `environment` gives, device, threads, and ``load_after`` the measurement.
    """
    return (
        f"{report['device']}, cores: {report['cores']}, threads of each process: "
        f"{report['threads']}, load before the start: {report['load_before']:.1f}, at the end: "
        f"{report['load_after']:.1f}; "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items())
        + f".\n\n```sh\n{report['command']}\n```"
    )


def cpu_name() -> str:
    """Model of the processor, where Linux says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _command_line(script: str) -> str:
    """How this program was called, with the number of threads if the environment sets it."""
    threads = os.environ.get("OMP_NUM_THREADS")
    called = shlex.join(["python", script, *sys.argv[1:]])
    return f"OMP_NUM_THREADS={threads} {called}" if threads else called


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {"sssd": __version__, "python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.import_module(name).__version__
        except (ImportError, AttributeError):
            continue
    return found


def print_progress(text: str) -> None:
    """To standard error, since standard output is for the tables."""
    print(f"benchmark: {text}", file=sys.stderr, flush=True)


def reserve(path: Path | None) -> None:
    """Makes a file that results go to, before the measurement and not after it.

    Raises:
        OSError: that is not possible.
    """
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()


def positive(text: str) -> int:
    """The type of an argument that counts.

    Raises:
        argparse.ArgumentTypeError: it is less than 1.
    """
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value
