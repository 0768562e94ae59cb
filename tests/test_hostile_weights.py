"""Files of weights that carry a program: none of it may run, through whichever door they come."""

import copyreg
import os
import pickle
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from sssd import plain_pickle
from sssd.classification.networks import build_network, load_network_weights
from sssd.engine import Checkpointer, CheckpointError, initialise_second_step
from sssd.weights_file import CodeInWeightsError, WeightsFileError, read_weights_file
from tests.detectors import build, tiny_config


class Runs:
    """Unpickled without care, it calls ``function(*args)``."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def shell(ran):
    return Runs(os.system, f"touch {ran}")


def string(text):
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def named(module, name, *args):
    """A pickle of protocol 4 that calls ``module.name(*args)``."""
    call = string(module) + string(name) + b"\x93(" + b"".join(map(string, args)) + b"tR."
    return b"\x80\x04" + call


# Each makes of the path that is touched when the attack succeeds the content of a file.
PICKLES = {
    **{f"os.system, protocol {p}": lambda ran, p=p: pickle.dumps({"model": shell(ran)}, p)
       for p in range(pickle.HIGHEST_PROTOCOL + 1)},
    "eval": lambda ran: pickle.dumps([Runs(eval, f"open({str(ran)!r}, 'w')")]),
    "exec by name": lambda ran: named("builtins", "exec", f"open({str(ran)!r}, 'w')"),
    "exec in Python 2's names": lambda ran: named("__builtin__", "exec", f"open({str(ran)!r},'w')"),
    "a process": lambda ran: named("subprocess", "getoutput", f"touch {ran}"),
    "an old instance": lambda ran: b"(S'touch " + str(ran).encode() + b"'\nios\nsystem\n.",
    "an object": lambda ran: b"(cos\nsystem\nS'touch " + str(ran).encode() + b"'\no.",
    "through an admitted module": lambda ran: named("collections", "_sys.modules.clear"),
    "through an admitted function": lambda ran: named(
        "numpy.core.multiarray", "_reconstruct.__globals__.clear"
    ),
    "through NumPy's imports": lambda ran: named("numpy.core.multiarray", "os.system",
                                                 f"touch {ran}"),
    "torch's own loader": lambda ran: pickle.dumps(
        Runs(torch.storage._load_from_bytes, pickle.dumps(shell(ran)))
    ),
    "numpy.load": lambda ran: named("numpy", "load", str(ran)),
    "in an array of objects": lambda ran: pickle.dumps(np.array([shell(ran)], dtype=object)),
    "an array of another class": lambda ran:
        b"cnumpy.core.multiarray\n_reconstruct\n(cos\nsystem\n(I0\ntS'b'\ntR.",
    "state of an admitted class": lambda ran: pickle.dumps(
        {"a": np.ones(2), "b": Runs(setattr, plain_pickle._Array, "value", 0)}
    ),
}  # fmt: skip
# Nothing in them runs by itself: they reach for NumPy's memory, or for what is kept outside.
OTHERS = {
    "a type of objects": lambda: pickle.dumps(np.array([1, "a"], dtype=object)),
    "a type with fields": lambda: pickle.dumps(np.zeros(1, dtype=[("a", "O")])),
    "a type that is none": lambda: named("numpy", "dtype", "os"),
    "something kept outside": lambda: b"Pos.system\n.",
    "the type's class": lambda: b"cnumpy\ndtype\n(N(S'dtype'\nI1\ntd\x86b.",
    "an array of bytes as addresses": lambda: (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I1\nt"
        b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntRI00\nS'AAAAAAAA'\ntb."
    ),
}


def refused(read, path):
    with pytest.raises((CheckpointError, ValueError)) as caught:
        read(str(path))
    sentence = str(caught.value)
    assert str(path) in sentence and "\n" not in sentence and sentence.endswith(".")
    return sentence


@pytest.fixture
def ran(tmp_path):
    return tmp_path / "ran"


@pytest.fixture(scope="module")
def detector():
    return build(tiny_config(distilled=False))


def test_the_attacks_work_on_pythons_own_unpickler(ran):
    """Else they would prove nothing."""
    for attack in ("os.system, protocol 2", "eval", "exec by name", "an old instance", "an object",
                   "torch's own loader", "in an array of objects"):  # fmt: skip
        with suppress(RuntimeError):  # of torch's loader, afterwards
            pickle.loads(PICKLES[attack](ran))
        assert ran.exists(), attack
        ran.unlink()


@pytest.mark.parametrize("attack", PICKLES)
def test_a_pickle_with_code_is_refused(tmp_path, ran, detector, attack):
    path = tmp_path / "weights.pkl"
    path.write_bytes(PICKLES[attack](ran))
    sentence = refused(lambda p: Checkpointer(detector).load(p, checkpointables=[]), path)
    assert f"The checkpoint {path} is refused: it holds " in sentence
    assert not ran.exists()


@pytest.mark.parametrize("attack", OTHERS)
def test_a_pickle_that_is_not_plain_is_refused(tmp_path, attack):
    path = tmp_path / "weights.pkl"
    path.write_bytes(OTHERS[attack]())
    with pytest.raises(WeightsFileError):
        read_weights_file(str(path))


def test_the_registry_of_extensions_is_no_way_in(tmp_path, ran):
    copyreg.add_extension("posix", "system", 240)
    try:
        content = pickle.dumps(shell(ran), 2)
        assert b"\x82\xf0" in content  # by its number
        (tmp_path / "weights.pkl").write_bytes(content)
        with pytest.raises(CodeInWeightsError, match=r"posix\.system"):
            read_weights_file(str(tmp_path / "weights.pkl"))
    finally:
        copyreg.remove_extension("posix", "system", 240)
    assert not ran.exists()


def test_a_refused_pickle_leaves_the_reader_as_it_was(tmp_path, ran):
    """State that a pickle gives to what it was handed does not reach the next file."""
    before = dict(plain_pickle._ADMITTED)
    defaults = {name: getattr(value, "__defaults__", None) for name, value in before.items()}
    path = tmp_path / "weights.pkl"
    state = b"(S'__defaults__'\n(S'x'\ntS'__name__'\nS'x'\nd"
    for module, name in before:
        for given in (state + b"b.", b"N" + state + b"\x86b."):
            path.write_bytes(f"c{module}\n{name}\n".encode() + given)
            with suppress(WeightsFileError):
                read_weights_file(str(path))
    assert before == plain_pickle._ADMITTED
    for name, value in before.items():
        assert getattr(value, "__defaults__", None) == defaults[name], name
    path.write_bytes(pickle.dumps({"a": np.arange(3.0)}, 2))
    np.testing.assert_array_equal(read_weights_file(str(path))["a"], np.arange(3.0))


def torch_file(path: Path, ran: Path, **options) -> Path:
    torch.save({"model": {"a": torch.ones(1)}, "trainer": shell(ran)}, path, **options)
    return path


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("file", ["weights.pth", "weights.pyth", "weights"])
def test_a_torch_file_with_code_is_refused(tmp_path, ran, detector, file, zipped):
    path = torch_file(tmp_path / file, ran, _use_new_zipfile_serialization=zipped)
    sentence = refused(lambda p: Checkpointer(detector).load(p, checkpointables=[]), path)
    assert f"The checkpoint {path} is refused: it holds posix.system, and only tensors" in sentence
    assert not ran.exists()


def test_a_module_that_was_saved_whole_is_refused_with_the_way_out(tmp_path, detector):
    path = tmp_path / "weights.pth"
    torch.save(torch.nn.Linear(2, 2), path)
    sentence = refused(lambda p: Checkpointer(detector).load(p, checkpointables=[]), path)
    assert "it holds torch.nn.modules.linear.Linear" in sentence
    assert "saves its weights anew, as a dict of tensors" in sentence


def test_the_environment_cannot_switch_it_off(tmp_path, ran, detector, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    refused(Checkpointer(detector).load, torch_file(tmp_path / "weights.pth", ran))
    assert not ran.exists()


def test_a_resume_does_not_pass_over_a_file_with_code(tmp_path, ran, detector):
    """Somebody has put it there: the run stops, and does not go on from the file before."""
    writer = Checkpointer(detector, str(tmp_path))
    writer.save("model_0000001")
    writer.save("model_0000002")
    path = torch_file(tmp_path / "model_0000002.pth", ran)
    resume = Checkpointer(detector, str(tmp_path)).resume_or_load
    assert "is refused" in refused(lambda p: resume("", resume=True), path)
    assert not ran.exists()


def test_the_other_doors(tmp_path, ran):
    path = torch_file(tmp_path / "weights.pth", ran)
    network = build_network("cifar_resnet8", num_classes=10)
    sentence = refused(lambda p: load_network_weights(network, p, "cifar_resnet8"), path)
    assert "it holds posix.system" in sentence
    teacher = build(tiny_config())  # the file is read before it is asked what the teacher is
    assert "it holds posix.system" in refused(lambda p: initialise_second_step(teacher, p), path)
    assert not ran.exists()
