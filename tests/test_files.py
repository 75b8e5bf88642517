"""Files appear whole, by names that nobody can know before."""

import errno
import os
import secrets
from pathlib import Path

import pytest

from jdecouple import _files
from jdecouple._files import local_folder, naming, replace


def test_a_file_is_replaced_with_the_usual_rights(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    usual = path.stat().st_mode
    replace(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new"
    assert path.stat().st_mode == usual
    assert os.listdir(tmp_path) == ["file"]


def test_names_differ_and_a_link_is_never_followed(tmp_path, monkeypatch):
    names = []
    for _ in range(2):
        replace(tmp_path / "file", lambda temporary: names.append(temporary.name))
    assert names[0] != names[1]
    assert not any(str(os.getpid()) in name for name in names)

    monkeypatch.setattr(secrets, "token_hex", lambda size: "guessed")
    victim, trap = tmp_path / "victim", tmp_path / ".file.guessed.tmp"
    victim.write_text("precious")
    for target in (victim, tmp_path / "nothing"):  # a link that leads nowhere is one too
        trap.unlink(missing_ok=True)
        trap.symlink_to(target)
        with pytest.raises(OSError, match=r"cannot write .*file: File exists"):
            replace(tmp_path / "file", lambda temporary: temporary.write_text("spoilt"))
    assert victim.read_text() == "precious"
    assert not (tmp_path / "nothing").exists()


def test_a_target_that_is_a_link_is_replaced_not_followed(tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "file"
    victim.write_text("precious")
    path.symlink_to(victim)
    replace(path, lambda temporary: temporary.write_text("new"))
    assert (victim.read_text(), path.read_text()) == ("precious", "new")


def test_a_pipe_or_a_device_is_never_replaced(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(OSError, match=r"^cannot write .*pipe: it is no regular file$"):
        replace(path, lambda temporary: temporary.write_text("new"))
    assert path.is_fifo()
    assert os.listdir(tmp_path) == ["pipe"]


def test_what_fails_leaves_the_old_file_and_is_one_line(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_files.os, "fsync", full)
    with pytest.raises(OSError, match=f"^cannot write {path}: No space left on device$"):
        replace(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_an_error_of_one_argument_is_named_too(tmp_path):
    with pytest.raises(OSError, match=r"^cannot write .*: why$"), naming(tmp_path):
        raise OSError("why")


@pytest.mark.parametrize(
    "path", ["gs://bucket/run", "s3://b", "file:///tmp/x", "hdfs://h:1/x", Path("gs://bucket/run")]
)
def test_a_folder_elsewhere_is_refused(path):
    with pytest.raises(ValueError, match="is no folder of this machine: a path without"):
        local_folder(path)


def test_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert local_folder("~/run") == Path("/home/me/run")
    assert local_folder("a:b/~/c:d") == Path("a:b/~/c:d")
    with pytest.raises(ValueError, match=r"^'~nobody-is-called-this/run': .*home"):
        local_folder("~nobody-is-called-this/run")
