"""What `pip install .` brings, and what it leaves alone."""

import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = ("sssd", "sssd_compat.py", "setup.py", "pyproject.toml", "LICENSE", "README.md")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Names of the files in the wheel, and its metadata."""
    pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools >= 77")
    folder = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, folder)
    for stray in ("tests", "tools", "configs"):  # as in a checkout: must not be packaged
        (folder / stray).mkdir()
        (folder / stray / "__init__.py").touch()
    build = "from setuptools import build_meta; build_meta.build_wheel('.')"
    process = subprocess.run(
        [sys.executable, "-c", build], cwd=folder, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        names = archive.namelist()
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        return names, Parser().parsestr(archive.read(metadata).decode())


def test_only_torch_and_numpy_are_required_and_unpinned(wheel):
    requirements = wheel[1].get_all("Requires-Dist")
    assert sorted(r for r in requirements if "extra ==" not in r) == ["numpy", "torch"]
    assert not any("detectron2" in requirement.lower() for requirement in requirements)
    assert wheel[1]["Requires-Python"] == ">=3.10"


def test_parts_of_the_project_are_extras(wheel):
    extras: dict[str, set[str]] = {}
    for requirement in wheel[1].get_all("Requires-Dist"):
        match = re.fullmatch(r"([\w.-]+)(?:\[.*\])?; extra == [\"'](\w+)[\"']", requirement)
        if match:
            extras.setdefault(match[2], set()).add(match[1])
    assert extras["eval"] == {"faster-coco-eval"}
    assert extras["classification"] == {"timm", "scikit-learn"}
    assert extras["studies"] == {"scipy"}
    assert extras["test"] == {"hypothesis", "pytest", "pytest-xdist", "sssd"}
    assert {"ruff"} < extras["dev"] and "all" in extras


def test_wheel_holds_every_package_and_the_compatibility_module(wheel):
    code = {name for name in wheel[0] if ".dist-info/" not in name}
    expected = {str(f.relative_to(REPOSITORY)) for f in (REPOSITORY / "sssd").rglob("*.py")}
    template = "sssd/visualization/report.html.jinja"
    assert code == expected | {"sssd_compat.py", template}
    assert any(name.endswith("/LICENSE") for name in wheel[0])


def test_requirements_are_pinned_and_name_no_registry():
    folder = REPOSITORY / "requirements"
    for file in folder.iterdir():
        assert "://" not in file.read_text() and "index-url" not in file.read_text(), file.name
    lines = (folder / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    assert len(pins) > 50
    for pin in pins:
        assert re.match(r"[\w.-]+==[\w.]+( ; .+)?$", pin), pin
    assert "torch==2.11.0" in pins and "torchvision==0.26.0" in pins
    assert not any(re.match(r"black|.*detectron2", pin) for pin in pins)
    for name, pin in (
        ("detectron2", r"pb1-detectron2==0\.6"),
        ("torchdistill", r"torchdistill==.*"),
    ):
        text = (folder / f"{name}.txt").read_text().strip()
        assert re.fullmatch(pin + " --hash=sha256:[0-9a-f]{64}", text)
