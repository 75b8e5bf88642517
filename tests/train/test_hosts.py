"""`train.py` as several processes on loopback: the results, checkpoints and ends of one run.

One run that ends as it should and one that is refused are fast; the others are slow.
"""

import atexit
import functools
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
from runs import arguments, assert_same_run, copy, delayed, final_arrays, finished, lines, server
from text_sets import csv_set

from jdecouple.checkpoint import Checkpointer
from jdecouple.train.lock import only_run

DEINFOREG = {"mesh__stages": 2}
FDG = {**delayed("fdg"), "mesh__stages": 2}
BP = {**runs.BP, "mesh__stages": 2, "schedule": "1f1b", "microbatches": 2}
ONE_STAGE = {**runs.BP, "mesh__stages": 1, "mesh__data": 2}
SHARDED = {**ONE_STAGE, "mesh__shard_optimizer": True}
GROWING = {  # from two blocks to three, of which the frozen ones move together
    "mesh__stages": 2,
    "model__depth": 3,
    "growth__blocks": "(2,3)",
    "growth__steps": "(0,5)",
}
SHORT = {"epochs": 1}  # nine steps
TOTAL = 27
SOON = 300  # seconds in which all end after one is lost


def start(
    folder: Path, count: int, devices: int = 1, *, apart: bool = False, **values
) -> list[runs.Run]:
    """Starts or continues a run as so many processes."""
    return start_each(folder, [{}] * count, devices, apart=apart, **values)


def start_each(
    folder: Path, own: list[dict[str, Any]], devices: int = 1, *, apart: bool = False, **values
) -> list[runs.Run]:
    """Processes with values of their own, and one folder.

    Those that are `apart` do not see the folder of the first, and use none.
    """
    port, unused = runs.free_port(), folder.with_name("unused")
    return server().start_together(
        [
            [
                *arguments(**{"workdir": unused if apart and index else folder, **values, **mine}),
                f"--coordinator=127.0.0.1:{port}",
                f"--num_processes={len(own)}",
                f"--process_index={index}",
            ]
            for index, mine in enumerate(own)
        ],
        devices=devices,
    )


def end(processes: list[runs.Run], code: int = 0) -> list[runs.Run]:
    """Waits for all; only the first has said anything."""
    codes = [process.wait().returncode for process in processes]
    assert codes == [code] * len(codes), [process.stderr[-2000:] for process in processes]
    assert [process.stdout for process in processes[1:]] == [""] * (len(processes) - 1)
    return processes


def train(folder: Path, count: int, devices: int = 1, *, apart: bool = False, **values) -> runs.Run:
    """A run to its end; returns the first process."""
    first, *others = end(start(folder, count, devices, apart=apart, **values))
    assert [process.stderr for process in others] == [""] * len(others)
    assert not folder.with_name("unused").exists()
    return first


@functools.cache
def whole(devices: int = 2, **values) -> Path:
    """Workdir of the same run in one process that nothing has interrupted."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return alone(Path(folder.name) / "run", devices, **values)


def alone(folder: Path, devices: int, **values) -> Path:
    run = server().run(*arguments(folder, **values), devices=devices)
    assert run.returncode == 0, run.stderr
    return folder


def items(folder: Path) -> set[str]:
    """What the last checkpoint consists of."""
    step = Checkpointer(folder / "checkpoints", read_only=True).latest_step
    return {path.name for path in (folder / "checkpoints" / f"{step}").iterdir() if path.is_dir()}


def reached(step: int, folder: Path):
    return lambda: any(line["step"] >= step for line in lines(folder))


def assert_close(folder: Path, reference: Path, tolerance: float = 1e-5) -> None:
    """Arrays of the last checkpoints within a share of each one's largest entry (float32)."""
    (step, arrays), (wanted_step, wanted) = map(final_arrays, (folder, reference))
    assert step == wanted_step
    assert arrays.keys() == wanted.keys()
    for name, array in wanted.items():
        assert arrays[name].shape == array.shape
        scale = max(1e-3, float(np.max(np.abs(array), initial=0)))
        np.testing.assert_allclose(
            arrays[name].astype(float), array.astype(float), rtol=0, atol=tolerance * scale
        )


class TestResults:
    """Stages in several processes train like stages on several devices of one."""

    @pytest.mark.parametrize(
        "values",
        [
            pytest.param(DEINFOREG, marks=pytest.mark.slow),  # test_processes.py has fast ones
            pytest.param(FDG, marks=pytest.mark.slow),
            pytest.param(BP, marks=pytest.mark.slow),
            pytest.param(GROWING, marks=pytest.mark.slow),
        ],
        ids=["deinforeg", "fdg", "1f1b", "growing"],
    )
    def test_two_processes_to_the_bit(self, tmp_path, values):
        first = train(tmp_path / "two", 2, **values, **SHORT)
        assert items(tmp_path / "two") == {"info", "stage_0.process_0", "stage_1.process_1"}
        assert "test accuracy" in first.stdout
        assert (tmp_path / "two" / "curves.png").is_file()
        assert_same_run(tmp_path / "two", alone(tmp_path / "one", 2, **values, **SHORT))

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("method", "values"),
        [
            ("deinforeg", {"method__projector": "8-4"}),
            ("bp", {"schedule": "1f1b", "microbatches": 2}),
            ("fdg", {}),
        ],
    )
    def test_two_processes_with_batches_of_several_lengths(self, tmp_path, method, values):
        texts = csv_set(tmp_path / "texts", train=100)
        values |= {"config": f"equal:{texts},lstm,{method}", "data__buckets": "(4,8,12)"}
        values |= {"model__hidden": 6, "model__depth": 2, "batch_size": 8, "mesh__stages": 2}
        values |= {"steps": 8, "eval_every": 4}
        train(tmp_path / "two", 2, **values)
        assert_same_run(tmp_path / "two", alone(tmp_path / "one", 2, **values))

    @pytest.mark.slow
    def test_two_processes_begin_with_other_weights_and_stop_early(self, tmp_path):
        """By a rate that moves nothing: the second evaluation is no better than the first."""
        values = {**DEINFOREG, "init_from": f"{whole(**DEINFOREG, **SHORT)}@9"}
        values |= {"early_stopping__patience": 1, "optimizer__learning_rate": 1e-30}
        first = train(tmp_path / "two", 2, **values)
        assert "; taken: block 0-1, classifier 0-1, projector 0-1; fresh: " in first.stdout
        assert f"ended at step 18 of {TOTAL} by early stopping" in first.stdout
        assert_same_run(tmp_path / "two", alone(tmp_path / "one", 2, **values))
        again = train(tmp_path / "two", 2, **values)
        assert f"ended at step 18 of {TOTAL} by early stopping" in again.stdout

    @pytest.mark.slow
    def test_two_processes_go_on_in_float16(self, tmp_path):
        """With scales of losses that the checkpoint does not hold."""
        for folder, run in (("two", functools.partial(train, count=2)), ("one", alone)):
            options = {"devices": 1 if folder == "two" else 2, **DEINFOREG}
            run(tmp_path / folder, **options, **SHORT)
            run(tmp_path / folder, **options, dtype="float16")
        assert_same_run(tmp_path / "two", tmp_path / "one")
        assert "block_1/loss_scale/scale" in final_arrays(tmp_path / "two")[1]

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "values", [{**FDG, "num_stages": 4}, {}, BP], ids=["fdg", "deinforeg", "bp"]
    )
    def test_four_processes_to_the_bit(self, tmp_path, values):
        values = {**values, "mesh__stages": 4, "model__depth": 4, **SHORT}
        train(tmp_path / "four", 4, **values)
        assert_same_run(tmp_path / "four", alone(tmp_path / "one", 4, **values))

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("count", "devices", "values"),
        [
            (2, 1, ONE_STAGE),
            (2, 1, SHARDED),
            # The second stage has a device in either process, and twice as many as the first: its
            # messages are cut, and what waits in it lies in both.
            (2, 2, {**delayed("fdg"), "mesh__replicas": "(1,2)"}),
            (4, 1, {**DEINFOREG, "mesh__data": 2}),
        ],
        ids=["one-stage", "sharded", "uneven", "two-by-two"],
    )
    def test_a_stage_in_two_processes(self, tmp_path, count, devices, values):
        """To 1e-5 of the largest entry: two processes add up their gradients in another way."""
        values = {**values, **SHORT}
        train(tmp_path / "run", count, devices, **values)
        assert_close(tmp_path / "run", alone(tmp_path / "one", 4, **values))


@pytest.mark.slow
class TestResume:
    @pytest.mark.parametrize("apart", [False, True], ids=["one-folder", "apart"])
    def test_on_fewer_and_on_more_processes(self, tmp_path, apart):
        """Two processes, then one, then two; to the bit, as the stages are the same."""
        folder = tmp_path / "run"
        train(folder, 2, apart=apart, **FDG, epochs=1)
        stages = {"state"} if apart else {"stage_0.process_0", "stage_1.process_1"}
        assert items(folder) == {"info", *stages}
        alone(folder, 2, **FDG, epochs=2)
        assert items(folder) == {"info", "state"}
        last = train(folder, 2, apart=apart, **FDG)
        assert "continuing from step 18 of 27" in last.stdout
        assert_same_run(folder, whole(**FDG))

    def test_with_parts_of_the_optimizer_and_without(self, tmp_path):
        """A process reads and writes the whole of what it holds a part of."""
        folder, rate = tmp_path / "run", {"optimizer__schedule": "constant"}
        train(folder, 2, **{**SHARDED, **rate}, epochs=1)
        alone(folder, 1, **{**SHARDED, **rate, "mesh__data": 1}, epochs=2)
        last = train(folder, 2, **{**SHARDED, **rate})
        assert "continuing from step 18 of 27" in last.stdout
        assert_close(folder, whole(**{**ONE_STAGE, **rate}))

    def test_what_one_process_cannot_read_is_refused_by_both(self, tmp_path):
        """The stage of the other: it says so, and both begin with the checkpoint before."""
        folder = tmp_path / "run"
        train(folder, 2, **DEINFOREG)
        for path in (folder / "checkpoints" / "27" / "stage_1.process_1").rglob("*"):
            if path.is_file():
                path.write_bytes(bytes(path.stat().st_size))
        first = train(folder, 2, **DEINFOREG)
        assert "continuing from step 24 of 27" in first.stdout
        assert "checkpoint 27 refused: " in first.stderr
        assert_same_run(folder, whole(**DEINFOREG))

    def test_on_one_device(self, tmp_path):
        """The stages are fused there, hence not to the bit."""
        train(tmp_path / "run", 2, **DEINFOREG, epochs=1)
        alone(tmp_path / "run", 1, mesh__stages=1, epochs=2)
        assert_close(tmp_path / "run", finished(mesh__stages=1, epochs=2))


@pytest.mark.slow
class TestLost:
    @pytest.mark.parametrize(
        ("victim", "values"),
        [(1, DEINFOREG), (0, FDG), (1, ONE_STAGE), (0, BP)],
        ids=["1-deinforeg", "0-fdg", "1-replica", "0-bp"],
    )
    def test_a_killed_process_ends_the_others_and_the_run_goes_on(self, tmp_path, victim, values):
        processes = start(tmp_path / "run", 2, **values)
        runs.wait_for(reached(11, tmp_path / "run"), processes[0])
        processes[victim].signal(signal.SIGKILL)
        began = time.monotonic()
        assert processes[victim].wait().returncode == -signal.SIGKILL
        other = processes[1 - victim].wait()
        assert time.monotonic() - began < SOON
        assert other.returncode == 3
        (line,) = [line for line in other.stderr.splitlines() if "examples/s" not in line][-1:]
        assert line.startswith(f"error: process {victim} (")
        assert line.endswith(
            "is lost: start all processes again, and the run continues from its last checkpoint"
        )
        if victim == 0:
            assert other.stderr.splitlines() == [line]
        again = train(tmp_path / "run", 2, **values)
        assert "continuing from step" in again.stdout
        if values is ONE_STAGE:
            assert final_arrays(tmp_path / "run")[0] == TOTAL
        else:
            assert_same_run(tmp_path / "run", whole(**values))

    def test_a_silent_process_is_lost_too(self, tmp_path):
        """It is held: its machine answers, but nothing more comes."""
        processes = start(tmp_path / "run", 2, **DEINFOREG, epochs=1000)
        runs.wait_for(reached(2, tmp_path / "run"), processes[0])
        processes[1].pause()
        try:
            assert processes[0].wait().returncode == 3
            assert "error: process 1 (" in processes[0].stderr
        finally:
            processes[1].signal(signal.SIGKILL)


@pytest.mark.slow
class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_one_signal_saves_and_ends_all(self, tmp_path, number):
        folder = tmp_path / "run"
        processes = start(folder, 2, **DEINFOREG)
        runs.wait_for(reached(5, folder), processes[0])
        processes[number == signal.SIGTERM].signal(number)
        first, _ = end(processes)
        stopped, _ = final_arrays(folder)
        assert 5 <= stopped < TOTAL
        assert f"stopped at step {stopped} of {TOTAL}: the same command continues" in first.stdout
        train(folder, 2, **DEINFOREG)
        assert_same_run(folder, whole(**DEINFOREG))


def listening(pid: int) -> list[str]:
    """Addresses at which a process listens, in hexadecimal as Linux has them."""
    own = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()}
    rows = [
        row.split()
        for table in ("tcp", "tcp6")
        for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    return [
        row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own
    ]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="Linux tells who listens")
def test_nothing_listens_but_on_loopback(tmp_path):
    processes = start(tmp_path / "run", 2, **DEINFOREG, epochs=1000)
    runs.wait_for(reached(2, tmp_path / "run"), processes[0])
    found = [listening(process.pid) for process in processes]
    processes[0].signal(signal.SIGTERM)
    end(processes)
    assert all(found)
    assert {address[-8:] for each in found for address in each} == {"0100007F"}


class TestRefused:
    @pytest.mark.slow
    def test_another_run_in_the_workdir(self, tmp_path):
        folder = copy(whole(**DEINFOREG), tmp_path)
        before = runs.fingerprint(folder)
        first, second = end(start(folder, 2, **DEINFOREG, seed=5), code=2)
        told = "the workdir holds a run with config.seed = 0, now 5"
        assert_one_line(first, f"error: {told}")
        assert_one_line(second, "error: process 0 (", told)
        assert runs.fingerprint(folder) == before

    @pytest.mark.slow
    def test_another_run_that_uses_the_workdir(self, tmp_path):
        with only_run(tmp_path / "run"):
            first, second = end(start(tmp_path / "run", 2, **DEINFOREG), code=2)
            assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
        told = f"is in use by another run, process {os.getpid()} on "
        assert_one_line(first, "error: workdir ", told)
        assert_one_line(second, "error: process 0 (", told)

    def test_processes_with_other_configurations(self, tmp_path):
        commands = [{"seed": 0}, {"seed": 1}]
        first, second = end(start_each(tmp_path / "run", commands, **DEINFOREG), code=2)
        told = "process 1 has config.seed = 1, process 0 0"
        assert_one_line(first, f"error: {told}")
        assert_one_line(second, "error: process 0 (", told)
        assert not (tmp_path / "run").exists()

    @pytest.mark.slow
    def test_a_process_without_work(self, tmp_path):
        """Both find it, and either may be the first to say so."""
        for process in end(start(tmp_path / "run", 2, mesh__stages=1), code=2):
            assert_one_line(process, "error: ", "the stages take no device of process 1: 2 ")
        assert not (tmp_path / "run").exists()

    @pytest.mark.slow
    def test_divergence(self, tmp_path):
        values = {**DEINFOREG, "optimizer__learning_rate": 1e30, "optimizer__name": "sgd"}
        first, second = end(start(tmp_path / "run", 2, **values), code=1)
        assert "is not finite" in first.stderr or "the loss of block" in first.stderr
        assert_one_line(second, "error: process 0 (", "checkpoint")


def assert_one_line(process: runs.Run, begin: str, *parts: str) -> None:
    (line,) = process.stderr.splitlines()
    assert line.startswith(begin)
    assert all(part in line for part in parts)
