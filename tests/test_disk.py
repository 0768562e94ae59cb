import errno
import os
from contextlib import suppress

import pytest
import torch

from sssd.disk import complaint, is_of_a_file, naming


def error_of(act):
    with pytest.raises(OSError) as raised:
        act()
    return raised.value


def test_what_the_system_says_of_a_file_becomes_what_to_do(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    cases = {
        file / "below": "Not a directory): correct the path",
        tmp_path: "Is a directory): correct the path",
        tmp_path / "none" / "file": "No such file or directory): correct the path",
        tmp_path / ("x" * 300): "File name too long): correct the path",
    }
    for path, rest in cases.items():
        error = error_of(lambda path=path: path.write_text(""))
        assert complaint(error) == f"{path} cannot be opened ({rest}"


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.ENOSPC, "x cannot be written (No space left on device): make room"),
        (errno.EDQUOT, "x cannot be written (Disk quota exceeded): make room"),
        (errno.EROFS, "x cannot be written (Read-only file system): make its disk writable"),
        (errno.EACCES, "x cannot be opened (Permission denied): give the permission"),
        (errno.EIO, "x cannot be read or written (Input/output error): look after the disk"),
        (errno.EBUSY, "x cannot be read or written (Device or resource busy): mend that"),
    ],
)
def test_each_reason_has_its_fix(number, sentence):
    assert complaint(OSError(number, os.strerror(number), "x")) == sentence
    assert complaint(OSError(number, os.strerror(number), b"x")) == sentence


def test_a_sentence_stays_what_it_is():
    error = OSError("The set cannot be made: set A to a folder.")
    assert complaint(error) == "The set cannot be made: set A to a folder" and is_of_a_file(error)


def test_a_connection_is_no_file():
    refused = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
    assert not is_of_a_file(refused)
    assert is_of_a_file(OSError(errno.ENOSPC, "No space left on device"))


@pytest.mark.parametrize("size", [10, 10**6])
def test_a_full_disk_is_named_through_torch_as_well(size):
    with suppress(OSError), open("/dev/full", "wb") as file:  # closing it fails once more

        def save():
            with naming("weights.pth"):
                torch.save(torch.zeros(size), file)

        error = error_of(save)
    assert complaint(error) == "weights.pth cannot be written (No space left on device): make room"


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="^shapes$"), naming("x"):
        raise RuntimeError("shapes")
    with pytest.raises(FileNotFoundError) as raised, naming("x"):
        os.stat("/none")
    assert raised.value.filename == "/none"
