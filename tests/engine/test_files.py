import os

import pytest

from sssd.engine.files import write_whole


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    write_whole(str(path), lambda f: f.write(b"old"))
    assert path.read_bytes() == b"old"

    def fail(file):
        file.write(b"half of it")
        file.flush()
        assert set(os.listdir(tmp_path)) == {"file", "file.part"}
        assert path.read_bytes() == b"old"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(str(path), fail)
    assert os.listdir(tmp_path) == ["file"] and path.read_bytes() == b"old"
    write_whole(str(path), lambda f: f.write(b"new"))
    assert os.listdir(tmp_path) == ["file"] and path.read_bytes() == b"new"


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_whole(str(tmp_path / "none" / "file"), lambda f: f.write(b"x"))
