"""Checkpoints are written below any path, found whole before older ones go, and amended at once."""

import gc
import json
import logging
import os

import orbax.checkpoint as ocp
import pytest
from saved_states import assert_same, filled, small_state

from jdecouple.checkpoint import Checkpointer, CheckpointError, orbax_setup

ODD_NAMES = ["lr[0.1]", "x[ab]y", "a\\b", "a*", "a?c", "**", "{a,b}", "caf\udce9", "$a #%20\n"]


@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
def test_any_name_of_a_folder(tmp_path, name):
    """Orbax looks for its files by a pattern: those of other folders that fit it are not ours."""
    neighbours = [tmp_path / "abc", tmp_path / "xay"]
    for neighbour in neighbours:
        (neighbour / "2.orbax-checkpoint-tmp" / "state.orbax-checkpoint-tmp").mkdir(parents=True)
    directory = tmp_path / name / "checkpoints"
    with Checkpointer(directory, keep=1) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, small_state(step), {})
        assert_same(checkpointer.restore(small_state()).arrays, small_state(2))
    assert os.listdir(directory) == ["2"]
    restored = Checkpointer(directory, read_only=True).restore(small_state())
    assert_same(restored.arrays, small_state(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "abc", "xay"])


def test_a_name_that_cannot_be_is_refused_before_anything_is_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(orbax_setup, "_DESCRIPTORS", "/nowhere")
    with pytest.raises(ValueError, match=r"a path in UTF-8 without \* \? \[ \\ is needed$"):
        Checkpointer(tmp_path / "a[0]")
    Checkpointer(tmp_path / "a").close()


@pytest.mark.parametrize("missing", ["state/manifest.ocdbt", "state/_METADATA", "info/metadata"])
@pytest.mark.parametrize("damage", ["missing", "empty"])
def test_a_save_that_is_not_whole_costs_no_older_one(tmp_path, monkeypatch, missing, damage):
    directory = filled(tmp_path, steps=(1,), keep=1)
    wait = ocp.CheckpointManager.wait_until_finished

    def lose(manager):
        wait(manager)
        if (path := directory / "2" / missing).exists():
            path.unlink()
            if damage == "empty":
                path.touch()

    with Checkpointer(directory, keep=1) as checkpointer:
        with monkeypatch.context() as patch:
            patch.setattr(ocp.CheckpointManager, "wait_until_finished", lose)
            checkpointer.save(2, small_state(2), {})
            with pytest.raises(CheckpointError, match=r"checkpoint 2 could not .* was not whole"):
                checkpointer.wait()
        assert checkpointer.restore(small_state()).step == 1
        checkpointer.save(2, small_state(2), {})
    assert os.listdir(directory) == ["2"]


def test_a_save_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    """What it had written would keep a full disk full."""

    def full(*_):
        raise OSError(28, "No space left on device")

    checkpointer = Checkpointer(filled(tmp_path, steps=(1,)))
    monkeypatch.setattr(ocp.StandardCheckpointHandler, "finalize", full)
    checkpointer.save(2, small_state(2), {})
    with pytest.raises(CheckpointError, match="No space left"):
        checkpointer.close()
    assert os.listdir(tmp_path) == ["1"]


def test_a_folder_that_has_gone_is_told_in_one_line(tmp_path):
    directory = filled(tmp_path / "c", steps=(1,))
    with Checkpointer(directory) as checkpointer:
        directory.rename(tmp_path / "elsewhere")
        directory.write_text("a file")
        with pytest.raises(CheckpointError, match=r"checkpoint 2 could not be .*: Not a directory"):
            checkpointer.save(2, small_state(2), {})


def test_an_amendment_is_read_by_the_next(tmp_path):
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        for step, metric in ((1, 0.5), (2, 0.9), (3, 0.1)):
            checkpointer.save(step, small_state(step), {"due": True})
            checkpointer.amend(step, {"step": step}, metric)  # the save may be in flight
        checkpointer.wait()
        assert checkpointer.steps() == [2, 3]
        assert checkpointer.best_step == 2
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        assert checkpointer.extras() == {2: {"step": 2}, 3: {"step": 3}}
        assert_same(checkpointer.restore(small_state()).arrays, small_state(3))
        checkpointer.amend(3, {"step": 3}, 0.95)
        assert checkpointer.steps() == [3]
    document = json.loads((tmp_path / "3" / "info" / "metadata").read_text())["document"]
    assert document["metric"] == 0.95


def test_an_amendment_is_made_whole_or_not_at_all(tmp_path, monkeypatch):
    directory = filled(tmp_path, steps=(1,))

    def killed(*_):
        raise OSError(28, "No space left on device")

    with Checkpointer(directory) as checkpointer:
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed)
            with pytest.raises(CheckpointError, match=r"checkpoint 1 could not .* No space left"):
                checkpointer.amend(1, {"other": 1}, 0.5)
        assert checkpointer.extras() == {1: {"step": 1}}
        assert checkpointer.restore(small_state()).step == 1
        with pytest.raises(CheckpointError, match="checkpoint 7 could not"):
            checkpointer.amend(7, {})


def test_links_are_not_followed_where_something_is_deleted(tmp_path):
    directory, precious = filled(tmp_path / "c", steps=(1,)), tmp_path / "precious"
    precious.mkdir()
    (precious / "file").touch()
    for name in (".deleted", ".deleted.1.x", "2.orbax-checkpoint-tmp"):
        (directory / name).symlink_to(precious)
    with Checkpointer(directory, keep=1) as checkpointer:
        checkpointer.save(3, small_state(3), {})
    assert os.listdir(precious) == ["file"]
    assert Checkpointer(directory, read_only=True).steps() == [3]


def test_errors_of_orbax_are_told_once(tmp_path, caplog):
    """Its tasks fail together; asyncio tells of all but the first."""
    directory = filled(tmp_path, steps=(1,))
    (directory / "1" / "state" / "manifest.ocdbt").write_bytes(b"\0" * 64)
    with pytest.raises(CheckpointError, match=r"^no usable checkpoint in [^\n]*$"):
        Checkpointer(directory, read_only=True).restore(small_state())
    gc.collect()
    asyncio = logging.getLogger("asyncio")
    never = "Task exception was never retrieved\nfuture: <Task exception=%s>"
    asyncio.error(never, "ValueError('[tensorstore_spec=...]')")
    asyncio.error(never, "ValueError('of the user')")
    told = [record.getMessage() for record in caplog.records if record.name == "asyncio"]
    assert told == [never % "ValueError('of the user')"]
