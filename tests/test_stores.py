"""Checkpoints in an object store, which renames nothing: old ones stay, half ones are none."""

import contextlib
import json

import numpy as np
import pytest
import stores
from saved_states import assert_same, filled, small_state

from jdecouple._files import any_folder, bring, is_stored, replace
from jdecouple.checkpoint import Checkpointer, CheckpointError, Part, Together
from jdecouple.checkpoint.document import spec

PLACE = "gs://bucket/run/checkpoints"


class _Killed(BaseException):
    """What a killed process does: nothing more."""


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Its keys, as a function."""
    with stores.installed(tmp_path, monkeypatch):
        yield stores.Store(use_listings_cache=False).objects


def restored(directory=PLACE):
    return Checkpointer(directory, read_only=True).restore(small_state())


def test_checkpoints_come_and_go(store):
    filled(PLACE, keep=2)
    with Checkpointer(PLACE) as checkpoints:
        assert checkpoints.steps() == [200, 300]
        checkpoints.amend(200, {"seen": True}, 0.5)
        assert (checkpoints.best_step, checkpoints.extras()[200]) == (200, {"seen": True})
        with pytest.raises(CheckpointError, match="step 300 is not after the latest"):
            checkpoints.save(300, small_state(), {})
    found = restored()
    assert (found.step, found.extra) == (300, {"step": 300})
    assert_same(found.arrays, small_state(300))
    assert {key.split("/")[3] for key in store()} == {"200", "300"}


def test_a_copy_on_this_machine_is_an_ordinary_one(store, tmp_path_factory):
    filled(PLACE)
    folder = tmp_path_factory.mktemp("copy")
    bring(any_folder(PLACE), folder)
    assert_same(restored(folder).arrays, small_state(300))
    with Checkpointer(folder) as checkpoints:
        checkpoints.save(400, small_state(400), {})
    assert_same(restored(folder).arrays, small_state(400))


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_leaves_the_checkpoint_before(store, tmp_path, monkeypatch, stride):
    """Of a save, of the change of a document, and of the deletion of the older one."""
    fatal, done = [0], [0]

    def mortal(method):
        def dies(self, *arguments, **options):
            if isinstance(self, stores.Store) or not self.closed:  # an object appears at its close
                done[0] += 1
                if done[0] >= fatal[0] > 0:
                    raise _Killed
            return method(self, *arguments, **options)

        return dies

    monkeypatch.setattr(stores._Writer, "close", mortal(stores._Writer.close))
    monkeypatch.setattr(stores.Store, "_rm", mortal(stores.Store._rm))
    outcomes, moment, finished = set(), 2, False
    filled(PLACE, steps=(1,))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    while not finished:
        fatal[0], done[0] = moment, 0
        with (
            contextlib.suppress(_Killed, CheckpointError),
            Checkpointer(PLACE, keep=1) as checkpoints,
        ):
            checkpoints.save(2, small_state(2), {"step": 2})
            checkpoints.wait()
            checkpoints.amend(2, {"step": "two"})
        finished = done[0] < moment
        fatal[0] = 0
        found = restored()
        outcomes.add((found.step, found.extra["step"]))
        assert_same(found.arrays, small_state(found.step))
        with Checkpointer(PLACE) as checkpoints:  # the next run clears up
            assert {key.split("/")[3] for key in store()} == {*map(str, checkpoints.steps())}
        any_folder(PLACE).rmtree()
        for name, content in before.items():
            (tmp_path / name).write_bytes(content)
        moment += stride
    assert outcomes == {(1, 1), (2, 2), (2, "two")}
    assert moment > 15


def test_what_is_damaged_is_set_aside(store):
    filled(PLACE)
    victim = next((any_folder(PLACE) / "300").glob("stage_*")) / "manifest.ocdbt"
    victim.write_bytes(b"damaged")
    with Checkpointer(PLACE) as checkpoints:
        assert checkpoints.restore(small_state()).step == 200
        checkpoints.save(300, small_state(7), {})
    assert_same(restored().arrays, small_state(7))
    aside = any_folder(f"{PLACE}_refused") / "300"
    assert json.loads((aside / "info/metadata").read_text())["document"]["step"] == 300
    assert (aside / victim.parent.name / victim.name).read_bytes() == b"damaged"


def test_what_is_foreign_stays(store):
    for name in ("7/note.txt", "notes.txt"):
        (any_folder(PLACE) / name).write_text("mine")
    filled(PLACE, keep=1)
    assert Checkpointer(PLACE).steps() == [300]
    assert (any_folder(PLACE) / "7/note.txt").read_text() == "mine"


def test_two_processes_write_their_items_and_read_no_other(store):
    first = Checkpointer(PLACE)
    token = "a" * 16
    first.share(Together(first.directory, 0, 2, token))
    other = Together(first.directory, 1, 2, token)
    for step in (1, 2):
        halves: list[list[Part]] = [[], []]
        for name, array in small_state(step).items():
            stage = 0 if name.startswith("stage_0") else 1
            halves[stage].append(Part(name, spec(array), stage, (0,) * array.ndim, array))
        other.save(step, halves[1])
        other.wait()  # there is no barrier in one process
        first.save(step, halves[0], {"step": step})
        first.wait()
    first.close()
    items = {key.split("/")[4] for key in store()}
    assert items == {"info", f"stage_0.process_0.{token}", f"stage_1.process_1.{token}"}
    assert_same(dict(sorted(restored().arrays.items())), dict(sorted(small_state(2).items())))
    any_folder(f"{PLACE}/2/stage_1.process_1.{token}").rmtree()
    own = Checkpointer(PLACE, read_only=True).read(2, lambda name: name.startswith("stage_0"))
    assert_same(own.arrays, {n: x for n, x in small_state(2).items() if n.startswith("stage_0")})


def test_a_file_is_old_or_new(store, monkeypatch):
    path = any_folder("s3://bucket/folder") / "file"
    assert is_stored(path)
    replace(path, lambda temporary: temporary.write_text("old"))
    with pytest.raises(ZeroDivisionError):
        replace(path, lambda temporary: temporary.write_text("half") / 0)

    def fails(self):
        self.truncate(0)
        raise RuntimeError("the network is away")

    with monkeypatch.context() as patch:
        patch.setattr(stores._Writer, "close", fails)
        with pytest.raises(OSError, match=r"^cannot write s3://bucket/folder/file: Runt.* away$"):
            replace(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "old"


def test_a_store_that_does_not_answer(store, monkeypatch):
    def fails(self, path, **options):
        raise RuntimeError("no credentials\nand more")

    monkeypatch.setattr(stores.Store, "info", fails)
    with pytest.raises(ValueError, match=r"^'gs://b/x' cannot be reached: .*no credentials$"):
        any_folder("gs://b/x")


def test_arrays_without_elements(store):
    arrays = {"a": np.zeros((0, 3), np.float32), "b": np.asarray(True)}
    with Checkpointer(PLACE) as checkpoints:
        checkpoints.save(1, arrays, {})
    assert_same(Checkpointer(PLACE, read_only=True).restore(arrays).arrays, arrays)
