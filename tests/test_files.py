"""Files appear whole or not at all."""

import errno
import os

import pytest

from mmbase.errors import MmbaseError
from mmbase.files import write_atomically


def test_write_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "metrics.json"
    write_atomically(path, "one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["metrics.json"]


def test_permissions_are_those_of_an_ordinary_file(tmp_path):
    ordinary = tmp_path / "ordinary"
    ordinary.write_text("x")
    assert write_atomically(tmp_path / "ours", "x").stat().st_mode == ordinary.stat().st_mode


def test_a_full_disk_keeps_the_old_file_and_says_what_to_do(tmp_path, monkeypatch):
    path = write_atomically(tmp_path / "metrics.json", "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MmbaseError, match="No space left") as error:
        write_atomically(path, "new")
    assert "\n" not in str(error.value)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["metrics.json"]


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(MmbaseError, match="cannot write"):
        write_atomically(tmp_path / "run" / "metrics.json", "x")


def test_a_function_writes_the_file(tmp_path):
    assert write_atomically(tmp_path / "x", lambda file: file.write(b"abc")).read_bytes() == b"abc"
