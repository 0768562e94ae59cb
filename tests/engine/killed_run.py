"""A training in a process of its own, which a signal hits at a given moment.

    python -m tests.engine.killed_run '{"kind": "faster_rcnn", "folder": ..., "moment": ...}'

A moment is what goes on, the iteration, and the signal; test_exact_resume.py has a list. Instead of
a signal there may be "a mistake", which raises an error, and "nothing more", which stands still.
"""

import sssd  # noqa: F401  (before Detectron2: it applies the compatibility layer)

# isort: split
import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

from detectron2.engine import hooks
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from sssd.data import train_loader
from sssd.engine import ClassificationTrainer, Trainer, files
from sssd.engine.processes import launch
from sssd.engine.stop import PeriodicWriter
from tests.coco_files import register_coco
from tests.detectors import tiny_config

IMAGES, BATCH, LENGTH = 6, 2, 24


def configure(kind, folder, workers):
    opts = (
        "SOLVER.MAX_ITER", LENGTH, "SOLVER.STEPS", (18,), "SOLVER.CHECKPOINT_PERIOD", 3,
        "TEST.EVAL_PERIOD", 4, "DATALOADER.NUM_WORKERS", workers, "SEED", 3,
        "SOLVER.IMS_PER_BATCH", BATCH, "OUTPUT_DIR", os.path.join(folder, "output"),
    )  # fmt: skip
    if kind == "cs_kd":
        from tests.classifiers import TINY
        from tests.classifiers import tiny_config as tiny_classifier

        return tiny_classifier(kind, Path(folder) / "output", *opts, "DATASETS.TEST", (TINY,))
    name = register_coco("killed_coco", Path(folder) / f"data{os.getpid()}", IMAGES)
    share = (
        "MODEL.SSSD.COEFFICIENT.SCHEDULE",
        "share",
        "MODEL.SSSD.COEFFICIENT.VALUES",
        [0.3, 100.0],
    )
    return tiny_config(
        "DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,), "INPUT.MIN_SIZE_TRAIN", (48, 64),
        "INPUT.MIN_SIZE_TEST", 64, *opts, *(share if kind == "faster_rcnn" else ()), detector=kind,
    )  # fmt: skip


class Moments:
    """Sends the signal to the training once, when its moment has come."""

    def __init__(self, what, iteration, event):
        self.what, self.iteration, self.event = what, iteration, event
        self.training = os.getpid()

    def has_come(self, what, iteration):
        if (what, iteration) == (self.what, self.iteration):
            self.iteration = -1
            if self.event == "a mistake":
                raise KeyError("a mistake in the code")
            if self.event == "nothing more":
                time.sleep(600)
            os.kill(self.training, signal.Signals[self.event])

    def watch(self, trainer):
        model, optimizer = trainer._trainer.model, trainer._trainer.optimizer
        parameter = next(p for p in model.parameters() if p.requires_grad)
        parameter.register_hook(lambda grad: self.has_come("backward", trainer.iter))
        model.register_forward_pre_hook(
            lambda *args: self.has_come("forward" if model.training else "evaluation", trainer.iter)
        )
        optimizer.register_step_pre_hook(lambda *args: self.has_come("optimizer", trainer.iter))
        write = files.write_whole

        def write_whole(path, content):
            name = os.path.basename(path)
            kind = "saving" if name.endswith(".pth") else f"saving {name}"

            def write_part(file):
                content(file)
                if (self.what, self.iteration) == (f"{kind}, half", trainer.iter):
                    file.truncate(file.tell() // 2)
                    file.flush()
                self.has_come(f"{kind}, half", trainer.iter)
                self.has_come(f"{kind}, before the new name", trainer.iter)

            write(path, write_part)
            self.has_come(f"{kind}, after the new name", trainer.iter)

        sys.modules["sssd.engine.checkpoint"].write_whole = write_whole

        class Watcher(hooks.HookBase):
            def after_step(hook):
                self.has_come("writing", trainer.iter)

        trainer.register_hooks([Watcher()])
        get = train_loader._SeededSamples.__getitem__

        def watched(samples, key):
            self.has_come("loader", key[0] // BATCH)
            return get(samples, key)

        train_loader._SeededSamples.__getitem__ = watched


class FrequentWriter(PeriodicWriter):
    def __init__(self, writers, period, stop):
        super().__init__(writers, 2, stop)


def main(kind, folder, processes=1, place=(), timeout=1800, **options):
    """Trains in this process, in ``processes`` of its own, or in those of torchrun.

    Args:
        place: among several machines: how many, which one, and the address of the first.
    """
    wait = timedelta(seconds=timeout)
    launch(run, processes, *place, args=(kind, folder, options), timeout=wait)


def run(kind, folder, options):
    cfg = configure(kind, folder, options.get("workers", 0))
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    setup_logger(name="sssd")
    sys.modules["sssd.engine.training_hooks"].PeriodicWriter = FrequentWriter
    seed_all_rng(3 + comm.get_rank())
    trainer = (ClassificationTrainer if kind == "cs_kd" else Trainer)(cfg)
    trainer.resume_or_load(options.get("resume", False))
    moment = options.get("moment")
    if moment and comm.get_rank() == comm.get_world_size() - 1:
        Moments(*moment).watch(trainer)
    print("start", trainer.start_iter, flush=True)
    trainer.train()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
