"""Runs that are killed, stopped, damaged or prolonged end as if nothing had happened.

A delayed run that is killed is fast, as are refusals; the others are slow.
"""

import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
from runs import BP, arguments, assert_same_run, copy, delayed, fingerprint, finished, lines, server

from jdecouple.checkpoint import Checkpointer
from jdecouple.train import cli as command_line
from jdecouple.train.config import ConfigError
from jdecouple.train.loop import Interrupt, train_and_evaluate

TOTAL = 27
FDG = delayed("fdg")


def started(folder: Path) -> bool:
    return (folder / "checkpoints").is_dir()


def reached(step: int):
    return lambda folder: any(line["step"] >= step for line in lines(folder))


def evaluated(step: int):
    return lambda folder: any(
        line["step"] >= step and line["split"] == "validation" for line in lines(folder)
    )


def writing(folder: Path) -> bool:
    """Whether a checkpoint is being written: Orbax renames its folder when it is whole."""
    checkpoints = folder / "checkpoints"
    return checkpoints.is_dir() and any("tmp" in name for name in os.listdir(checkpoints))


KILLS = (reached(6), writing, evaluated(9), writing)


def kill(folder: Path, when, **values) -> None:
    """Starts or continues the run in a folder and kills it in the state `when`."""
    fresh = latest(folder) is None
    run = server().start(*arguments(folder, **values))

    def due() -> bool:
        # Until it says so, what is on disk is what the run before left.
        return (fresh or "continuing from step" in run.stdout) and when(folder)

    while run.returncode is None:
        runs.wait_for(due, run)
        run.pause()
        # A checkpoint may have become whole before the process stood still.
        if due():
            run.signal(signal.SIGKILL)
            run.wait()
        else:
            run.signal(signal.SIGCONT)
    assert run.returncode == -signal.SIGKILL


def go_on(folder: Path, **values) -> runs.Run:
    run = server().run(*arguments(folder, **values))
    assert run.returncode == 0, run.stderr
    return run


def latest(folder: Path) -> int | None:
    return Checkpointer(folder / "checkpoints", read_only=True).latest_step


@pytest.mark.slow
def test_killed_again_and_again(tmp_path):
    reference = finished()
    kill(tmp_path, started)
    assert latest(tmp_path) is None
    for when in (reached(6), writing, evaluated(9), reached(15), writing):
        kill(tmp_path, when)
    assert 0 < latest(tmp_path) < TOTAL
    resumed = go_on(tmp_path)
    assert "continuing from step" in resumed.stdout
    assert_same_run(tmp_path, reference)


@pytest.mark.slow
def test_backpropagation_killed_while_writing(tmp_path):
    reference = finished(**BP)
    kill(tmp_path, lambda folder: reached(9)(folder) and writing(folder), **BP)
    go_on(tmp_path, **BP)
    assert_same_run(tmp_path, reference)


@pytest.mark.slow
@pytest.mark.parametrize("method", [{}, delayed("fr")], ids=["deinforeg", "fr"])
def test_stages_on_devices_of_their_own_killed(tmp_path, method):
    values = {**method, "mesh__stages": 2, "epochs": 2}
    apart = tmp_path / "apart"
    whole = server().run(*arguments(tmp_path / "whole", **values), devices=2)
    run = server().start(*arguments(apart, **values), devices=2)
    runs.wait_for(lambda: reached(7)(apart), run)
    run.signal(signal.SIGKILL)
    resumed = run.wait().returncode, server().run(*arguments(apart, **values), devices=2).returncode
    assert (whole.returncode, *resumed) == (0, -signal.SIGKILL, 0)
    assert_same_run(apart, tmp_path / "whole")


class TestDelayed:
    """What waits between two iterations is part of a checkpoint."""

    @pytest.mark.parametrize(
        ("values", "kills"),
        [
            (FDG, [evaluated(9)]),
            pytest.param(FDG, KILLS, marks=pytest.mark.slow),
            pytest.param(delayed("adl", method__accumulate=2), KILLS, marks=pytest.mark.slow),
        ],
        ids=["fdg", "fdg more often", "adl"],
    )
    def test_killed_again_and_again(self, tmp_path, values, kills):
        reference = finished(**values)
        for when in kills:
            kill(tmp_path, when, **values)
        step, arrays = runs.final_arrays(tmp_path)
        assert 0 < step < TOTAL
        queued = [name for name in arrays if "/waiting/" in name and np.any(arrays[name])]
        assert {name.split("/")[2] for name in queued} == {"messages", "residuals", "errors"}
        if "method__accumulate" in values:  # killed between two passes of one of the stages
            assert any(np.any(value) for name, value in arrays.items() if "mini_step" in name)
        go_on(tmp_path, **values)
        assert_same_run(tmp_path, reference)

    @pytest.mark.slow
    def test_more_epochs(self, tmp_path):
        """The end of a run does not drain what waits."""
        go_on(tmp_path, epochs=1, **FDG)
        assert latest(tmp_path) == 9
        go_on(tmp_path, **FDG)
        assert_same_run(tmp_path, finished(**FDG))

    @pytest.mark.slow
    def test_continued_before_the_first_batch_has_reached_the_end(self, tmp_path):
        values = {**FDG, "model__depth": 3, "num_stages": 3}
        for steps in (1, 2):
            go_on(tmp_path, steps=steps, **values)
            assert latest(tmp_path) == steps
        go_on(tmp_path, **values)
        (step, arrays), (wanted_step, wanted) = map(
            runs.final_arrays, (tmp_path, finished(**values))
        )
        assert step == wanted_step
        assert arrays.keys() == wanted.keys()
        assert all(np.array_equal(arrays[name], wanted[name]) for name in wanted)

    @pytest.mark.slow
    def test_on_other_devices(self, tmp_path):
        """Where the stages begin matters, not where they run."""
        folder = copy(finished(epochs=1, **FDG), tmp_path)
        values = {**FDG, "epochs": 2}
        run = server().run(*arguments(folder, **values, mesh__stages=2, mesh__data=2), devices=4)
        assert run.returncode == 0, run.stderr
        assert "continuing from step 9 of 18" in run.stdout
        found, wanted = (
            {(line["step"], line["split"]): line["loss"] for line in lines(each) if "loss" in line}
            for each in (folder, finished(**FDG))
        )
        assert len(found) == 17 + 2 * 2
        assert found == pytest.approx({key: wanted[key] for key in found}, rel=1e-3)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("values", "said"),
        [
            ({"boundaries": "(0,2)"}, "config.boundaries = [0, 1], now [0, 2]"),
            ({"num_stages": 3}, "config.boundaries = [0, 1], now [0, 1, 2]"),
            ({"num_stages": 1}, "config.boundaries = [0, 1], now None"),
            ({"method__name": "adl"}, "config.method = name 'fdg' (now 'adl')"),
            ({"method__beta": 0.5}, "config.method = beta None (now 0.5)"),
        ],
    )
    def test_with_other_stages(self, values, said, capfd, monkeypatch):
        given = {**FDG, "model__depth": 3, "boundaries": "(0,1)", "epochs": 1}
        folder = finished(**given)
        before = fingerprint(folder)
        if "num_stages" in values:
            del given["boundaries"]
        monkeypatch.setattr(command_line, "log_in_short", lambda: None)
        with pytest.raises(SystemExit) as stopped:
            command_line.main(["train.py", *arguments(folder, **{**given, **values})])
        assert stopped.value.code == 2
        told = capfd.readouterr().err.splitlines()
        assert told == [
            f"error: the workdir holds a run with {said}: choose another workdir, or the same value"
        ]
        assert fingerprint(folder) == before

    @pytest.mark.slow
    def test_by_another_version_of_jax(self, tmp_path, monkeypatch):
        folder = copy(finished(epochs=1, **FDG), tmp_path)
        before = fingerprint(folder)
        config, _ = command_line.parse(["train.py", *arguments(folder, **FDG)])
        version = jax.__version__
        monkeypatch.setattr(jax, "__version__", "9.8.7")
        with pytest.raises(ConfigError) as error:
            train_and_evaluate(config, folder)
        assert f"a run with JAX version = {version}, now 9.8.7" in str(error.value)
        assert "\n" not in str(error.value)
        assert fingerprint(folder) == before


@pytest.mark.slow
def test_stopped_by_signals(tmp_path):
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # pytest under nohup, as are its runs
        numbers.pop()
    for number, step in zip(numbers, (5, 14, 20), strict=False):
        run = server().start(*arguments(tmp_path))
        runs.wait_for(lambda step=step: reached(step)(tmp_path), run)
        run.signal(number)
        assert run.wait().returncode == 0, run.stderr
        stopped = latest(tmp_path)
        assert step <= stopped < TOTAL
        assert f"stopped at step {stopped} of {TOTAL}" in run.stdout
        assert "the same command continues" in run.stdout
        assert max(line["step"] for line in lines(tmp_path)) == stopped
        assert (tmp_path / "curves.png").is_file()
    assert f"continuing from step {stopped} of {TOTAL}" in go_on(tmp_path).stdout
    assert_same_run(tmp_path, finished())


def truncate(checkpoint: Path) -> None:
    files = [path for path in (checkpoint / "state").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def of_another_net(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    shutil.copytree(finished(**BP) / "checkpoints" / checkpoint.name, checkpoint)


def of_another_program(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()
    (checkpoint / "weights.bin").write_bytes(b"\0" * 64)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [truncate, of_another_net, of_another_program])
def test_bad_newest_checkpoint(tmp_path, damage):
    folder = copy(finished(), tmp_path)
    steps = Checkpointer(folder / "checkpoints", read_only=True).steps()
    damage(folder / "checkpoints" / str(TOTAL))
    run = go_on(folder)
    refused = [line for line in run.stderr.splitlines() if "refused" in line]
    assert len(refused) == 1
    assert f"checkpoint {TOTAL} refused" in refused[0]
    assert f"continuing from step {steps[-2]} of {TOTAL}" in run.stdout
    assert_same_run(folder, finished())
    assert (folder / "checkpoints_refused" / str(TOTAL)).is_dir()


@pytest.mark.slow
def test_more_epochs(tmp_path):
    go_on(tmp_path, epochs=1)
    assert latest(tmp_path) == 9
    go_on(tmp_path)
    assert_same_run(tmp_path, finished())


@pytest.mark.slow
def test_a_finished_run_is_only_told_of(tmp_path):
    folder = copy(finished(), tmp_path)
    before = fingerprint(folder / "checkpoints")
    run = go_on(folder)
    assert "last step" in run.stdout
    assert fingerprint(folder / "checkpoints") == before
    assert_same_run(folder, finished())


class TestInterrupt:
    @pytest.fixture(autouse=True)
    def at_a_terminal(self):
        """Even where the tests themselves run under nohup."""
        before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
        yield
        signal.signal(signal.SIGHUP, before)

    def test_first_signal_asks_and_the_second_interrupts(self):
        with Interrupt() as interrupt:
            assert not interrupt.requested
            signal.raise_signal(signal.SIGTERM)
            assert interrupt.requested
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)

    def test_a_lost_terminal_asks_and_never_interrupts(self):
        with Interrupt() as interrupt:
            for _ in range(3):  # one from the shell, one from the system
                signal.raise_signal(signal.SIGHUP)
                assert interrupt.requested
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGHUP)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)

    def test_under_nohup_a_lost_terminal_is_nothing(self):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with Interrupt() as interrupt:
            signal.raise_signal(signal.SIGHUP)
            assert not interrupt.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN

    def test_handlers_are_put_back(self):
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        before = [signal.getsignal(number) for number in numbers]
        with Interrupt():
            assert not set(before) & {signal.getsignal(number) for number in numbers}
        assert [signal.getsignal(number) for number in numbers] == before
