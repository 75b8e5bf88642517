"""Prediction: the logits that evaluation scores, whatever the stages, for every method."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest

import jdecouple as jd
from jdecouple.methods.routes import Unit
from jdecouple.pipeline.evaluate import exit_sums
from jdecouple.pipeline.predict import Predictor

DATA = nets.batches()
STAGES = pytest.mark.parametrize("stages", nets.marked([1, 3], [3]))
METHODS = pytest.mark.parametrize(
    "name", nets.marked(jd.methods.names(), fast=("early_exit", "al", "fr"))
)


@functools.cache
def shared(name: str, stages: int) -> tuple[jd.Trainer, Any]:
    """Three blocks on as many devices as stages, and a state that has seen other statistics."""
    trainer = nets.build(name, model=nets.mlp(depth=3, batch_norm=True), num_stages=stages)
    arrays = nets.to_arrays(trainer, trainer.init())
    seen = {key: 1.3 * leaf + 0.1 for key, leaf in arrays.items() if "/stats/" in key}
    moved = {key: leaf.astype(arrays[key].dtype) for key, leaf in seen.items()}
    return trainer, trainer.from_arrays(0, arrays | moved)


def inputs(batches: list[dict]) -> list[dict]:
    return [{name: leaf for name, leaf in batch.items() if name != "label"} for batch in batches]


def scores(trainer: jd.Trainer, logits: np.ndarray, batches: list[dict]) -> dict[str, float]:
    """What evaluation says of the logits, by the function that it adds up with."""
    add = jax.jit(lambda total, *exit: total + exit_sums(*exit))
    ends = np.cumsum([len(batch["label"]) for batch in batches])
    found = {}
    for index, rows in zip(trainer.exits, logits, strict=True):
        total: Any = np.zeros(3, np.float32)
        for batch, part in zip(batches, np.split(rows, ends[:-1]), strict=True):
            weight = np.ones(len(part), np.float32)
            total = add(total, part, {"label": batch["label"], "weight": weight})
        accuracy, loss = (float(each) / ends[-1] for each in np.asarray(total)[:2])
        found |= {f"exit_{index}/accuracy": accuracy, f"exit_{index}/loss": loss}
    return found


@STAGES
@METHODS
def test_predict_gives_what_evaluate_scores(name, stages):
    """One example and many, to the last bit; labels are not needed."""
    trainer, state = shared(name, stages)
    one = [{key: leaf[:1] for key, leaf in DATA[0].items()}]
    for batches in (one, DATA):
        logits = trainer.predict(state, inputs(batches))
        count = sum(len(batch["label"]) for batch in batches)
        assert logits.shape == (len(trainer.exits), count, nets.CLASSES)
        assert logits.dtype == np.float32
        values = trainer.evaluate(state, batches)
        final = {key: values.pop(key) for key in ("loss", "accuracy")}
        assert values == scores(trainer, logits, batches)
        assert final == {key: values[f"exit_{trainer.exits[-1]}/{key}"] for key in final}


@METHODS
def test_predictions_do_not_depend_on_the_stages(name):
    one, three = (shared(name, stages) for stages in (1, 3))
    wanted = one[0].predict(one[1], inputs(DATA))
    assert three[0].predict(three[1], inputs(DATA)).tobytes() == wanted.tobytes()
    assert one[0].exits == three[0].exits
    values = [trainer.evaluate(state, DATA) for trainer, state in (one, three)]
    assert values[0] == values[1]


def test_rows_are_in_the_order_given_whatever_the_batches():
    trainer, state = shared("early_exit", 3)
    whole = {"x": np.concatenate([batch["x"] for batch in DATA])}
    wanted = trainer.predict(state, whole)
    pieces = [{"x": part} for part in np.split(whole["x"], [30, 31, 50])]
    for data in (pieces, iter(pieces), DATA):
        np.testing.assert_allclose(trainer.predict(state, data), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_replicas_and_fuse_change_rounding_at_most():
    trainer, state = shared("early_exit", 1)
    arrays, wanted = nets.to_arrays(trainer, state), trainer.predict(state, DATA[0])
    for options in ({"mesh": jd.make_mesh(2, 2)}, {"fuse": False, "num_stages": 1}):
        other = nets.build("early_exit", model=nets.mlp(depth=3, batch_norm=True), **options)
        found = other.predict(other.from_arrays(0, arrays), {"x": DATA[0]["x"][:15]})
        np.testing.assert_allclose(found, wanted[:, :15], rtol=1e-5, atol=1e-6)


def test_half_precision_computes_and_float32_comes_out():
    trainer = nets.build("early_exit", dtype=jnp.bfloat16)
    logits = trainer.predict(trainer.init(), DATA[0])
    assert logits.dtype == np.float32
    assert np.array_equal(logits, logits.astype(jnp.bfloat16).astype(np.float32))


def test_a_transform_is_a_part_of_the_first_call():
    normal = jd.data.augment.get("basic", mean=[0.5], std=[0.25])
    data = nets.images(2)
    options = {"transform": normal, "example": data[0], "optimizer": jd.optim.sgd(0.1)}
    built = [
        nets.build("greedy_exit", model=vectors(), num_stages=stages, **options)
        for stages in (1, 2)
    ]
    one, two = (trainer.predict(trainer.init(), inputs(data)) for trainer in built)
    assert one.tobytes() == two.tobytes()
    trainer = built[0]
    values = trainer.evaluate(trainer.init(), data)
    del values["loss"], values["accuracy"]
    assert values == scores(trainer, one, data)


def vectors() -> jd.Model:
    """Two blocks that read images of 8 x 8."""
    return nets.user_model(64, depth=2, dropout=0.0)


@pytest.mark.parametrize(("stages", "programs"), [(1, 3), (3, 5)])
def test_equal_blocks_are_compiled_once_on_a_device(stages, programs, caplog):
    """The first, four in the middle and the last; none for labels, none for an x that was sent."""
    options = {"num_stages": stages, "boundaries": (0, 2, 4)[:stages]}
    trainer = nets.build("greedy_exit", model=nets.user_model(depth=6), **options)
    state = trainer.init()
    with jax.log_compiles(), caplog.at_level("WARNING"):
        trainer.predict(state, inputs(DATA))
    compiled = [r for r in caplog.records if r.getMessage().startswith("Finished XLA compilation")]
    assert len(compiled) == programs


def test_nothing_is_compiled_a_second_time(monkeypatch, caplog):
    trainer, state = shared("early_exit", 3)
    trainer.predict(state, inputs(DATA))
    trainer.evaluate(state, DATA)
    with nets.nothing_compiles(monkeypatch, caplog):
        trainer.predict(state, inputs(DATA[:1]))
        trainer.evaluate(state, DATA[:2])


@pytest.mark.parametrize("name", ["early_exit", "al"])
def test_a_predictor_needs_no_trainer(name):
    """Units, their arrays and nothing else: no optimiser, no labels, no example."""
    trainer, state = shared(name, 3)
    units: list[Unit] = [unit for stage in trainer.stages for unit in stage.units]
    predictor = Predictor([units])
    with pytest.raises(ValueError, match="give an example"):
        _ = predictor.exits
    merged = {
        kind: tuple(entry for values in state.stages for entry in values[kind])
        for kind in ("params", "stats")
    }
    states = predictor.place([jax.tree.map(np.asarray, merged)])
    found = predictor.predict(states, inputs(DATA))
    assert found.tobytes() == trainer.predict(state, inputs(DATA)).tobytes()
    padded = predictor.predict(states, {"x": DATA[0]["x"][:1]}, size=16)
    assert padded.tobytes() == found[:, :1].tobytes()
    known = Predictor([units], example=DATA[0])
    assert known.exits == trainer.exits
    assert known.predict(states, DATA[:1]).tobytes() == found[:, :16].tobytes()


@pytest.mark.parametrize(
    ("data", "kind", "words"),
    [
        ([], ValueError, ("no examples",)),
        ({"x": np.zeros((0, nets.FEATURES), np.float32)}, ValueError, ("x", "no examples")),
        ({"label": np.zeros(3, np.int32)}, TypeError, ("label", "'x'")),
        ({"x": np.zeros((3, 7), np.float32)}, ValueError, ("7", str(nets.FEATURES))),
        ([None], TypeError, ("NoneType", "'x'")),
        (3, TypeError, ("int", "batches")),
    ],
)
def test_what_cannot_be_predicted_is_refused(data, kind, words):
    trainer, state = shared("early_exit", 1)
    nets.assert_clear(kind, words, lambda: trainer.predict(state, data))
