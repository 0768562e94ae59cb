"""Fixtures shared by the tests: a small detector and training inputs for it."""

import os
from pathlib import Path

import pytest
import torch

import sssd  # noqa: F401  (before Detectron2: it applies the compatibility layer)

# Two test processes share two cores, and sums over threads depend on their number.
torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def datasets_root() -> Path:
    """The folder of real data; tests that need it are skipped, and counted, without it."""
    root = os.environ.get("DETECTRON2_DATASETS", "")
    if not root or not Path(root).is_dir():
        pytest.skip("real data: set DETECTRON2_DATASETS to a folder with bccd/, coco/, cocoapi/")
    return Path(root)
