"""Checkpoints come back bit for bit; nothing that was saved is lost."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from saved_states import assert_same, filled, shapes, small_state

from jdecouple.checkpoint import Checkpointer, CheckpointError

REPOSITORY = Path(__file__).resolve().parents[1]
DTYPES = [
    "float32",
    "float64",
    "float16",
    "bfloat16",
    "int8",
    "int32",
    "uint32",
    "bool",
    "complex64",
]


def test_nothing_saved_restores_none(tmp_path):
    with Checkpointer(tmp_path / "new") as checkpointer:
        (tmp_path / "new" / "notes").mkdir()
        assert checkpointer.restore(small_state()) is None
        assert checkpointer.steps() == []
        assert checkpointer.latest_step is None
        assert checkpointer.best_step is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_bit_equal(tmp_path, dtype):
    values = np.random.default_rng(0).normal(size=(5, 3)) * 100
    arrays = {"x": values.astype(dtype), "scalar": values[0, 0].astype(dtype)}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, arrays, {})
        assert_same(checkpointer.restore(shapes(arrays)).arrays, arrays)


@pytest.mark.parametrize(
    "arrays",
    [
        {"nan": np.array([np.nan, -0.0, np.inf, 1e-310])},
        {"no rows": np.zeros((0, 3), np.float32), "x": np.ones(2)},
        {"a/b/c": np.ones(1), "a/b%2Fc": np.zeros(1), "%": np.zeros(1), "..": np.ones(2)},
        {"fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "strided": np.arange(9)[::2]},
    ],
    ids=lambda arrays: next(iter(arrays)),
)
def test_odd_arrays_round_trip(tmp_path, arrays):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, arrays, {"a": [1, None, {"b": 0.1}], 10: 1, 9: 2})
        restored = checkpointer.restore(arrays)
    assert_same(restored.arrays, arrays)
    assert restored.step == 0
    assert restored.extra == {"a": [1, None, {"b": 0.1}], "10": 1, "9": 2}


def test_numpy_arrays_may_be_overwritten_after_save(tmp_path):
    arrays = {"w": np.ones((400, 400)), "b": np.zeros(3)}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, arrays, {})
        arrays["w"][:] = -1
        arrays["b"][:] = -1
        restored = checkpointer.restore(shapes(arrays)).arrays
    assert_same(restored, {"w": np.ones((400, 400)), "b": np.zeros(3)})


def test_donated_buffers_do_not_reach_the_checkpoint(tmp_path):
    step = jax.jit(lambda w: w + 1, donate_argnums=0)
    w = jnp.zeros((300, 300))
    with Checkpointer(tmp_path, keep=9) as checkpointer:
        for i in range(1, 6):
            w = step(w)
            checkpointer.save(i, {"w": w}, {})
            before = w
            w = step(w)
            w = step(w)
            # From jax 0.11 on, a buffer on a CPU that the host has read is copied instead.
            assert before.is_deleted() or jax.__version_info__ >= (0, 11)
        checkpointer.wait()
        for i in range(1, 6):
            restored = checkpointer.restore({"w": w}, step=i).arrays["w"]
            np.testing.assert_array_equal(restored, np.full((300, 300), 3 * i - 2))


def test_keeps_the_last_and_the_best(tmp_path):
    metrics = {1: 0.5, 2: 0.9, 3: None, 4: float("nan"), 5: 0.9, 6: 0.1, 7: None}
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        for step, metric in metrics.items():
            checkpointer.save(step, small_state(step), {}, metric)
        checkpointer.wait()
        assert checkpointer.steps() == [2, 6, 7]
        assert checkpointer.best_step == 2
        assert checkpointer.latest_step == 7
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        assert checkpointer.best_step == 2
        checkpointer.save(8, small_state(8), {}, metric=np.float32(0.95))
        checkpointer.save(9, small_state(9), {})
        checkpointer.save(10, small_state(10), {})
        checkpointer.wait()
        assert checkpointer.steps() == [8, 9, 10]
        assert checkpointer.best_step == 8
        assert_same(checkpointer.restore(small_state(), step=8).arrays, small_state(8))
    assert sorted(os.listdir(tmp_path)) == ["10", "8", "9"]


def test_without_metrics_there_is_no_best(tmp_path):
    with Checkpointer(filled(tmp_path, keep=2)) as checkpointer:
        assert checkpointer.steps() == [200, 300]
        assert checkpointer.best_step is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1, {"x": np.ones(1)}, {}), CheckpointError, "step 1 is not after"),
        ((-1, {"x": np.ones(1)}, {}), CheckpointError, "step -1 is not after"),
        ((2.0, {"x": np.ones(1)}, {}), TypeError, "'float' object cannot be interpreted"),
        ((2, {"x": np.ones(1)}, {"a": np.ones(1)}), TypeError, "ndarray is not JSON serializable"),
    ],
)
def test_bad_input_is_one_line_and_saves_nothing(tmp_path, arguments, error, message):
    with Checkpointer(filled(tmp_path, steps=(1,))) as checkpointer:
        with pytest.raises(error, match=message) as caught:
            checkpointer.save(*arguments)
        assert "\n" not in str(caught.value)
        assert checkpointer.steps() == [1]


@pytest.mark.parametrize("keep", [0, -1, 1.5, True])
def test_keep_is_checked(tmp_path, keep):
    with pytest.raises(ValueError, match="a whole number of at least 1 is needed"):
        Checkpointer(tmp_path, keep=keep)


def test_unwritable_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write checkpoints to .*/file/c") as error:
        Checkpointer(tmp_path / "file" / "c")
    assert "\n" not in str(error.value)


def test_failure_in_the_background_is_reported_and_the_next_save_works(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("disk full")

    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, small_state(1), {}, metric=0.1)
        checkpointer.wait()
        with monkeypatch.context() as patch:
            patch.setattr(ocp.StandardCheckpointHandler, "finalize", full)
            checkpointer.save(2, small_state(2), {}, metric=0.9)
            with pytest.raises(CheckpointError, match=r"checkpoint 2 could not .* disk full"):
                checkpointer.wait()
        assert checkpointer.steps() == [1]
        assert checkpointer.best_step == 1
        checkpointer.save(2, small_state(2), {})
        assert checkpointer.restore(small_state()).step == 2
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_read_only_changes_nothing(tmp_path):
    directory = filled(tmp_path / "c", steps=(1,))
    (directory / "2.orbax-checkpoint-tmp").mkdir()
    (directory / "3").mkdir()
    with Checkpointer(directory, read_only=True) as reader:
        assert reader.restore(small_state()).step == 1
        with pytest.raises(CheckpointError, match="reading only"):
            reader.save(4, small_state(), {})
    assert sorted(os.listdir(directory)) == ["1", "2.orbax-checkpoint-tmp", "3"]
    missing = Checkpointer(tmp_path / "missing", read_only=True)
    assert missing.restore(small_state()) is None
    assert not (tmp_path / "missing").exists()


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}


def python(code: str, *arguments: object, **kwargs) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env=environment(), stdout=pipe, stderr=pipe, text=True, **kwargs
    )


SAVE_FOREVER = """
    import sys
    import numpy as np
    from jdecouple.checkpoint import Checkpointer

    checkpointer = Checkpointer(sys.argv[1], keep=2)
    template = {f"w{i}": np.zeros((256, 1024), np.float32) for i in range(12)}
    restored = checkpointer.restore(template)
    step = restored.step if restored else 0
    rng = np.random.default_rng(0)
    noise = {name: rng.random(value.shape, np.float32) for name, value in template.items()}
    while True:
        step += 1
        checkpointer.save(step, {k: v + step for k, v in noise.items()}, {"step": step})
        print(step, flush=True)
"""


@pytest.mark.slow
def test_sigkill_leaves_whole_checkpoints_only(tmp_path):
    rng = np.random.default_rng(0)
    noise = {f"w{i}": rng.random((256, 1024), np.float32) for i in range(12)}
    latest, partial = 0, 0
    for delay in (0.0, 0.011, 0.03, 0.057):
        process = python(SAVE_FOREVER, tmp_path)
        for _ in range(3):
            started = int(process.stdout.readline())
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        partial += any("tmp" in name for name in os.listdir(tmp_path))
        restored = Checkpointer(tmp_path, read_only=True).restore(noise)
        assert restored.step >= max(started - 1, latest)
        latest = restored.step
        assert restored.extra == {"step": latest}
        assert_same(restored.arrays, {name: value + latest for name, value in noise.items()})
    assert partial, "no kill fell into a save"
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(latest + 1, noise, {})
    assert not [name for name in os.listdir(tmp_path) if not name.isdecimal()]


@pytest.mark.slow
def test_the_console_stays_empty_in_normal_use(tmp_path):
    process = python(
        """
        import sys
        from absl import app, logging
        def main(argv):
            import jax.numpy as jnp
            from jdecouple.checkpoint import Checkpointer
            logging.set_verbosity(logging.INFO)
            tree = {"x": jnp.ones((3, 3))}
            for step in range(3):
                with Checkpointer(argv[1], keep=1) as checkpointer:
                    checkpointer.restore(tree)
                    checkpointer.save(step, tree, {}, metric=-step)
            (checkpointer.directory / "2" / "state" / "manifest.ocdbt").unlink()
            (checkpointer.directory / "9").mkdir()
            Checkpointer(argv[1]).restore(tree)
        app.run(main)
        """,
        tmp_path,
    )
    out, err = process.communicate(timeout=600)
    lines = [line for line in err.splitlines() if "jax" not in line]
    assert out == ""
    assert len(lines) == 2, err
    assert lines[0].endswith(
        "checkpoint 9 refused: not a checkpoint of this program (no info/metadata); trying 2"
    )
    assert "checkpoint 2 refused: unreadable (ValueError: NOT_FOUND: " in lines[1]
    assert lines[1].endswith("; trying 0")


@pytest.mark.slow
def test_one_process_of_two_writes_and_both_read(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = """
        import sys, time, pathlib
        import jax, numpy as np
        from jdecouple.checkpoint import Checkpointer
        directory, port, process = sys.argv[1], sys.argv[2], int(sys.argv[3])
        jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
        assert jax.process_count() == 2
        tree = {"x": np.arange(5.0)}
        done = pathlib.Path(directory) / "done"
        if process == 0:
            with Checkpointer(directory, keep=1) as checkpointer:
                for step in range(4):
                    checkpointer.save(step, tree, {"step": step})
                assert checkpointer.restore(tree).step == 3
            done.touch()
        while not done.exists():
            time.sleep(0.02)
        restored = Checkpointer(directory, read_only=True).restore(tree)
        assert restored.arrays["x"].tobytes() == tree["x"].tobytes()
        print("restored", restored.step)
    """
    processes = [python(code, tmp_path, port, index) for index in range(2)]
    results = [process.communicate(timeout=600) for process in processes]
    assert [out for out, _ in results] == ["restored 3\n"] * 2, results


def test_a_plain_orbax_reader_sees_named_arrays(tmp_path):
    filled(tmp_path, steps=(7,))
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(tmp_path / "7" / "state")
    kernel = "stage_0%2Fparams%2Flayers%2F0%2Fkernel"
    assert set(state) == {kernel, "stage_1%2Fparams%2Fa.b", "step"}
    assert json.loads((tmp_path / "7" / "info" / "metadata").read_text())["document"]["step"] == 7
