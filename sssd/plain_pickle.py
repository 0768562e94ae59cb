"""Reads pickles of arrays and plain containers, and refuses what could run code.

Detectron2's model zoo and Detectron before it (.pkl) are pickles of NumPy arrays. Python's
unpickler calls whatever a file names. This one knows a handful of names, and puts the arrays
together itself, from their type, shape and bytes: NumPy's own functions for that believe what a
file says about its memory.
"""

import pickle
import re
from collections import OrderedDict
from types import FunctionType
from typing import IO, Any

import numpy as np

__all__ = ["CodeInPickleError", "load_plain_pickle"]


class CodeInPickleError(pickle.UnpicklingError):
    """The pickle names something other than arrays and plain containers.

    Attributes:
        name: what it names, such as "os.system".
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"it holds {name}")
        self.name = name


def load_plain_pickle(file: IO[bytes]) -> Any:
    """The content of a pickle, written by Python 2 or 3 in any protocol.

    Args:
        file: open for reading.

    Returns:
        Dicts, lists, tuples and sets of texts, bytes, numbers, None, arrays of numbers and their
        scalars.

    Raises:
        CodeInPickleError: it names anything else.
        Exception: of any kind, where it is no pickle, or is damaged.
    """
    return _with_arrays(_PlainUnpickler(file, encoding="latin1").load())


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise CodeInPickleError(f"{module}.{name}")
        found = _ADMITTED[module, name]
        if isinstance(found, FunctionType):
            return lambda *args: found(*args)  # a pickle may change attributes of what it gets
        return found


class _Type:
    """Stands for a ``numpy.dtype`` of numbers while a pickle is read."""

    def __init__(self, name: str, align: bool = False, copy: bool = False) -> None:
        if not re.fullmatch(r"[biufc]\d{1,2}", name):
            raise CodeInPickleError(f"numpy.dtype({name!r})")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple) -> None:
        byte_order = state[1]
        self.dtype = self.dtype.newbyteorder(byte_order)


class _Array:
    """Stands for a ``numpy.ndarray`` while a pickle is read."""

    def __init__(self, *of_an_empty_one: Any) -> None:
        self.value = np.zeros(0)

    def __setstate__(self, state: tuple) -> None:
        *_, shape, kind, is_fortran, data = state
        self.value = _array(data, kind, shape, "F" if is_fortran else "C")


def _from_buffer(
    data: bytes, kind: _Type, shape: tuple, order: str, axes: tuple | None = None
) -> _Array:
    array = _Array()
    array.value = _array(data, kind, shape, "F" if order == "F" else "C")
    if axes is not None:
        array.value = array.value.transpose(axes)
    return array


def _scalar(kind: _Type, data: bytes | str) -> np.generic:
    return _array(data, kind, (), "C")[()]


def _array(data: bytes | str, kind: _Type, shape: tuple, order: str) -> np.ndarray:
    if isinstance(data, str):
        data = data.encode("latin1")
    # One that is longer than the data is an error of NumPy; the copy can be written to.
    array = np.ndarray(shape, kind.dtype, buffer=data, order=order)
    return array.astype(kind.dtype.newbyteorder("="))


def _bytes(text: str = "", encoding: str = "latin1") -> bytes:
    return text.encode("latin1")


def _with_arrays(value: Any) -> Any:
    """The value with arrays in place of what stood for them."""
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, _Type):
        return value.dtype
    if isinstance(value, dict):
        return type(value)((_with_arrays(k), _with_arrays(v)) for k, v in value.items())
    if isinstance(value, list | tuple):
        return type(value)(map(_with_arrays, value))
    return value


_ADMITTED = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _bytes,  # how protocol 2 writes bytes
    ("numpy", "ndarray"): None,  # named, but never called
    ("numpy", "dtype"): _Type,
}
for _builtins in ("__builtin__", "builtins"):
    _ADMITTED |= {(_builtins, "set"): set, (_builtins, "bytes"): _bytes}
for _core in ("numpy.core", "numpy._core"):  # before and from NumPy 2 on
    _ADMITTED |= {
        (f"{_core}.multiarray", "_reconstruct"): _Array,
        (f"{_core}.multiarray", "scalar"): _scalar,
        (f"{_core}.numeric", "_frombuffer"): _from_buffer,
    }
