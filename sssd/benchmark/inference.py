"""Inference of a comparison: what is left of each config when sssd has done its work."""

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from ..classification import build_network
from ..engine.export import stock_config
from ..engine.training_step import PRECISIONS
from .compile import compile_parts
from .jobs import CLASSIFIER, Job
from .memory import PeakMemory, separate_blocks, synchronise, use_torch_once
from .operators import (
    compare_operators,
    digest_of_operators,
    digest_of_weights,
    largest_difference,
    operators_of,
    tensors_of,
)

__all__ = ["InferenceInTurns", "compare_inference", "stock_student"]


class InferenceInTurns:
    """The exported student in evaluation mode, on one image at a time.

    It is built without sssd from what `TrainingInTurns.export` has written, in a process that has
    never trained. A context manager.
    """

    def __init__(self, job: Job, exported: str) -> None:
        """
        Args:
            job: whose training it comes from.
            exported: path of the file.
        """
        cfg = job.cfg
        self.device = torch.device(cfg.MODEL.DEVICE)
        content = torch.load(exported, map_location=self.device, weights_only=True)
        self._inputs = content["inputs"]
        self.model = stock_student(cfg)
        self.model.load_state_dict(content["model"])
        precision = cfg.MODEL.SSSD.SOLVER.AMP_PRECISION if cfg.SOLVER.AMP.ENABLED else "float32"
        self._dtype = PRECISIONS[precision]
        operators, outputs = self._every_detection()
        self._description = {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "detector": _digest_of_detector(cfg),
            "weights": digest_of_weights(content["model"]),
            "operators": operators,
            "outputs": outputs,
        }
        if job.setting.compiled:
            compile_parts(self.model)
        self._count = 0
        self._memory: PeakMemory | None = None

    def __enter__(self) -> "InferenceInTurns":
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def describe(self) -> dict[str, Any]:
        """Number of parameters, digests of detector and weights, operators and output tensors."""
        return self._description

    def warm_up(self, count: int) -> None:
        """Runs passes whose time does not count.

        On a CPU, the memory of the last one is what counts (`separate_blocks`).
        """
        self.run(count)
        self._memory.restart_peak()
        self.run(1)
        self._memory.stop_on_cpu()
        separate_blocks(False)

    def run(self, count: int) -> dict[str, Any]:
        """Runs passes of one image each; see `TrainingInTurns.run` for what it returns."""
        if self._memory is None:
            use_torch_once(self.device)
            self._memory = PeakMemory(self.device, self.model)
        began = time.monotonic()
        seconds = []
        for _ in range(count):
            synchronise(self.device)
            start = time.perf_counter()
            self._call(self._count % len(self._inputs))
            synchronise(self.device)
            seconds.append(round(time.perf_counter() - start, 6))
            self._count += 1
        return {
            "step_seconds": seconds,
            "data_seconds": [0.0] * count,
            "batch_size": 1,
            "memory": self._memory.read(),
            "began": round(began, 3),
            "ended": round(time.monotonic(), 3),
        }

    @torch.no_grad()
    def _call(self, index: int) -> Any:
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype is not None):
            return self.model(self._inputs[index])

    def _every_detection(self) -> tuple[list[str], list[Tensor]]:
        """Operators and outputs of the first image, with every detection that there can be.

        Random weights are sure of none, and nothing would follow.
        """
        owners = [m for m in self.model.modules() if hasattr(m, "test_score_thresh")]
        thresholds = [m.test_score_thresh for m in owners]
        for m in owners:
            m.test_score_thresh = 0.0
        outputs: list[Tensor] = []
        operators = operators_of(lambda: outputs.extend(tensors_of(self._call(0))))
        for m, threshold in zip(owners, thresholds, strict=True):
            m.test_score_thresh = threshold
        return operators, outputs


def stock_student(cfg: CfgNode) -> nn.Module:
    """The model that the export writes, in evaluation mode, with random weights.

    Args:
        cfg: of a training, of a detector (self-distilled or plain) or a classifier.
    """
    if cfg.MODEL.META_ARCHITECTURE == CLASSIFIER:
        keys = cfg.MODEL.SSSD.CLASSIFIER
        model = build_network(
            keys.NETWORK,
            num_classes=keys.NUM_CLASSES,
            in_chans=len(cfg.MODEL.PIXEL_MEAN),
            **keys.NETWORK_OPTIONS,
        )
    else:
        stock = stock_config(cfg)
        builder: Callable = META_ARCH_REGISTRY.get(stock.MODEL.META_ARCHITECTURE)
        lazy = hasattr(builder, "lazy_config")
        model = instantiate(builder.lazy_config(cfg)) if lazy else builder(stock)
    return model.to(cfg.MODEL.DEVICE).eval()


def _digest_of_detector(cfg: CfgNode) -> str:
    """Equal for configs whose exported student has the same config, but for its weights."""
    if cfg.MODEL.META_ARCHITECTURE == CLASSIFIER:
        keys = cfg.MODEL.SSSD.CLASSIFIER
        text = f"{keys.NETWORK} {keys.NETWORK_OPTIONS} {keys.NUM_CLASSES} {keys.SIZE}"
    else:
        stock = stock_config(cfg)
        stock.MODEL.WEIGHTS = ""
        text = f"{stock.MODEL} {cfg.MODEL.SSSD.FCOS}"
    return hashlib.sha256(text.encode()).hexdigest()


def compare_inference(configs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compares operators and outputs of each config with those of the first of the same detector.

    Args:
        configs: with ``name`` and what `InferenceInTurns.describe` gives.

    Returns:
        For each config ``operators``: their ``count`` and ``digest``; ``same_detector``: name of
        the config that it is compared with, None for that itself; ``first_difference`` of the
        operators (`compare_operators`); ``largest_difference`` of the outputs, None where the
        weights differ.
    """
    first: dict[str, dict[str, Any]] = {}
    compared = []
    for own in configs:
        reference = first.setdefault(own["detector"], own)
        same_weights = reference["weights"] == own["weights"]
        compared.append(
            {
                "operators": {
                    "count": len(own["operators"]),
                    "digest": digest_of_operators(own["operators"]),
                },
                "same_detector": None if reference is own else reference["name"],
                "first_difference": compare_operators(reference["operators"], own["operators"]),
                "largest_difference": largest_difference(reference["outputs"], own["outputs"])
                if same_weights
                else None,
            }
        )
    return compared
