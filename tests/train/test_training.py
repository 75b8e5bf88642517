"""The loop: what it writes, returns and keeps, and that the mesh does not change its numbers."""

import json
import signal
import threading
import time

import chex
import jax
import numpy as np
import pytest
import runs
from absl import flags
from runs import arguments, cheap, finished, lines, server, tiny

from jdecouple import data
from jdecouple.checkpoint import Checkpointer, CheckpointError
from jdecouple.pipeline.step_metrics import StepMetrics
from jdecouple.train import cli as command_line
from jdecouple.train.loop import NonFiniteError, build, train_and_evaluate
from jdecouple.trainer import Trainer

TERMS = ("accuracy", "covariance", "cross_entropy", "invariance", "loss", "variance")


@pytest.fixture(scope="module")
def notebook_run(tmp_path_factory):
    """Workdir and result of a run in a thread of a process without parsed flags."""
    workdir = tmp_path_factory.mktemp("notebook") / "made" / "here"
    results = []
    flags.FLAGS.unparse_flags()
    thread = threading.Thread(target=lambda: results.append(train_and_evaluate(tiny(), workdir)))
    before = signal.getsignal(signal.SIGTERM)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before
    return workdir, *results


class TestWhatARunLeaves:
    def test_metrics(self, notebook_run):
        workdir, _ = notebook_run
        written = lines(workdir)
        train, validation, test = (
            [line for line in written if line["split"] == split]
            for split in ("train", "validation", "test")
        )
        assert len(written) == len(train) + len(validation) + len(test)
        assert [line["step"] for line in train] == list(range(1, 28))
        blocks = {f"block_{i}/{term}" for i in (0, 1) for term in TERMS}
        own = {"step", "split", "loss", "accuracy", "examples_per_second", "input_wait"}
        own |= {"learning_rate", "process_memory_peak"}
        assert set(train[0]) == own | blocks
        exits = {f"exit_{i}/{each}" for i in (0, 1) for each in ("loss", "accuracy")}
        for part in (validation, test):
            assert [line["step"] for line in part] == [9, 18, 27]
            assert set(part[0]) == {"step", "split", "loss", "accuracy"} | exits
            assert all(0 <= line["accuracy"] <= 1 for line in part)
            assert all(line["accuracy"] == line["exit_1/accuracy"] for line in part)
        for line in train:
            assert line["loss"] == pytest.approx(line["block_0/loss"] + line["block_1/loss"])
            assert line["examples_per_second"] > 0
            assert 0 <= line["input_wait"] <= 1

    def test_curves(self, notebook_run):
        assert (notebook_run[0] / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")

    def test_config(self, notebook_run):
        content = json.loads((notebook_run[0] / "config.json").read_text())
        assert content["config"]["model"]["hidden"] == 16
        assert content["config"]["seed"] == 0
        assert content["total_steps"] == 27
        assert content["boundaries"] == [0]
        assert content["versions"]["jax"] == jax.__version__
        assert {"python", "jaxlib", "flax", "optax", "numpy"} <= set(content["versions"])
        assert content["devices"] == [[str(jax.devices()[0])]]
        assert content["device_kind"]
        # Dense 64-16-16, projectors 16-8-4 with BatchNorm, classifiers of BatchNorm and 4-10.
        head = (16 * 8 + 8) + 2 * 8 + (8 * 4 + 4) + 2 * 4 + (4 * 10 + 10)
        assert content["parameters"] == (64 * 16 + 16) + (16 * 16 + 16) + 2 * head

    def test_result(self, notebook_run):
        workdir, result = notebook_run
        written = lines(workdir)
        tests = {line["step"]: line for line in written if line["split"] == "test"}
        validations = [line for line in written if line["split"] == "validation"]
        best = max(validations, key=lambda line: line["accuracy"])["step"]
        assert result["finished"]
        assert result["step"] == 27
        assert result["test"] == tests[27]
        assert result["test_at_best_validation"] == tests[best]
        highest = max(max(t["exit_0/accuracy"], t["exit_1/accuracy"]) for t in tests.values())
        found = result["best_test"]
        assert max(found["exit_0/accuracy"], found["exit_1/accuracy"]) == highest

    def test_final_checkpoint_holds_the_state(self, notebook_run):
        step, arrays = runs.final_arrays(notebook_run[0])
        assert step == 27
        trainer = build(tiny()).trainer
        assert arrays.keys() == trainer.to_arrays(trainer.abstract()).keys()
        assert {name.split("/")[1] for name in arrays} == {"params", "stats", "opt"}

    @pytest.mark.slow
    def test_equals_a_run_of_train_py(self, notebook_run):
        """Eight devices or one, thread or program: one stage is the same computation."""
        runs.assert_same_run(notebook_run[0], finished())


def with_accuracies(monkeypatch, accuracies):
    """Makes every evaluation of the validation split claim the next of these accuracies."""
    given = iter(accuracies)
    evaluate = Trainer.evaluate

    def claimed(self, state, batches):
        found = evaluate(self, state, batches)
        return {**found, "accuracy": next(given)}

    monkeypatch.setattr(Trainer, "evaluate", claimed)


def test_best_checkpoint_outlives_the_last_ones(tmp_path, monkeypatch, capsys):
    # Validation and test in turn, at the ends of the three epochs.
    with_accuracies(monkeypatch, [0.5, 0.1, 0.9, 0.2, 0.9, 0.3])
    result = train_and_evaluate(cheap(checkpoint__keep=1, checkpoint__every=1), tmp_path)
    checkpoints = Checkpointer(tmp_path / "checkpoints", read_only=True)
    assert checkpoints.steps() == [18, 27]
    assert checkpoints.best_step == 18
    assert result["test_at_best_validation"]["accuracy"] == 0.2
    assert result["test"]["accuracy"] == 0.3
    printed = capsys.readouterr().out
    assert "best validation: 20.00% at step 18" in printed
    assert "best by validation: step 18" in printed


def test_without_a_validation_split(tmp_path, capsys):
    result = train_and_evaluate(cheap(data__validation=0.0, epochs=1), tmp_path)
    assert "test_at_best_validation" not in result
    assert {line["split"] for line in lines(tmp_path)} == {"train", "test"}
    assert "best by validation" not in capsys.readouterr().out


def test_steps_win_over_epochs_and_intervals_are_kept(tmp_path):
    config = cheap(steps=11, eval_every=4, log_every=5, checkpoint__keep=20, checkpoint__every=3)
    assert train_and_evaluate(config, tmp_path)["step"] == 11
    written = lines(tmp_path)
    evaluated = [line["step"] for line in written if line["split"] == "test"]
    assert evaluated == [4, 8, 11]
    logged = [line["step"] for line in written if line["split"] == "train"]
    assert logged == [5, 10]  # saving and evaluating cut no interval short
    saved = Checkpointer(tmp_path / "checkpoints", read_only=True).steps()
    assert saved == [3, 4, 6, 8, 9, 11]


@pytest.mark.slow
def test_train_lines_are_means_since_the_line_before(tmp_path):
    train_and_evaluate(cheap(epochs=1, checkpoint__every=9, log_every=9), tmp_path / "one")
    train_and_evaluate(cheap(epochs=1, checkpoint__every=9), tmp_path / "nine")
    (mean,) = [line for line in lines(tmp_path / "one") if line["split"] == "train"]
    each = [line["loss"] for line in lines(tmp_path / "nine") if line["split"] == "train"]
    assert mean["loss"] == pytest.approx(np.mean(each), rel=1e-6)


@pytest.mark.slow
def test_slow_input_shows_as_waiting(tmp_path, monkeypatch):
    gather, pause = data.Split.gather, 0.1

    def slow(self, indices):
        if self.name == "train":
            time.sleep(pause)
        return gather(self, indices)

    monkeypatch.setattr(data.Split, "gather", slow)
    train_and_evaluate(cheap(steps=24, checkpoint__every=24, eval_every=24, log_every=8), tmp_path)
    # What is read ahead while the first step compiles does not wait; the last line shows the rest.
    last = [line for line in lines(tmp_path) if line["split"] == "train"][-1]
    assert last["input_wait"] > 0.5
    # Two threads read, 8 images in `pause` seconds each; a busy machine reads later.
    assert 0.02 * 16 / pause < last["examples_per_second"] < 1.3 * 16 / pause


class TestNonFinite:
    @pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 9])
    def test_stops_with_the_last_good_checkpoint(self, tmp_path, capsys, monkeypatch, every):
        monkeypatch.setattr(command_line, "log_in_short", lambda: None)
        given = {"mesh__stages": 1, "method__name": "bp", "method__projector": "None"}
        given |= {"optimizer__name": "sgd", "checkpoint__every": every}
        command_line.main(["train.py", *arguments(tmp_path, epochs=1, **given)])
        before = runs.fingerprint(tmp_path / "checkpoints" / "9")
        bad = arguments(tmp_path, **given, epochs=3, optimizer__learning_rate=3e38)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            command_line.main(["train.py", *bad])
        assert stopped.value.code == 1
        told = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("step ")]
        assert len(told) == 1
        assert told[0].startswith("error: ")
        assert "block_" in told[0]
        assert " step 1" in told[0]
        checkpoints = Checkpointer(tmp_path / "checkpoints", read_only=True)
        assert f"the last good checkpoint is {checkpoints.latest_step}" in told[0]
        for step in checkpoints.steps():
            chex.assert_tree_all_finite(runs.arrays_at(tmp_path, step))
        assert runs.fingerprint(tmp_path / "checkpoints" / "9") == before
        if every == 9:  # With a sane learning rate the run goes on.
            command_line.main(["train.py", *arguments(tmp_path, **given, epochs=2)])
            assert runs.final_arrays(tmp_path)[0] == 18

    @pytest.mark.slow
    def test_names_the_block_of_a_bad_loss(self, tmp_path, monkeypatch):
        """A local loss that is not finite, though the weights still are."""
        step = Trainer.step

        def poisoned(self, state, batch):
            state, metrics = step(self, state, batch)
            if state.step == 5:
                bad = jax.numpy.float32(np.nan)
                metrics = StepMetrics([metrics, {"loss": bad, "block_1/loss": bad}])
            return state, metrics

        monkeypatch.setattr(Trainer, "step", poisoned)
        with pytest.raises(NonFiniteError) as error:
            train_and_evaluate(tiny(log_every=3), tmp_path)
        assert "the loss of block_1 is nan at step 5" in str(error.value)
        assert "the last good checkpoint is 4" in str(error.value)
        assert max(line["step"] for line in lines(tmp_path)) == 3

    def test_weights_that_are_not_finite_are_not_saved(self, tmp_path, monkeypatch):
        """The loss of the step that spoils the weights is still that of good ones."""
        step = Trainer.step

        def poisoned(self, state, batch):
            state, metrics = step(self, state, batch)
            if state.step == 8:
                arrays = self.to_arrays(state)
                name = next(name for name in arrays if name.startswith("block_1/params/"))
                state = self.from_arrays(8, {**arrays, name: arrays[name] * np.inf})
            return state, metrics

        monkeypatch.setattr(Trainer, "step", poisoned)
        with pytest.raises(NonFiniteError) as error:
            train_and_evaluate(cheap(), tmp_path)
        assert "block_1/params/" in str(error.value)
        assert "is not finite after step 8; the last good checkpoint is 4" in str(error.value)
        assert Checkpointer(tmp_path / "checkpoints", read_only=True).steps() == [4]

    def test_nothing_was_saved(self, tmp_path):
        config = cheap(optimizer__learning_rate=3e38, checkpoint__every=9)
        with pytest.raises(NonFiniteError, match="no checkpoint was saved"):
            train_and_evaluate(config, tmp_path)
        assert Checkpointer(tmp_path / "checkpoints", read_only=True).steps() == []


def test_checkpoints_that_cannot_be_written_are_told_in_one_line(tmp_path, monkeypatch):
    def full(*_, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", full)
    with pytest.raises(CheckpointError, match=r"checkpoint 4 could not be written.*No space left"):
        train_and_evaluate(cheap(), tmp_path)


# Adam would make more of a gradient that is nearly zero than rounding is.
SGD = {"optimizer__name": "sgd", "optimizer__learning_rate": 0.05}


def assert_same_numbers(folder, reference):
    for found, wanted in zip(lines(folder), lines(reference), strict=True):
        assert (found["step"], found["split"]) == (wanted["step"], wanted["split"])
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
        assert found["accuracy"] == wanted["accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "stages", "replicas"), [(2, 2, 1), (2, 1, 2), (4, 2, 2)])
def test_the_mesh_does_not_change_the_numbers(tmp_path, devices, stages, replicas):
    """Nor does continuing on it what one device began."""
    folder = runs.copy(finished(**SGD, epochs=1), tmp_path)
    values = {**SGD, "mesh__stages": stages, "mesh__data": replicas}
    run = server().run(*arguments(folder, **values), devices=devices)
    assert run.returncode == 0, run.stderr
    assert "continuing from step 9 of 27" in run.stdout
    config = json.loads((folder / "config.json").read_text())
    assert len({device for row in config["devices"] for device in row}) == devices
    assert_same_numbers(folder, finished(**SGD))


@pytest.mark.slow
def test_from_several_devices_back_to_one(tmp_path):
    values = {**SGD, "mesh__stages": 2, "mesh__data": 2, "epochs": 1}
    assert server().run(*arguments(tmp_path, **values), devices=4).returncode == 0
    assert server().run(*arguments(tmp_path, **SGD)).returncode == 0
    assert_same_numbers(tmp_path, finished(**SGD))


@pytest.mark.slow
def test_bfloat16(tmp_path, notebook_run):
    result = train_and_evaluate(tiny(dtype="bfloat16", epochs=1), tmp_path)
    assert np.isfinite(result["test"]["loss"])
    floats = [x for x in runs.final_arrays(tmp_path)[1].values() if x.dtype.kind == "f"]
    assert {x.dtype for x in floats} == {np.dtype(np.float32)}
    first, wanted = (lines(folder)[0] for folder in (tmp_path, notebook_run[0]))
    assert first["loss"] == pytest.approx(wanted["loss"], rel=0.05)
    assert first["loss"] != wanted["loss"]
