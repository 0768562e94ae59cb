"""Classification configs that train in a second, and the small dataset that they train on."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

pytest.importorskip("timm", reason="timm is not installed")

from sssd.engine import ClassificationTrainer, load_config
from tests.conftest import REPOSITORY

CONFIGS = REPOSITORY / "configs" / "Classification"
TINY = "tiny_digits"  # 40 grey images of 8x8 pixels, four of each of ten classes
KEYS = "MODEL.SSSD.CLASSIFIER."


def tiny_records(channels: int = 1, num_classes: int = 10, each: int = 4, size: int = 8):
    """Records of a dataset whose classes are mixed."""
    rng = np.random.default_rng(5)
    labels = np.tile(np.arange(num_classes), each)
    images = rng.integers(0, 256, (len(labels), size, size, channels), dtype=np.uint8)
    return [
        {"image": image, "label": int(label), "image_id": i}
        for i, (image, label) in enumerate(zip(images, labels, strict=True))
    ]


@contextmanager
def registered(name: str, records: list, num_classes: int = 10) -> Iterator[str]:
    """A dataset in Detectron2's catalog, for the length of a test."""
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).classes = [str(i) for i in range(num_classes)]
    try:
        yield name
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


if TINY not in DatasetCatalog:
    DatasetCatalog.register(TINY, tiny_records)
    MetadataCatalog.get(TINY).classes = [str(i) for i in range(10)]


def tiny_config(recipe: str, output: Path, *opts) -> CfgNode:
    """A recipe of configs/Classification for digits, with a schedule of 3 iterations.

    Args:
        recipe: such as "kd", for kd_cifar_resnet8_digits.yaml.
        output: OUTPUT_DIR.
        opts: keys and values.
    """
    return load_config(
        str(CONFIGS / f"{recipe}_cifar_resnet8_digits.yaml"),
        [
            "MODEL.DEVICE", "cpu", "DATASETS.TRAIN", (TINY,), "DATASETS.TEST", (),
            "SOLVER.MAX_ITER", 3, "SOLVER.STEPS", (), "SOLVER.WARMUP_ITERS", 0,
            "SOLVER.IMS_PER_BATCH", 8, "SEED", 3, "OUTPUT_DIR", str(output),
            # As the stock networks that they are compared with, bit for bit.
            KEYS + "CHANNELS_LAST", False, *opts,
        ],
    )  # fmt: skip


def tiny_inputs(count: int = 6, channels: int = 1, size: int = 8, seed: int = 0) -> list[dict]:
    """What a training loader gives for a batch, pairs included."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (2, count, channels, size, size), generator=generator)
    images = images.to(torch.uint8)
    return [
        {"image": images[0, i], "pair": images[1, i], "label": i % 10, "image_id": i}
        for i in range(count)
    ]


def state_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all parameters and buffers."""
    every = [*module.named_parameters(), *module.named_buffers()]
    return {name: value.detach().clone() for name, value in every}


def assert_same(first: dict, second: dict) -> None:
    """Both have the same names, and values that are equal bit for bit."""
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


def watched_trainings(monkeypatch: pytest.MonkeyPatch) -> list:
    """A list that each training adds to: its OUTPUT_DIR, its model, and the state it starts in."""
    made = []
    train = ClassificationTrainer.train

    def watched(self):
        model = self.checkpointer.model
        made.append((self.cfg.OUTPUT_DIR, model, state_of(model)))
        return train(self)

    monkeypatch.setattr(ClassificationTrainer, "train", watched)
    return made


def saved(folder: str | Path) -> dict:
    """The checkpoint that a training ends with."""
    return torch.load(Path(folder) / "model_final.pth", weights_only=True)
