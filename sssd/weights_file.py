"""Files of weights, which are data and never code."""

import pickle
import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .plain_pickle import CodeInPickleError, load_plain_pickle

__all__ = [
    "FOREIGN",
    "CodeInWeightsError",
    "WeightsFileError",
    "check_weights",
    "read_checkpoint_file",
    "read_foreign_weights",
    "read_weights_file",
]

FOREIGN = (".pkl", ".pyth")  # of Detectron2's model zoo and Detectron, and of pycls

# How torch names what its unpickler does not admit.
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


class WeightsFileError(ValueError):
    """A file of weights that cannot be read; the message is the reason, for a sentence."""


class CodeInWeightsError(WeightsFileError):
    """A file of weights that holds more than data."""


def read_weights_file(path: str) -> Any:
    """What is in a file of weights: ``.pkl`` as Detectron2's model zoo has them, else torch's.

    Args:
        path: of a local file.

    Returns:
        Tensors (on the CPU) or arrays, in plain containers.

    Raises:
        CodeInWeightsError: it holds something that loading would have to run.
        WeightsFileError: it is truncated, or no file of weights.
        OSError: it cannot be opened.
    """
    with open(path, "rb") as file:
        try:
            if path.endswith(".pkl"):
                return load_plain_pickle(file)
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # unpickling raises all kinds
            name = _code_in(error)
            if name:
                raise CodeInWeightsError(
                    f"it holds {name}, and only tensors, arrays and plain containers are read, "
                    "because anything else can run a program on this machine; who trusts its "
                    "source saves its weights anew, as a dict of tensors"
                ) from error
            raise WeightsFileError(
                f"it is truncated or no file of weights ({_reason(error)})"
            ) from error


def read_checkpoint_file(path: str) -> dict[str, Any]:
    """The same, where it must be a dict."""
    return _dict_of(read_weights_file(path))


def read_foreign_weights(path: str) -> dict[str, Any]:
    """A file of Detectron2's model zoo, Detectron or pycls as a checkpoint of Detectron2.

    Its marks ``__author__`` and ``matching_heuristics`` make Detectron2 convert the names.

    Raises:
        WeightsFileError: as :func:`read_weights_file`, or it has not what such files have.
        OSError: it cannot be opened.
    """
    content = read_checkpoint_file(path)
    if path.endswith(".pyth"):
        if "model_state" not in content:
            raise WeightsFileError("it lacks the 'model_state' that files of pycls have")
        author, weights, other = "pycls", content["model_state"], "num_batches_tracked"
    elif "model" in content and "__author__" in content:
        return content
    else:
        author, weights, other = "Caffe2", content.get("blobs", content), "_momentum"
    weights = {k: v for k, v in _dict_of(weights).items() if not str(k).endswith(other)}
    return {"model": weights, "__author__": author, "matching_heuristics": True}


def check_weights(weights: Any) -> None:
    """Refuses what is no dict of tensors or arrays by name.

    Raises:
        WeightsFileError: with the reason.
    """
    for name, value in _dict_of(weights).items():
        if not isinstance(name, str) or not isinstance(value, Tensor | np.ndarray):
            kind = type(value).__name__
            raise WeightsFileError(f"its weight {name!r} is a {kind}, not a tensor with a name")


def _dict_of(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise WeightsFileError(f"it holds a {type(content).__name__} where a dict belongs")
    return content


def _code_in(error: Exception) -> str | None:
    """The name of what an unpickler refused to call."""
    if isinstance(error, CodeInPickleError):
        return error.name
    of_torch = _GLOBAL.search(str(error)) if isinstance(error, pickle.UnpicklingError) else None
    return of_torch and of_torch.group(1)


def _reason(error: Exception) -> str:
    text = str(error)
    # torch goes on with advice to load unsafely.
    for part in (
        r"WeightsUnpickler error:\s*(.+)",
        r"^(Cannot use .*? archives)",
        r"^\s*(.+?)(?:\. |\n|$)",
    ):
        if found := re.search(part, text):
            return found.group(1).strip(" .")
    return type(error).__name__
