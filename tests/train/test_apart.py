"""Processes that see no common folder: each saves its stages in its own, and goes on from there."""

import shutil
import signal
from pathlib import Path

import pytest
import runs
from runs import assert_same_run, delayed
from test_hosts import BP, FDG, alone, assert_close, end, items, reached, start_each, whole

pytestmark = pytest.mark.slow


def begin(tmp_path: Path, apart: str, devices: int = 1, **values) -> list[runs.Run]:
    folders = [{"workdir": tmp_path / name} for name in ("first", "second")]
    return start_each(tmp_path, folders, devices, checkpoint__apart=apart, **values)


def kept(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.isdecimal()}


@pytest.mark.parametrize(("victim", "values"), [(1, FDG), (0, BP)], ids=["1-fdg", "0-bp"])
def test_a_process_is_killed_and_all_is_gathered_at_the_end(tmp_path, victim, values):
    processes = begin(tmp_path, "gather", **values)
    runs.wait_for(reached(11, tmp_path / "first"), processes[0])
    processes[victim].signal(signal.SIGKILL)
    assert [process.wait().returncode for process in processes].count(3) == 1
    first, other = tmp_path / "first/checkpoints", tmp_path / "second/checkpoints.process_1"
    assert kept(first)
    assert all(any(other.glob(f"{step}*")) for step in kept(first))
    again, _ = end(begin(tmp_path, "gather", **values))
    assert "continuing from step" in again.stdout
    assert_same_run(tmp_path / "first", whole(**values))
    assert kept(first) == kept(other)
    assert not (tmp_path / "first/checkpoints.process_1").exists()


def test_parts_are_read_where_they_are_or_brought(tmp_path):
    """The second stage is in both processes, which need what the other one has written of it."""
    values = {**delayed("fdg"), "mesh__replicas": "(1,2)", "devices": 2}
    end(begin(tmp_path, "keep", **values, epochs=1))
    other, values["epochs"] = tmp_path / "second/checkpoints.process_1", 2
    (part,) = [path.name for path in (other / "9").iterdir()]
    assert part.startswith("stage_1.process_1.")
    assert len(items(tmp_path / "first")) == 3  # and not that
    shutil.move(other, tmp_path / "away")
    refused, told = [process.wait() for process in begin(tmp_path, "gather", **values)]
    assert (refused.returncode, told.returncode) == (2, 2)
    (line,) = refused.stderr.splitlines()[-1:]
    assert line.startswith("error: no usable checkpoint in ")
    assert f": process 1 wrote it to {runs.socket.gethostname()}:{other}; start the same" in line
    shutil.rmtree(other)
    shutil.move(tmp_path / "away", other)
    last, _ = end(begin(tmp_path, "gather", **values))
    assert "continuing from step 9 of 18" in last.stdout
    assert len(items(tmp_path / "first")) == 4
    assert_close(tmp_path / "first", alone(tmp_path / "one", **{**values, "devices": 4}))
