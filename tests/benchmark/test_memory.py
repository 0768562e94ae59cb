"""What counts as the memory of a step."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="needs the allocator of GNU's C library"
)

PROGRAM = """
import torch
from sssd.benchmark.memory import PeakMemory, separate_blocks

def ones(mib):
    return torch.ones(mib * 2**18)

separate_blocks(True)
model = torch.nn.Linear(2**10, 5 * 2**8, bias=False)
memory = PeakMemory(torch.device("cpu"), model)
kept = ones(10)
for size in range(20, 28):  # none fits into the one before
    ones(size)
memory.stop_on_cpu()
separate_blocks(False)
others = [ones(30), ones(30)]
figures = memory.read()
print((figures["peak"] - figures["before"]) / 2**20)
"""


def test_weights_count_and_freed_tensors_and_what_comes_after_the_stop_do_not():
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert float(ended.stdout) == pytest.approx(42, abs=2), ended.stderr
