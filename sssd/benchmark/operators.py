"""Whether two models do the same: the operators that they call, in order, and what comes out."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "compare_operators",
    "digest_of_operators",
    "digest_of_weights",
    "largest_difference",
    "operators_of",
    "tensors_of",
]


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def operators_of(call: Callable[[], Any]) -> list[str]:
    """Names, such as "aten::convolution" or "torchvision::nms", of what a call runs, in order."""
    with torch.no_grad(), _Recorder() as recorder:
        call()
    return recorder.names


def compare_operators(reference: Sequence[str], own: Sequence[str]) -> dict[str, Any] | None:
    """The first difference of two sequences.

    Returns:
        None if there is none; else its ``index`` and the operators there, ``reference`` and
        ``own``, which are None where a sequence has ended.
    """
    for i in range(max(len(reference), len(own))):
        pair = [names[i] if i < len(names) else None for names in (reference, own)]
        if pair[0] != pair[1]:
            return {"index": i, "reference": pair[0], "own": pair[1]}
    return None


def digest_of_operators(names: Sequence[str]) -> str:
    """SHA-256 of the names, a line each."""
    return hashlib.sha256("".join(f"{name}\n" for name in names).encode()).hexdigest()


def digest_of_weights(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names and values of a state dict."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors in what a model returns, on the CPU, in order."""
    if isinstance(output, Tensor):
        return [output.detach().cpu()]
    if isinstance(output, Boxes):
        return tensors_of(output.tensor)
    if isinstance(output, Instances):
        output = output.get_fields()
    if isinstance(output, Mapping):
        return [x for _, value in sorted(output.items()) for x in tensors_of(value)]
    if isinstance(output, (list, tuple)):
        return [x for value in output for x in tensors_of(value)]
    return []


def largest_difference(reference: Sequence[Tensor], own: Sequence[Tensor]) -> float:
    """Of any two values of equal place; infinite where the shapes differ."""
    if [x.shape for x in reference] != [x.shape for x in own]:
        return float("inf")
    differences = [
        (a.double() - b.double()).abs().max().item()
        for a, b in zip(reference, own, strict=True)
        if a.numel()
    ]
    return max(differences, default=0.0)
