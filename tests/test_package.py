"""What can be imported without Detectron2, and what is said about the rest."""

import os
import subprocess
import sys

from tests.conftest import REPOSITORY

HIDE = """
import sys
for name in {hidden}:
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
"""


def run_without(hidden, script):
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", HIDE.format(hidden=hidden) + script],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


def test_losses_and_teacher_work_with_torch_alone():
    hidden = {"detectron2", "fvcore", "pycocotools", "PIL", "scipy", "matplotlib", "iopath", "yacs"}
    result = run_without(
        hidden,
        "import torch\n"
        "from sssd.losses import js_distance\n"
        "from sssd.teacher import LabelEncodingTeacher\n"
        "p, q = torch.tensor([[50.0, 0.0]]), torch.tensor([[0.0, 50.0]])\n"
        "print(round(js_distance(p, q).item(), 4))\n",
    )
    assert result.stdout.strip() == "1.0", result.stderr


def test_without_detectron2_the_first_use_says_how_to_get_it():
    for use in (
        "import sssd; sssd.add_sssd_config",
        "from sssd import SelfDistiller",
        "import sssd.meta_arch",
        "import sssd.engine",
        "import sssd.data",
        "import sssd.evaluation",
        "import sssd.config",
    ):
        result = run_without({"detectron2"}, use)
        assert result.returncode != 0, use
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith("ImportError: sssd needs Detectron2"), (use, last)
        assert "requirements/install.sh" in last and "INSTALL.md" in last


def test_detection_imports_without_the_extras():
    hidden = {"timm", "sklearn", "faster_coco_eval", "scipy"}
    result = run_without(hidden, "import sssd, sssd.engine; print('fine')")
    assert result.stdout.strip() == "fine", result.stderr
