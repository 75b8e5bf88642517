"""Checkpoints of two processes that see no common folder, here one after the other in this one."""

import os
import shutil
from pathlib import Path

import pytest
from saved_states import assert_same
from test_checkpoint_together import parts, state

from jdecouple.checkpoint import Apart, Checkpointer, CheckpointError, all_folders, gather
from jdecouple.train import commands, sharing
from jdecouple.train.errors import ConfigError
from jdecouple.train.hosts.link import Message

OLD, NEW = "a" * 16, "b" * 16


def session(folder: Path, token: str) -> tuple[Checkpointer, Apart, Apart]:
    """What the first process writes with, and both sides, of a run that begins."""
    sides = [Apart(folder, index, 2, token) for index in (0, 1)]
    sides[0].folders = ["node0:/runs/checkpoints", "node1:/runs/checkpoints.process_1"]
    first = Checkpointer(folder, keep=1)
    first.share(sides[0])
    sides[1].settle(first.steps(), clear=False)
    return first, *sides


def save(run: tuple[Checkpointer, Apart, Apart], step: int, commit: bool = True) -> None:
    """Both write a step, and the first commits it, or is killed before."""
    first, own, other = run
    mine, others = parts(state(step))
    other.settle(first.steps())
    other.save(step, others)
    other.wait()  # there is no barrier in one process
    if commit:
        own.lists = [own.listed(mine), other.listed(others)]
        first.save(step, mine, {"step": step}, metric=1 / step)
        first.wait()


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of both with the steps 1, the best, and 3; the first has not committed 4."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    run = session(folder, OLD)
    for step in (1, 2, 3):
        save(run, step)
    save(run, 4, commit=False)
    run[0].close()
    return folder.parent


@pytest.fixture
def folders(saved, tmp_path):
    """Copies of them."""
    return all_folders(shutil.copytree(saved, tmp_path / "run") / "checkpoints")


def test_each_has_its_own_and_what_the_first_has_stays(folders):
    first, other = folders
    assert names(first) == ["1", "3"]
    assert names(first / "3") == [
        "info",
        f"stage_0.process_0.{OLD}",
        f"stage_1.process_0.{OLD}",
    ]
    assert names(other) == ["1", "3", f"4-{OLD}"]
    assert names(other / "3") == [f"stage_1.process_1.{OLD}"]


def test_what_was_not_committed_is_never_taken(folders):
    """The next run comes to the same step, and is killed before the first has all of it."""
    run = session(folders[0], NEW)
    assert run[2].committed() == [1, 3]
    save(run, 4)
    assert names(folders[1]) == ["1", "3", f"4-{NEW}"]
    assert run[0].steps() == [1, 4]
    session(folders[0], NEW[::-1])
    assert names(folders[1]) == ["1", "3", "4"]
    gather(folders[0], folders, 4)
    restored = Checkpointer(folders[0], read_only=True).restore(state())
    assert_same(dict(sorted(restored.arrays.items())), dict(sorted(state(4).items())))


def test_a_part_that_was_refused_is_set_aside(folders):
    """Here with what the first has set aside: it goes on from the step before."""
    first, own, other = session(folders[0], NEW)
    first.refuse(3)
    save((first, own, other), 2)
    first.close()
    assert [names(folder) for folder in folders] == [["1", "2"], ["1", f"2-{NEW}"]]
    aside = sorted(path for path in folders[0].parent.iterdir() if path.name.endswith("_refused"))
    assert [names(each) for each in aside] == [[f"3-{NEW}"], ["3"]]
    assert all_folders(folders[0]) == folders


def test_what_is_elsewhere_is_named_until_it_is_gathered(folders, capsys):
    first, other = folders
    place = "node1:/runs/checkpoints.process_1"
    said = f"3: stage_1.process_1.{OLD} is not here: process 1 wrote it to {place}; start"
    with pytest.raises(CheckpointError, match=said):
        Checkpointer(first, read_only=True).restore(state())
    moved = shutil.move(other, first.parent / "brought")
    with pytest.raises(CheckpointError, match=r"checkpoint 1 in .* is not here: process 1 wrote"):
        gather(first, all_folders(first), 1)
    commands.main(["jdecouple", "gather", f"{first.parent}", f"{moved}"])
    assert capsys.readouterr().out.split() == [f"{first / '1'}", f"{first / '3'}"]
    for step in (1, 3):
        restored = Checkpointer(first, read_only=True).restore(state(), step)
        assert_same(dict(sorted(restored.arrays.items())), dict(sorted(state(step).items())))
    gather(first, [], 3)  # nothing is left to bring


def test_nothing_damaged_is_gathered(folders):
    before = names(folders[0] / "3")
    for path in (folders[1] / "3").rglob("*"):
        if path.is_file():
            path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(CheckpointError, match=r"checkpoint 3 in .*: unreadable"):
        gather(folders[0], folders, 3)
    assert names(folders[0] / "3") == before


def test_parts_without_what_the_first_has_are_refused(folders):
    """Where its folder has been lost, nothing begins anew."""

    class Processes:
        first, index = True, 0

        def collect(self, own):
            return [Message("data", own), Message("data", ["node1:/there", [1, 3]])]

        def broadcast(self, value):
            return value

    shutil.rmtree(folders[0])
    run = first, own, _ = session(folders[0], NEW)
    said = r"process 1 has parts of checkpoints 1, 3 in node1:/there, but .* has none: bring"
    with pytest.raises(ConfigError, match=said):
        sharing.compare(Processes(), own, first)
    save(run, 1)
    sharing.compare(Processes(), own, first)
    assert own.folders[1] == "node1:/there"
