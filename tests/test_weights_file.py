"""Files of weights: what good ones hold, against Python's own unpickler."""

import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer

from sssd.engine import Checkpointer, CheckpointError
from sssd.plain_pickle import load_plain_pickle
from sssd.weights_file import WeightsFileError, read_weights_file
from tests.detectors import build, tiny_config

ARRAYS = {
    "float": np.arange(6, dtype=np.float32).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "permuted": np.arange(24, dtype=np.int64).reshape(2, 3, 4).transpose(1, 2, 0),
    "strided": np.arange(12, dtype=np.float16)[::3],
    "big endian": np.arange(4, dtype=">f4"),
    "empty": np.zeros((0, 3), np.uint8),
    "no axes": np.array(7, dtype=np.int32),
    "bool": np.array([True, False]),
    "complex": np.array([1 + 2j]),
    "scalar": np.float32(0.1),
    "true": np.bool_(True),
}
CONTENT = {
    "model": ARRAYS,
    "__author__": "Detectron2 Model Zoo",
    "ordered": OrderedDict([("b", [ARRAYS["float"], None]), ("a", (1, 2.5, b"\xff\x00", b""))]),
    "set": {1, 2},
    "long": 10**30,
    3: True,
}


def assert_equal(found, expected):
    if isinstance(expected, dict):
        assert type(found) is type(expected) and list(found) == list(expected)
        for key in expected:
            assert_equal(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert type(found) is type(expected) and len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    elif isinstance(expected, np.ndarray | np.generic):
        assert type(found) is type(expected) and found.shape == expected.shape
        assert found.dtype == expected.dtype.newbyteorder("=")
        np.testing.assert_array_equal(found, expected)
    else:
        assert type(found) is type(expected) and found == expected


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_plain_pickle_of_any_protocol_is_what_it_was(tmp_path, protocol):
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps(CONTENT, protocol))
    found = read_weights_file(str(path))
    assert_equal(found, CONTENT)
    found["model"]["float"][:] = 0  # tensors share its memory, and are trained
    assert_equal(found["ordered"]["b"][0], found["model"]["float"])


def test_a_pickle_of_python_2(tmp_path):
    """As Detectron wrote them: texts and the bytes of arrays are both strings of bytes."""
    data = np.array([1.5, -2.0], np.float32)
    content = (
        b"(dp0\nS'blobs'\np1\n(dp2\nS'conv1_w'\np3\n"
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
        b"(I1\n(I2\ntcnumpy\ndtype\n(S'f4'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\n"
        b"S" + repr(data.tobytes())[1:].encode() + b"\ntbsS'conv1_w_momentum'\nI0\nss."
    )
    path = tmp_path / "weights.pkl"
    path.write_bytes(content)
    expected = pickle.loads(content, encoding="latin1")
    assert_equal(expected["blobs"]["conv1_w"], data)
    with open(path, "rb") as file:
        assert_equal(load_plain_pickle(file), expected)


@pytest.fixture(scope="module")
def model():
    return build(tiny_config(distilled=False))


def zoo(model):
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    return {"model": state, "__author__": "Detectron2 Model Zoo"}


def torchvision(model):
    """As tools/convert-torchvision-to-d2.py of Detectron2 writes a backbone."""
    prefix = "backbone.bottom_up."
    state = model.state_dict().items()
    state = {name.removeprefix(prefix): v.numpy() for name, v in state if prefix in name}
    return {"model": state, "__author__": "torchvision", "matching_heuristics": True}


@pytest.mark.parametrize(
    ("content", "file"), [(zoo, "zoo.pkl"), (torchvision, "R-18.pkl"), (torchvision, "R-18.pyth")]
)
def test_foreign_weights_reach_the_model_as_with_detectron2(tmp_path, model, content, file):
    weights = content(model)
    path = str(tmp_path / file)
    if file.endswith("pyth"):
        state = {name: torch.from_numpy(value) for name, value in weights["model"].items()}
        torch.save({"model_state": state, "epoch": 3}, path)
    else:
        with open(path, "wb") as f:
            pickle.dump(weights, f)
    ours, stock = (build(tiny_config(distilled=False), seed=1) for _ in range(2))
    Checkpointer(ours).load(path, checkpointables=[])
    DetectionCheckpointer(stock).load(path)
    of_stock, of_file = stock.state_dict(), model.state_dict()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, of_stock[name]), name
        if name.startswith("backbone.bottom_up."):
            assert torch.equal(value, of_file[name]), name


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("a.pkl", pickle.dumps([1]), "it holds a list where a dict belongs"),
        ("a.pkl", pickle.dumps({"model": 3, "__author__": "me"}), "it holds a int where a dict"),
        ("a.pkl", pickle.dumps({"conv1_w": [1.0]}), "its weight 'conv1_w' is a list, not a tensor"),
        ("a.pkl", pickle.dumps({"blobs": {3: np.ones(1)}}), "its weight 3 is a ndarray"),
        ("a.pkl", pickle.dumps(CONTENT)[:-200], "it is truncated or no file of weights"),
        ("a.pkl", b"", "it is truncated or no file of weights"),
        ("a.pkl", b"version https://git-lfs.github.com/spec/v1\n", "truncated or no file of weig"),
        ("a.pth", b"version https://git-lfs.github.com/spec/v1\n", "truncated or no file of weig"),
        ("a.pth", b"", "it is truncated or no file of weights"),
        ("a.pth", torch.ones(2), "it holds a Tensor where a dict belongs"),
        ("a.pth", {"model": {"a": 1}}, "its weight 'a' is a int, not a tensor"),
        ("a.pth", {"model": "backbone"}, "it holds a str where a dict belongs"),
        ("a.pyth", {"model": {}}, "it lacks the 'model_state'"),
    ],
)
def test_what_is_no_file_of_weights_is_said_in_a_sentence(tmp_path, model, file, content, reason):
    path = tmp_path / file
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError) as caught:
        Checkpointer(model).load(str(path), checkpointables=[])
    sentence = str(caught.value)
    assert sentence.startswith(f"The checkpoint {path} cannot be read: ") and reason in sentence
    assert "\n" not in sentence and sentence.endswith("use another file of the same run.")
    assert "weights_only" not in sentence  # torch's advice is to load without care


def test_an_array_that_is_larger_than_its_bytes_is_damage(tmp_path):
    content = pickle.dumps(np.arange(4, dtype=np.uint8), 2)
    assert b"K\x04\x85" in content  # the shape (4,)
    path = tmp_path / "a.pkl"
    path.write_bytes(content.replace(b"K\x04\x85", b"J\xff\xff\xff\x0f\x85"))
    with pytest.raises(WeightsFileError, match="buffer is too small"):
        read_weights_file(str(path))
