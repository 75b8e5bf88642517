"""Runs whose model grows: phases, schedules, stops and kills on the way, and what is refused."""

import os
import signal
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
import runs
from runs import arguments, arrays_at, assert_same_run, lines, server, tiny
from text_sets import csv_set
from text_sets import tiny as tiny_texts

import jdecouple as jd
from jdecouple.checkpoint import Checkpointer
from jdecouple.train import devices
from jdecouple.train.config import ConfigError, validate
from jdecouple.train.loop import build, train_and_evaluate
from jdecouple.train.run import check_processes

GROWTH = {"growth__blocks": (1, 2), "growth__steps": (0, 10)}  # between two checkpoints
ENDS = 18


def run(folder: Path, steps: int = ENDS, **values) -> Path:
    train_and_evaluate(tiny(**{**GROWTH, "steps": steps, "checkpoint__keep": 9, **values}), folder)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("whole"))


def block(name: str) -> int:
    return int(name.split("/")[0].removeprefix("block_"))


def test_phases(whole, capfd):
    checkpoints = Checkpointer(whole / "checkpoints", read_only=True)
    assert checkpoints.steps() == [4, 8, 9, 10, 12, 16, 18]
    counts = {step: extra["num_blocks"] for step, extra in checkpoints.extras().items()}
    assert counts == {4: 1, 8: 1, 9: 1, 10: 1, 12: 2, 16: 2, 18: 2}
    before, after = arrays_at(whole, 10), arrays_at(whole, 18)
    assert {block(name) for name in before} == {0}
    kept = {name: array for name, array in before.items() if "/opt/" not in name}
    chex.assert_trees_all_equal({name: after[name] for name in kept}, kept)
    assert not any("/opt/" in name and block(name) == 0 for name in after)
    train = {line["step"]: line for line in lines(whole) if line["split"] == "train"}
    assert len(train) == ENDS
    assert "block_0/loss" in train[10]
    assert "block_1/loss" not in train[10]
    assert "block_0/loss" not in train[11]
    assert train[11]["loss"] == train[11]["block_1/loss"]
    tests = {line["step"]: line for line in lines(whole) if line["split"] == "test"}
    assert list(tests) == [9, 10, 18]
    assert tests[18]["exit_0/loss"] == pytest.approx(tests[10]["exit_0/loss"])
    assert "exit_1/loss" not in tests[10]
    assert tests[18]["accuracy"] == tests[18]["exit_1/accuracy"]


@pytest.mark.slow  # where a checkpoint is damaged below, a run goes on over the same step
@pytest.mark.parametrize("stops", [(10,), (3, 10, 11, 14)], ids=str)
def test_stopped_on_the_way(tmp_path, whole, stops):
    """Also where the model has yet to grow: the checkpoint of that step has the old blocks."""
    for steps in (*stops, ENDS):
        run(tmp_path, steps)
    found, wanted = (arrays_at(folder, ENDS) for folder in (tmp_path, whole))
    chex.assert_trees_all_equal(found, wanted)
    last = [[line for line in lines(f) if line["step"] == ENDS] for f in (tmp_path, whole)]
    assert runs.without_timing(last[0]) == runs.without_timing(last[1])


@pytest.mark.slow
def test_a_checkpoint_that_says_stop(tmp_path, whole, monkeypatch):
    """A damaged newest checkpoint: the one before it may be of an earlier phase."""
    folder = runs.copy(whole, tmp_path)
    for step in (12, 16, 18):
        metadata = folder / "checkpoints" / str(step) / "info" / "metadata"
        metadata.write_bytes(metadata.read_bytes()[:-20])
    run(folder)
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_killed_while_growing(tmp_path):
    values = {
        "growth__blocks": "(1,2,3)",
        "growth__steps": "(0,5,12)",
        "model__depth": 3,
        "method__name": "al",
        "method__projector": "None",
        "method__features": 8,
    }
    reference = server().run(*arguments(tmp_path / "whole", **values))
    assert reference.returncode == 0, reference.stderr
    folder = tmp_path / "killed"
    for step in (4, 5, 6, 11, 12, 13):
        process = server().start(*arguments(folder, **values))

        def due(step=step) -> bool:
            return any(line["step"] >= step for line in lines(folder))

        runs.wait_for(due, process)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait().returncode == -signal.SIGKILL
    last = server().run(*arguments(folder, **values))
    assert last.returncode == 0, last.stderr
    assert "continuing from step" in last.stdout
    assert_same_run(folder, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [
        {"chunk": 4},
        {"microbatches": 2},
        {"growth__freeze": False},
        {"mesh__stages": 2, "mesh__data": 2, "boundaries": (0, 1)},
        {"method__name": "scpl", "method__hidden": 8, "method__features": 4},
    ],
    ids=lambda values: next(iter(values)),
)
def test_stopped_on_the_way_in_other_ways(tmp_path, values):
    if "method__name" in values:
        values = {**values, "method__projector": "linear"}
    for name, stops in {"whole": (ENDS,), "stopped": (10, ENDS)}.items():
        for steps in stops:
            run(tmp_path / name, steps, **values)
    assert_same_arrays(tmp_path / "stopped", tmp_path / "whole")


def assert_same_arrays(folder: Path, reference: Path) -> None:
    found, wanted = (arrays_at(each, ENDS) for each in (folder, reference))
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_each_phase_has_the_schedule_for_itself():
    """Frozen blocks are trained in one phase, to the end of its cosine."""
    values = {**GROWTH, "steps": 30, "optimizer__name": "sgd", "optimizer__schedule": "cosine"}
    ended = {}
    for freeze in (True, False):
        built = build(tiny(**values, growth__freeze=freeze))
        ended[freeze] = (
            [phase.start for phase in built.phases],
            [
                [unit.frozen for unit in stage.units]
                for phase in built.phases
                for stage in phase.trainer.stages
            ],
        )
    assert ended[True] == ([0, 10], [[False], [True, False]])
    assert ended[False] == ([0, 10], [[False], [False, False]])
    from jdecouple.train import phases

    config = validate(tiny(**values))
    assert phases.scheduled(config, (0, 10), 30) == [10, 20]
    assert phases.scheduled(config, (0, 10), 5) == [10, 1]
    config.growth.freeze = False
    assert phases.scheduled(config, (0, 10), 30) == [30, 30]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"growth__blocks": (2, 1)}, "growth.blocks is (2, 1): increasing"),
        ({"growth__blocks": ()}, "growth.blocks is (): increasing"),
        ({"growth__blocks": (1, 3)}, "growth.blocks is (1, 3): the last must be"),
        ({"growth__steps": (0, 5, 9)}, "growth.steps is (0, 5, 9): as many numbers"),
        ({"growth__steps": (1, 5)}, "growth.steps is (1, 5): as many"),
        ({"growth__steps": None}, "growth.epochs and config.growth.steps are both None"),
        ({"growth__epochs": (0, 1)}, "growth.epochs and config.growth.steps are both set"),
        ({"growth__blocks": None}, "growth.steps is set, but config.growth.blocks is None"),
        ({"growth__steps": None, "growth__epochs": (0, 0.01)}, "(0, 0.01): of 9 steps an epoch"),
        ({"method__name": "bp", "method__projector": None}, "growth.blocks is (1, 2): to grow"),
        ({"profile": 3}, "profile shows one and the same net"),
        ({"schedule": "interleaved"}, "schedule 'interleaved' has queues of one net"),
        ({"engine": "spmd", "mesh__stages": 2}, "engine 'spmd' trains all blocks"),
        ({"data__parts": (3, 4)}, "parts is (3, 4): data set 'synthetic' holds images"),
    ],
)
def test_what_is_refused(values, said):
    with pytest.raises(ConfigError) as error:
        build(tiny(**{**GROWTH, **values}))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_an_end_before_all_blocks_is_announced(capsys):
    devices.announce(build(tiny(**GROWTH, steps=10)))
    assert "blocks: 1, 2 after step 10; the run ends at step 10, before" in capsys.readouterr().out


def test_a_phase_without_a_stage_for_every_process(monkeypatch):
    built = build(tiny(**GROWTH))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    said = r"the stages of the first 1 block\(s\) take no device of process 1: .*growth\.blocks"
    with pytest.raises(ConfigError, match=said):
        check_processes(built.phases[0].trainer, built.config)


def test_a_workdir_of_a_run_that_grows_otherwise(tmp_path, whole):
    folder = runs.copy(whole, tmp_path)
    before = runs.fingerprint(folder)
    with pytest.raises(ConfigError, match=r"config\.growth = steps") as error:
        run(folder, growth__steps=(0, 12))
    assert "\n" not in str(error.value)
    assert runs.fingerprint(folder) == before


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> str:
    return csv_set(tmp_path_factory.mktemp("texts"), train=80, test=24)


def in_parts(texts: str, **values):
    parts = {"data__buckets": None, "data__parts": (4, 8), "model__further": (2,)}
    method = {"method__name": "deinforeg", "method__projector": "identity", "model__depth": 2}
    growth = {"growth__blocks": (2, 3), "growth__steps": (0, 4)}
    return tiny_texts(texts, **{**parts, **method, **growth, **values})


@pytest.fixture(scope="module")
def trained_in_parts(tmp_path_factory, texts) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    train_and_evaluate(in_parts(texts, steps=8), folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("model", ["lstm", "transformer"])
def test_texts_in_two_steps(tmp_path, texts, model, trained_in_parts):
    """Before the net grows its exits see the first part alone, and afterwards still do."""
    values, folder = {"steps": 8}, trained_in_parts
    if model == "transformer":
        values, folder = {**values, "model__name": model, "model__heads": 2}, tmp_path
        train_and_evaluate(in_parts(texts, **values), folder)
    tests = {line["step"]: line for line in lines(folder) if line["split"] == "test"}
    assert set(tests) == {4, 8}
    assert tests[8]["exit_1/loss"] == pytest.approx(tests[4]["exit_1/loss"])
    assert "exit_2/loss" in tests[8]
    built = build(in_parts(texts, **values))
    batch = built.dataset.test.gather(np.arange(8))
    assert {name: x.shape for name, x in batch.items()} == {
        "x": (8, 4),
        "x_1": (8, 8),
        "label": (8,),
    }
    state, trainer = built.trainer.init(), built.trainer
    scores = [trainer.evaluate(state, {**batch, "x_1": batch["x_1"] * keep}) for keep in (1, 0)]
    assert scores[0]["exit_1/loss"] == scores[1]["exit_1/loss"]
    assert scores[0]["exit_2/loss"] != scores[1]["exit_2/loss"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"data__max_length": 9}, "data.parts is (4, 8): max_length must be their sum, 12"),
        ({"data__buckets": (4, 12)}, "data.buckets is set, which pads to several lengths"),
        ({"data__parts": (4, 0)}, "data.parts is (4, 0): whole numbers of at least 1"),
        ({"data__parts": None}, "block 2 (Further) reads 'x_1': the batch holds label, x"),
        ({"model__further": ()}, "data.parts is (4, 8): no block of model 'lstm' reads x_1"),
        ({"model__further": (3,)}, "model.further is (3,): rising indices of blocks, 1 to 2"),
    ],
)
def test_parts_that_do_not_fit(texts, values, said):
    with pytest.raises(ConfigError) as error:
        build(in_parts(texts, **values))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


class TestLoaded:
    """A checkpoint of any phase is loaded with the blocks that it has."""

    @pytest.mark.parametrize("step", [10, 18])
    def test_of_every_phase(self, whole, step):
        loaded = jd.load(whole, step=step)
        scored = {(line["split"], line["step"]): line for line in lines(whole)}["test", step]
        test = build(tiny(**GROWTH)).dataset.test
        logits, labels = loaded.logits(test)
        assert loaded.exits == ((0,) if step == 10 else (0, 1))
        for exit, answers in zip(loaded.exits, logits, strict=True):
            assert np.mean(answers.argmax(-1) == labels) == scored[f"exit_{exit}/accuracy"]

    @pytest.mark.slow
    def test_of_a_method_that_needs_a_classifier(self, tmp_path):
        method = {"method__name": "scpl", "method__projector": "linear"}
        folder = run(tmp_path, **method, method__features=4)
        assert jd.load(folder, step=10).exits == (0,)
        loaded = jd.load(folder, step="last")
        assert loaded.exits == (0, 1)
        assert loaded.predict(np.zeros((2, 8, 8, 1), np.uint8)).logits.shape == (2, 2, 10)

    @pytest.mark.slow
    def test_texts_in_parts(self, tmp_path, texts, trained_in_parts):
        folder = trained_in_parts
        scored = {(line["split"], line["step"]): line for line in lines(folder)}["test", 8]
        loaded = jd.load(folder, step="last")
        logits, labels = loaded.logits(build(in_parts(texts, steps=8)).dataset.test)
        for exit, answers in zip(loaded.exits, logits, strict=True):
            assert np.mean(answers.argmax(-1) == labels) == scored[f"exit_{exit}/accuracy"]
        assert loaded.predict("a good film of the plot it is").labels.shape == (1,)
        assert len(loaded.costs) == len(loaded.exits)
        with pytest.raises(ValueError, match="further parts"):
            loaded.export(tmp_path / "exported")
