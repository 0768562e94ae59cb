"""A command line on the dataset "own", on a disk that refuses from some iteration on.

    python -m tests.engine.faulty_run '{"data": ..., "fault": "metrics", "iteration": 7}' \
        tools/train_net.py --config-file ...

The faults are the functions below; test_faulty_disk.py says what has to follow.
"""

import sssd  # noqa: F401  (before Detectron2: it applies the compatibility layer)

# isort: split
import glob
import json
import os
import resource
import runpy
import sys

from detectron2.data.datasets import register_coco_instances

from sssd.engine import stop
from tests.engine.killed_run import FrequentWriter

FULL = "/dev/full"  # every write to it: no space left on device


def metrics(output):
    """metrics.json is full; what has been written stays."""
    path = os.path.realpath(os.path.join(output, "metrics.json"))
    for number in os.listdir("/proc/self/fd"):
        if os.path.realpath(f"/proc/self/fd/{number}") == path:
            os.dup2(os.open(FULL, os.O_WRONLY), int(number))


def tensorboard(output):
    """TensorBoard's file, which is opened for each value, is full."""
    (path,) = glob.glob(os.path.join(output, "events.out.tfevents.*"))
    os.link(path, path + ".before")
    os.symlink(FULL, path + ".full")
    os.replace(path + ".full", path)  # at once: TensorBoard's thread makes a missing file


def predictions(output):
    """What Detectron2 writes of an evaluation with torch."""
    _link(output, "instances_predictions.pth")


def results(output):
    """What it writes as JSON."""
    _link(output, "coco_instances_results.json")


def _link(output, name):
    path = os.path.join(output, "inference", name)
    os.remove(path)
    os.symlink(FULL, path)


def files(output):
    """No file may get larger than metrics.json and half a line."""
    size = os.path.getsize(os.path.join(output, "metrics.json")) + 100
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def disk(output):
    """No room is left on the disk of the folder."""
    with open(os.path.join(output, "filler"), "wb", buffering=0) as file:
        for size in (2**16, 1):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue


def main(data, fault=None, iteration=-1):
    register_coco_instances("own", {}, f"{data}/annotations.json", f"{data}/images")
    sys.modules["sssd.engine.training_hooks"].PeriodicWriter = FrequentWriter
    after_step = stop.StopInOrder.after_step

    def then_fault(hook):  # the state is kept; evaluation and writing follow
        after_step(hook)
        if fault and hook.trainer.iter == iteration:
            globals()[fault](hook.folder)

    stop.StopInOrder.after_step = then_fault
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    del sys.argv[:2]
    main(**options)
