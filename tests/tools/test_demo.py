"""The demo does what the README says of it."""

import os
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image

from sssd.visualization import read_metrics
from tests.conftest import REPOSITORY


@pytest.mark.long
def test_demo(tmp_path):
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, str(REPOSITORY / "tools/demo.py")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    last = result.stdout.strip().splitlines()[-1]
    found = re.fullmatch(
        r"demo: AP=([\d.]+) AP50=([\d.]+) baseline_AP=([\d.]+) student=(\S+)", last
    )
    assert found, last
    ap, ap50, baseline = (float(found[i]) for i in (1, 2, 3))
    assert 10 <= ap <= 90 and 10 <= baseline <= 90 and ap50 > ap
    output = tmp_path / "output/demo"
    for name in ("detections.png", "curves.png"):
        with Image.open(output / name) as picture:
            assert picture.width > 800
    report = (output / "report/index.html").read_text()
    for title in ("ground truth", "baseline", "student", "p3, teacher", "p3, distance"):
        assert f': {title}"' in report, title
    metrics = read_metrics(output / "metrics.json")
    assert any("loss_distill/share" in line for line in metrics)
    student = torch.load(tmp_path / found[4], weights_only=True)
    assert set(student) == {"model"}
    # A sign of life at least every ten seconds
    seconds = [float(s) for s in re.findall(r"demo: +(\d+) s", result.stdout)]
    assert seconds and max(b - a for a, b in zip([0.0, *seconds], seconds, strict=False)) <= 10
