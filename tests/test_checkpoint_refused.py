"""Checkpoints that are damaged or not ours are refused, and the ones before them used."""

import os
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import logging
from saved_states import assert_same, filled, small_state

from jdecouple.checkpoint import Checkpointer, CheckpointError


@pytest.fixture
def warnings_logged(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: lines.append(text % args))
    return lines


def needed_files(checkpoint: Path) -> list[Path]:
    files = (path for path in checkpoint.rglob("*") if path.is_file())
    return sorted(path for path in files if path.name != "commit_success.txt")


def cut(path: Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, Path.unlink, flip], ids=["cut", "missing", "flipped"])
def test_any_damaged_file_is_refused_unless_it_is_not_needed(tmp_path, damage, warnings_logged):
    """A refused one gives way to the one before; no wrong value is ever restored."""
    state = small_state() | {"big": np.random.default_rng(0).normal(size=(64, 64))}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {"good": True})
        checkpointer.save(2, state, {"good": False})
    files = needed_files(tmp_path / "2")
    assert len(files) >= 6
    refused = set()
    for file in files:
        sound = file.read_bytes()
        damage(file)
        warnings_logged.clear()
        restored = Checkpointer(tmp_path, read_only=True).restore(state)
        assert_same(restored.arrays, state)
        assert restored.extra == {"good": restored.step == 1}, file
        if restored.step == 1:
            refused.add(file)
            (warning,) = warnings_logged
            assert warning.startswith("checkpoint 2 refused: ")
            assert warning.endswith("; trying 1")
            assert "\n" not in warning
        file.write_bytes(sound)
    largest = max(files, key=lambda file: file.stat().st_size)
    needed = {tmp_path / "2" / "info" / "metadata", tmp_path / "2" / "state" / "manifest.ocdbt"}
    assert refused >= needed | {largest}


def test_altered_info_is_refused(tmp_path):
    info = filled(tmp_path, steps=(1,)) / "1" / "info" / "metadata"
    text = info.read_text()
    info.write_text(text.replace('"extra": {"step": 1}', '"extra": {"step": 7}'))
    assert info.read_text() != text
    with pytest.raises(CheckpointError, match="info/metadata is damaged"):
        Checkpointer(tmp_path, read_only=True).restore(small_state())


def test_leaf_checksum_names_the_leaf(tmp_path, monkeypatch):
    """Corruption that the checksums of the files cannot see (it happened before the write)."""
    with Checkpointer(tmp_path) as checkpointer:
        with monkeypatch.context() as patch:
            wrong = ocp.args.StandardSave({"x": np.zeros(3)})
            patch.setattr(ocp.args, "StandardSave", lambda item: wrong)
            checkpointer.save(1, {"x": np.ones(3)}, {})
        with pytest.raises(CheckpointError, match="leaf x is corrupted"):
            checkpointer.restore({"x": np.ones(3)})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda s: s.pop("stage_1/params/a.b"),
            "leaf stage_1/params/a.b is bfloat16[6], expected none",
        ),
        (lambda s: s.update(z=np.ones(1)), "leaf z is absent, expected float64[1]"),
        (lambda s: s.update(step=np.int32(0)), "leaf step is uint32[], expected int32[]"),
        (
            lambda s: s.update({"stage_0/params/layers/0/kernel": np.ones((4, 3), "f4")}),
            "leaf stage_0/params/layers/0/kernel is float32[3,4], expected float32[4,3]",
        ),
    ],
)
def test_foreign_structure_names_the_first_leaf_that_differs(tmp_path, change, reason):
    template = small_state()
    change(template)
    with (
        Checkpointer(filled(tmp_path, steps=(1,))) as checkpointer,
        pytest.raises(CheckpointError) as error,
    ):
        checkpointer.restore(template)
    assert str(error.value).endswith(f"refused 1; 1: {reason}")
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["1"]


def test_foreign_checkpoint_gives_way_to_the_one_before(tmp_path, warnings_logged):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, small_state(1), {})
        checkpointer.save(2, {"other": np.ones(2)}, {})
        assert checkpointer.restore(small_state()).step == 1
    assert warnings_logged == [
        "checkpoint 2 refused: leaf other is float64[2], expected none; trying 1"
    ]


def make_file(path: Path):
    path.write_text("a file")


def make_orbax(path: Path):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, {"x": np.ones(2)})


def make_renamed(path: Path):
    os.rename(path.parent / "300", path)


@pytest.mark.parametrize("make", [make_file, Path.mkdir, make_orbax, make_renamed])
def test_what_is_no_checkpoint_is_refused_set_aside_and_replaced(tmp_path, make, warnings_logged):
    directory = filled(tmp_path / "checkpoints")
    make(directory / "500")
    with Checkpointer(directory) as checkpointer:
        restored = checkpointer.restore(small_state())
        assert len(warnings_logged) == 1
        assert (directory / "500").exists()
        latest = restored.step
        assert latest == (200 if make is make_renamed else 300)
        assert_same(restored.arrays, small_state(latest))
        assert checkpointer.latest_step == latest
        checkpointer.save(500, small_state(500), {"again": True})
        assert_same(checkpointer.restore(small_state()).arrays, small_state(500))
        assert (tmp_path / "checkpoints_refused" / "500").exists()
        make_file(directory / "600")
    with Checkpointer(directory) as checkpointer:
        assert checkpointer.restore(small_state()).extra == {"again": True}
    assert len(warnings_logged) == 2


def test_a_second_refusal_of_the_same_step_keeps_the_first(tmp_path):
    directory = filled(tmp_path / "c", steps=(1, 2))
    for _ in range(3):
        cut(directory / "2" / "info" / "metadata")
        with Checkpointer(directory) as checkpointer:
            assert checkpointer.restore(small_state()).step == 1
            checkpointer.save(2, small_state(2), {})
    assert sorted(os.listdir(tmp_path / "c_refused")) == ["2", "2-1", "2-2"]


def test_damaged_older_checkpoints_are_never_deleted(tmp_path):
    directory = filled(tmp_path, keep=2)
    cut(directory / "200" / "info" / "metadata")
    with Checkpointer(directory, keep=2) as checkpointer:
        for step in (400, 500, 600):
            checkpointer.save(step, small_state(step), {})
        checkpointer.wait()
        assert checkpointer.steps() == [200, 500, 600]


def test_all_refused_is_an_error_and_touches_nothing(tmp_path):
    directory = filled(tmp_path / "c")
    with Checkpointer(directory) as checkpointer:
        with pytest.raises(CheckpointError) as error:
            checkpointer.restore({"x": np.ones(1)})
        assert "refused 300, 200, 100; 300: leaf" in str(error.value)
        with pytest.raises(CheckpointError, match="step 250 is not after the latest"):
            checkpointer.save(250, small_state(), {})
        assert checkpointer.steps() == [100, 200, 300]
    assert os.listdir(tmp_path) == ["c"]


def test_explicit_step(tmp_path, warnings_logged):
    with Checkpointer(filled(tmp_path)) as checkpointer:
        assert_same(checkpointer.restore(small_state(), step=200).arrays, small_state(200))
        with pytest.raises(CheckpointError, match=r"no checkpoint 250 in .*\[100, 200, 300\]"):
            checkpointer.restore(small_state(), step=250)
        cut(tmp_path / "200" / "info" / "metadata")
        with pytest.raises(CheckpointError, match="200: info/metadata is damaged"):
            checkpointer.restore(small_state(), step=200)
    assert warnings_logged == []
