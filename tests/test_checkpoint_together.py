"""Checkpoints that several processes write, here one after the other in this one."""

import json
import os
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from saved_states import assert_same, small_state

from jdecouple.checkpoint import Checkpointer, CheckpointError, Part, Together, own_parts, together
from jdecouple.checkpoint.document import spec

STAGE = {"stage_0": 0, "stage_1": 1, "step": 1}


def parts(arrays) -> tuple[list[Part], list[Part]]:
    """Those of two processes, one with each stage; what is called "queue" lies in both."""
    own = ([], [])
    for name, array in arrays.items():
        stage, array = STAGE[name.split("/")[0]], np.asarray(array)
        if name.endswith("queue"):
            half = len(array) // 2
            for process, start in enumerate((0, half)):
                block, begin = array[start : start + half], (start, *[0] * (array.ndim - 1))
                own[process].append(Part(name, spec(array), stage, begin, block))
        else:
            own[stage].append(Part(name, spec(array), stage, (0,) * array.ndim, array))
    return own


def state(value: float = 1.0) -> dict[str, np.ndarray]:
    queue = {"stage_1/waiting/queue": np.arange(24.0).reshape(4, 2, 3) * value}
    return {**small_state(value), **queue}


def both(directory) -> tuple[Checkpointer, Together]:
    """The writers of the first process and of the other."""
    first = Checkpointer(directory, keep=2)
    first.share(Together(first.directory, 0, 2, "a" * 16))
    return first, Together(first.directory, 1, 2, "a" * 16)


def save(first: Checkpointer, other: Together, step: int) -> None:
    mine, others = parts(state(step))
    other.save(step, others)
    other.wait()  # there is no barrier in one process
    first.save(step, mine, {"step": step}, metric=0.5)
    first.wait()


@pytest.fixture
def saved(tmp_path):
    """A directory with the steps 1 and 2."""
    first, other = both(tmp_path)
    for step in (1, 2):
        save(first, other, step)
    first.close()
    return tmp_path


def test_the_parts_of_all_are_one_checkpoint(saved):
    assert sorted(os.listdir(saved)) == ["1", "2"]
    items = ["stage_0.process_0", "stage_1.process_0", "stage_1.process_1"]
    assert sorted(os.listdir(saved / "2")) == ["info", *items]
    checkpoints = Checkpointer(saved, read_only=True)
    restored = checkpoints.restore(state())
    assert (restored.step, restored.extra) == (2, {"step": 2})
    assert_same(dict(sorted(restored.arrays.items())), dict(sorted(state(2).items())))
    assert checkpoints.best_step == 1
    assert checkpoints.read(1, lambda name: name == "step").arrays == {"step": 1}


def test_each_item_is_one_of_orbax(saved):
    """Whoever has Orbax can read it without this program."""
    item = ocp.PyTreeCheckpointHandler().restore(saved / "2" / "stage_0.process_0")
    assert_same(item, {"stage_0%2Fparams%2Flayers%2F0%2Fkernel": np.full((3, 4), 2, np.float32)})


@pytest.mark.parametrize("wanted", ["stage_0/params/layers/0/kernel", "stage_1/params/a.b"])
def test_nothing_is_read_but_what_is_wanted(saved, wanted):
    for path in (saved / "2").glob("stage_*"):
        if not path.name.startswith(wanted[:7] + f".process_{wanted[6]}"):
            shutil.rmtree(path)
    restored = Checkpointer(saved, read_only=True).restore(state(), wanted=lambda step: {wanted})
    assert_same(restored.arrays, {wanted: state(2)[wanted]})


def test_what_another_process_cannot_read_is_refused_by_all(saved):
    asked = []

    def agree(step: int, document: dict) -> str | None:
        asked.append(step)
        assert document["extra"] == {"step": step}
        return "it is torn" if step == 2 else None

    assert Checkpointer(saved, read_only=True).restore(state(), agree=agree).step == 1
    assert asked == [2, 1]
    with pytest.raises(CheckpointError, match="2: it is torn"):
        Checkpointer(saved, read_only=True).restore(state(), 2, agree=agree)


@pytest.mark.parametrize("item", ["stage_0.process_0", "stage_1.process_0", "stage_1.process_1"])
def test_a_damaged_item_is_refused(saved, item):
    for path in (saved / "2" / item).rglob("*"):
        if path.is_file():
            path.write_bytes(bytes(path.stat().st_size))
    assert Checkpointer(saved, read_only=True).restore(state()).step == 1


@pytest.mark.parametrize("damage", ["missing", "torn", "failed"])
def test_a_part_that_is_not_there_costs_no_older_checkpoint(saved, monkeypatch, damage):
    first, other = both(saved)
    mine, others = parts(state(3))
    said = "its list is damaged"
    if damage == "failed":
        said = "OSError: .*No space left on device"
        with monkeypatch.context() as patch:

            def full(*_):
                raise OSError(28, "No space left on device")

            patch.setattr(ocp.PyTreeCheckpointHandler, "finalize", full)
            other.save(3, others)
            with pytest.raises(CheckpointError, match=r"^checkpoint 3 could not be .* No space"):
                other.wait()
    elif damage == "torn":
        other.save(3, others)
        other.wait()
        (lists,) = saved.glob("3.*/parts/1")
        lists.write_bytes(lists.read_bytes()[:-9])
    first.save(3, mine, {})
    with pytest.raises(CheckpointError, match=f"process 1 has not written its part: {said}"):
        first.wait()
    assert first.steps() == [1, 2]
    assert first.restore(state()).step == 2
    save(first, other, 4)
    assert first.restore(state()).step == 4
    first.close()
    assert sorted(os.listdir(saved)) == ["1", "2", "4"]  # the first is the best


def test_a_block_that_nobody_has_written_is_missed(tmp_path):
    first, other = both(tmp_path)
    mine, others = parts(state())
    other.save(1, [part for part in others if not part.name.endswith("queue")])
    other.wait()
    first.save(1, mine, {})
    with pytest.raises(CheckpointError, match="stage_1%2Fwaiting%2Fqueue was written in part"):
        first.wait()


def test_a_save_that_others_have_begun_is_not_cleaned_away(saved):
    """The first still has a checkpoint to set aside, for which it opens the directory anew."""
    first, other = both(saved)
    first.refuse(2)
    mine, others = parts(state(3))
    other.save(3, others)
    other.wait()
    (saved / "9.orbax-checkpoint-tmp-b").mkdir()  # of a run that was killed
    first.save(3, mine, {})
    first.close()
    assert sorted(os.listdir(saved)) == ["1", "3"]
    assert Checkpointer(saved, read_only=True).restore(state()).step == 3


def test_a_process_that_has_gone_is_no_fault_of_the_disk(saved, monkeypatch):
    def no_barrier():
        def fail(*, key, timeout_ms):
            raise RuntimeError("a task has died")

        return fail

    first, other = both(saved)
    mine, others = parts(state(3))
    with monkeypatch.context() as patch:
        patch.setattr(together, "get_barrier_sync_fn", no_barrier)
        other.save(3, others)
        with pytest.raises(together.LostError, match="not all processes have come"):
            other.wait()
        first.save(3, mine, {})
        with pytest.raises(together.LostError):
            first.wait()
    assert not other.is_written(0)
    first.close()
    assert first.steps() == [1, 2]


def test_an_amendment(saved):
    first, other = both(saved)
    save(first, other, 3)
    first.amend(3, {"evaluated": True}, 0.9)
    first.close()
    assert Checkpointer(saved, read_only=True).best_step == 3
    assert json.loads((saved / "3/info/metadata").read_text())["document"]["format"] == 2


def test_of_equal_blocks_one_is_written():
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    values = np.arange(8.0).reshape(4, 2)
    cut = jax.device_put(values, NamedSharding(mesh, PartitionSpec("data")))
    whole = jax.device_put(values, NamedSharding(mesh, PartitionSpec()))
    found = own_parts({"cut": cut, "whole": whole}, {"cut": 1, "whole": 0}.__getitem__)
    assert [(part.name, part.stage, part.start) for part in found] == [
        ("cut", 1, (0, 0)),
        ("cut", 1, (2, 0)),
        ("whole", 0, (0, 0)),
    ]
    assert {part.kind for part in found} == {spec(values.astype(cut.dtype))}
    np.testing.assert_array_equal(np.concatenate([part.block for part in found[:2]]), values)
    np.testing.assert_array_equal(found[2].block, values)
