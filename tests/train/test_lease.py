"""One run a workdir in an object store: the second is refused, also after odd ends."""

import json
import os
import subprocess
import sys
import time

import pytest
import stores

from jdecouple._files import any_folder
from jdecouple.train import lease
from jdecouple.train.config import ConfigError
from jdecouple.train.lock import FILE_NAME, only_run

HOLD = """
import os, sys
import stores
stores.install()
from jdecouple._files import any_folder
from jdecouple.train import lease
from jdecouple.train.lock import only_run
lease.PERIOD, lease.PATIENCE, lease.SETTLE = 0.1, 0.8, 0.0
with only_run(any_folder("gs://bucket/run")):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "PERIOD", 0.1)
    monkeypatch.setattr(lease, "PATIENCE", 0.4)
    monkeypatch.setattr(lease, "SETTLE", 0.0)
    with stores.installed(tmp_path, monkeypatch):
        yield any_folder("gs://bucket/run")


def hold() -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    other = subprocess.Popen([sys.executable, "-c", HOLD], env=environment, text=True, **pipes)
    assert other.stdout.readline() == "held\n", other.stderr.read()
    return other


def test_a_second_run_is_refused_and_a_killed_one_is_followed(workdir):
    other = hold()
    with pytest.raises(ConfigError) as error, only_run(workdir):
        pass
    said = f"is in use by another run, process {other.pid} on "
    assert said in str(error.value)
    other.kill()
    other.communicate()
    with only_run(workdir):  # at once, as it was on this machine
        assert json.loads((workdir / FILE_NAME).read_text())["pid"] == os.getpid()
    assert not (workdir / FILE_NAME).exists()


@pytest.mark.parametrize("left", ['{"host": "gone", "pid": 1, "id": "x"}', "", "[]"])
def test_one_that_is_not_renewed_has_gone(workdir, left):
    (workdir / FILE_NAME).write_text(left)
    with only_run(workdir):
        assert json.loads((workdir / FILE_NAME).read_text())["pid"] == os.getpid()


def test_one_that_came_at_the_same_time(workdir, monkeypatch):
    def comes(seconds: float) -> None:
        (workdir / FILE_NAME).write_text('{"host": "h", "pid": 3, "id": "another"}')

    monkeypatch.setattr(lease.time, "sleep", comes)
    with pytest.raises(ConfigError, match="by another run, process 3 on 'h'"), only_run(workdir):
        pass


@pytest.mark.slow
def test_a_holder_that_has_lost_it_ends(workdir):
    other = hold()
    (workdir / FILE_NAME).write_text('{"host": "h", "pid": 3, "id": "another"}')
    assert other.wait(60) == 1
    (line,) = other.stderr.read().splitlines()
    assert line.startswith("error: workdir 'gs://bucket/run' is in use by another run, process 3")
    assert json.loads((workdir / FILE_NAME).read_text())["id"] == "another"


def test_a_network_that_is_away_for_a_moment(workdir, monkeypatch):
    def fails(*arguments):
        raise OSError("away")

    with only_run(workdir):
        with monkeypatch.context() as patch:
            patch.setattr(lease, "_read", fails)
            time.sleep(0.3)
        end = time.monotonic() + 60
        while json.loads((workdir / FILE_NAME).read_text())["renewed"] < 3:
            assert time.monotonic() < end
            time.sleep(0.05)
