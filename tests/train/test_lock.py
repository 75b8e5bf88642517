"""One run a workdir: the second is refused before it touches anything, also after odd ends."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys

import pytest
import runs

from jdecouple.train import lock
from jdecouple.train.config import ConfigError
from jdecouple.train.lock import only_run
from jdecouple.train.loop import train_and_evaluate

IN_USE = f"is in use by another run, process {os.getpid()} on '{socket.gethostname()}'"
HOLD = """
import pathlib, sys
from jdecouple.train.lock import only_run
with only_run(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_names_who_holds_it_and_goes_with_its_holder(tmp_path):
    workdir = tmp_path / "new" / "here"
    for _ in range(2):
        with only_run(workdir):
            owner = json.loads((workdir / lock.FILE_NAME).read_text())
            assert owner == {"host": socket.gethostname(), "pid": os.getpid()}
            for other in (workdir, workdir / ".." / "here"):
                with pytest.raises(ConfigError) as error, only_run(other):
                    pass
                assert IN_USE in str(error.value)
                assert "\n" not in str(error.value)
            with only_run(tmp_path / "other"):
                pass
        assert os.listdir(workdir) == []


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"pid": "x", "host": 1}', "\0" * 50])
def test_an_owner_that_is_not_told(tmp_path, content):
    with only_run(tmp_path):
        (tmp_path / lock.FILE_NAME).write_text(content)
        with pytest.raises(ConfigError, match="another run, which has not yet said where"):
            only_run(tmp_path).__enter__()


def test_what_a_dead_run_left_does_not_matter(tmp_path):
    (tmp_path / lock.FILE_NAME).write_text('{"host": "gone", "pid": 1, "and": "more"}\n')
    with only_run(tmp_path):
        owner = json.loads((tmp_path / lock.FILE_NAME).read_text())
        assert owner == {"host": socket.gethostname(), "pid": os.getpid()}


def test_a_lock_that_was_removed_while_it_was_opened(tmp_path, monkeypatch):
    """Its holder ends between another run's opening of the file and its locking."""
    path, opened = tmp_path / lock.FILE_NAME, os.open

    def removed(*arguments):
        monkeypatch.setattr(lock.os, "open", opened)
        held = opened(*arguments)
        path.unlink()
        return held

    monkeypatch.setattr(lock.os, "open", removed)
    with only_run(tmp_path):
        assert path.exists()
        with pytest.raises(ConfigError, match=IN_USE):
            only_run(tmp_path).__enter__()


def test_a_link_in_its_place_is_not_followed(tmp_path):
    target = tmp_path / "precious"
    target.write_text("text")
    (tmp_path / lock.FILE_NAME).symlink_to(target)
    with pytest.raises(ConfigError, match=r"workdir '.*': "), only_run(tmp_path):
        pass
    assert target.read_text() == "text"


def test_a_forked_process_does_not_hold_it(tmp_path):
    ready, done = os.pipe(), os.pipe()
    with only_run(tmp_path):
        child = os.fork()
        if not child:  # outlives the run
            os.write(ready[1], b"1")
            os.read(done[0], 1)
            os._exit(0)
        os.read(ready[0], 1)
    try:
        with only_run(tmp_path):
            assert os.waitpid(child, os.WNOHANG) == (0, 0)  # it lives
    finally:
        os.write(done[1], b"1")
        assert os.waitpid(child, 0)[1] == 0
        for descriptor in (*ready, *done):
            os.close(descriptor)


def test_programs_that_are_started_do_not_inherit_it(tmp_path):
    with only_run(tmp_path):
        (held,) = lock._held
        assert not os.get_inheritable(held)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog, number):
    def refused(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refused)
    with only_run(tmp_path), only_run(tmp_path):
        assert os.listdir(tmp_path) == []
    (told, _) = caplog.messages
    assert told == (
        f"workdir '{tmp_path}' is not locked, its file system has no locks "
        f"({os.strerror(number)}): let no other run use it"
    )


def test_a_platform_without_locks(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(lock, "fcntl", None)
    with only_run(tmp_path):
        pass
    assert "is not locked, this platform has no locks" in caplog.messages[0]


@pytest.mark.slow
def test_the_second_run_touches_nothing(tmp_path):
    with only_run(tmp_path):
        with pytest.raises(ConfigError, match=IN_USE):
            train_and_evaluate(runs.cheap(steps=4), tmp_path)
        assert os.listdir(tmp_path) == [lock.FILE_NAME]
    train_and_evaluate(runs.cheap(steps=4), tmp_path)
    assert lock.FILE_NAME not in os.listdir(tmp_path)
    with only_run(tmp_path):
        before = runs.fingerprint(tmp_path)
        with pytest.raises(ConfigError, match=IN_USE):
            train_and_evaluate(runs.cheap(seed=1), tmp_path)
        assert runs.fingerprint(tmp_path) == before


def test_an_error_lets_it_go(tmp_path):
    with pytest.raises(RuntimeError), only_run(tmp_path):
        raise RuntimeError
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_a_killed_process_frees_it(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=runs.environment(),
        text=True,
    )
    with process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"another run, process {process.pid} on "):
            only_run(tmp_path).__enter__()
        process.kill()
        process.wait()
    assert (tmp_path / lock.FILE_NAME).exists()
    with only_run(tmp_path):
        pass
