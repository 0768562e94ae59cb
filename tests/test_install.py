"""When requirements/install.sh installs, and when it leaves things alone.

Python makes the real environment; pip and uv are stood in for, and write down their calls.
"""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# "pip" puts a "uv" into its target, which fails once if the file `break` exists.
PYTHON = """#!/bin/sh
if [ "$1 $2" = "-m pip" ]; then
    echo "pip $*" >>{log}
    mkdir -p .venv/bootstrap/bin
    cp {uv} .venv/bootstrap/bin/uv
    exit 0
fi
exec {python} "$@"
"""
UV = """#!/bin/sh
echo "uv $*" >>{log}
[ ! -f {broken} ]
"""


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return path


class Checkout:
    def __init__(self, folder: Path) -> None:
        self.root = folder / "a checkout"
        self.root.mkdir()
        shutil.copytree(REPOSITORY / "requirements", self.root / "requirements")
        for name in ("setup.py", "pyproject.toml"):
            shutil.copy(REPOSITORY / name, self.root)
        self.venv = self.root / ".venv"
        self.log = folder / "log"
        self.broken = folder / "break"
        names = {"log": self.log, "broken": self.broken, "python": sys.executable}
        names["uv"] = script(folder / "uv", UV.format(**names))
        self.python = script(folder / "python", PYTHON.format(**names))

    def install(self, python: str | None = None) -> tuple[int, str, list[str]]:
        """Exit status, output, and the calls of pip and uv."""
        self.log.write_text("")
        process = subprocess.run(
            [self.root / "requirements" / "install.sh"],
            env={**os.environ, "PYTHON": str(self.python) if python is None else python},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return process.returncode, process.stdout, self.log.read_text().splitlines()


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    return Checkout(tmp_path)


def test_installs_once_then_updates_when_a_requirement_changes(checkout):
    status, output, calls = checkout.install()
    assert status == 0, output
    assert [call.split()[0] for call in calls] == ["pip"] + ["uv"] * 4
    assert "-r requirements/bootstrap.txt" in calls[0]
    assert "-r requirements/requirements.txt" in calls[1]
    assert "--require-hashes -r requirements/detectron2.txt" in calls[2]
    assert "--no-deps" in calls[2] and "--build-option=--skip-build" in calls[2]
    assert "--no-deps --require-hashes -r requirements/torchdistill.txt" in calls[3]
    assert "--no-deps --no-build-isolation --editable ." in calls[4]

    assert checkout.install() == (0, "", [])
    assert checkout.install(python="") == (0, "", [])

    with (checkout.root / "requirements" / "requirements.txt").open("a") as file:
        file.write("# changed\n")
    kept = checkout.venv / "kept"
    kept.touch()
    status, output, calls = checkout.install(python="")
    assert status == 0 and "updating" in output
    assert [call.split()[0] for call in calls] == ["uv"] * 5
    assert kept.exists()
    assert checkout.install() == (0, "", [])


def test_an_installation_that_failed_is_made_anew(checkout):
    checkout.broken.touch()
    status, _, calls = checkout.install()
    assert status != 0 and len(calls) == 2  # pip, and the first call of uv
    leftover = checkout.venv / "leftover"
    leftover.touch()
    checkout.broken.unlink()
    status, output, calls = checkout.install()
    assert status == 0, output
    assert len(calls) == 5 and not leftover.exists()


def test_a_foreign_environment_is_not_touched(checkout):
    checkout.venv.mkdir()
    mine = checkout.venv / "mine"
    mine.touch()
    status, output, calls = checkout.install()
    assert status != 0 and calls == [] and mine.exists()
    assert "was not made by sssd" in output and "pip install ." in output


@pytest.mark.parametrize("version", ["2.7", "3.9", "3.14"])
def test_other_versions_of_python_are_refused_in_a_sentence(checkout, tmp_path, version):
    other = script(tmp_path / f"python{version}", f"#!/bin/sh\necho {version}\n")
    status, output, calls = checkout.install(python=str(other))
    assert status != 0 and calls == [] and not checkout.venv.exists()
    assert output.count("\n") == 1
    assert f"{other} is {version}" in output and "make PYTHON=" in output


def test_ci_fails_without_the_real_data(tmp_path):
    folder = tmp_path / "checkout" / ".ci"
    folder.mkdir(parents=True)
    shutil.copy(REPOSITORY / ".ci" / "run", folder)
    process = subprocess.run([folder / "run"], capture_output=True, text=True)
    assert process.returncode != 0
    assert "shared/datasets" in process.stderr and process.stderr.count("\n") == 1
