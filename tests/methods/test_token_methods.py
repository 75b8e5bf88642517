"""Every method on a tiny GPT whose labels are the next tokens."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import nets
import numpy as np
import optax
import pytest
import token_nets

import jdecouple as jd
from jdecouple.methods.objectives import cross_entropy
from jdecouple.methods.objectives.tokens import drawn
from jdecouple.methods.routes.stage import accuracy

pytestmark = pytest.mark.usefixtures("module_x64")
FAST = ("dgl", "fdg")  # drawn positions have a test of their own
METHODS = pytest.mark.parametrize("name", nets.marked(token_nets.METHODS, FAST))
STEPS = 6


@functools.cache
def trainer(name: str, stages: int = 1, devices: int = 1) -> jd.Trainer:
    """Three blocks, the two layers with dropout."""
    net = token_nets.model(dropout=0.2, param_dtype=jnp.float64)
    mesh = jd.make_mesh(stages, devices=jax.devices()[:devices])
    return token_nets.trainer(name, model=net, mesh=mesh)


@functools.cache
def trained(name: str, stages: int, devices: int) -> tuple[dict, list[dict]]:
    each = trainer(name, stages, devices)
    state, metrics = nets.trained(each, token_nets.batches(), STEPS)
    return nets.to_arrays(each, state), metrics


@pytest.mark.parametrize("name", nets.marked(token_nets.METHODS, ("dgl",)))
def test_pipelined_equals_sequential(name):
    """Three stages on three devices; where lateness depends on them, three stages on one."""
    found, metrics = trained(name, 3, 3)
    wanted, others = trained(name, 1 if name in nets.EXACT else 3, 1)
    assert nets.largest_error(found, wanted) < 1e-12
    for here, there in zip(metrics, others, strict=True):
        assert here == pytest.approx(there, rel=2e-6, abs=1e-7, nan_ok=True)


@METHODS
def test_resumed_training_is_the_same_to_the_bit_and_lowers_the_loss(name):
    each, data = trainer(name, 3, 3), token_nets.batches()
    state, _ = nets.trained(each, data, STEPS - 2)
    held = nets.to_arrays(each, state)
    state, _ = nets.trained(each, data[:2], 2, each.from_arrays(STEPS - 2, held))
    arrays, metrics = trained(name, 3, 3)
    assert nets.same_bits(nets.to_arrays(each, state), arrays)
    assert all(np.isfinite(list(each.values())).all() for each in metrics[-1:])
    found = each.evaluate(state, data)
    assert found["loss"] < each.evaluate(each.init(), data)["loss"]
    assert found["loss"] == found["exit_2/loss"]


def test_evaluation_counts_every_label_once():
    """Batches of different sizes and paddings, against NumPy."""
    each = trainer("dgl")
    state, data = each.init(), token_nets.batches(2)
    data = [data[0], {name: rows[:3] for name, rows in data[1].items()}]
    data[1]["label"] = np.where(np.arange(8) < 5, data[1]["label"], -1).astype(np.int32)
    logits = each.predict(state, [{"x": batch["x"]} for batch in data])
    assert logits.shape == (3, 7, token_nets.CONTEXT, token_nets.VOCABULARY)
    labels = np.concatenate([batch["label"] for batch in data])
    found, real = each.evaluate(state, data), labels >= 0
    logs = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(
        logits, np.maximum(labels, 0)[None, ..., None], axis=-1
    ).squeeze(-1)
    for exit in range(3):
        assert found[f"exit_{exit}/loss"] == pytest.approx(logs[exit][real].mean(), rel=1e-5)
        hits = (logits[exit].argmax(-1) == labels)[real].mean()
        assert found[f"exit_{exit}/accuracy"] == pytest.approx(hits, rel=1e-5)


@pytest.mark.parametrize("name", nets.marked(token_nets.METHODS, ("bp",)))
def test_padding_and_packing_change_no_loss(name):
    """Two documents in one row, in two, and with padding behind: losses and weights."""
    if token_nets.method(name).objective.tokens != "all":
        pytest.skip("it draws others in rows of another form")
    packed = {"x": [[0, 3, 4, 0, 5, 6, 7, 8]], "label": [[3, 4, -1, 5, 6, 7, 8, 9]]}
    alone = {
        "x": [[0, 3, 4, 0, 0, 0, 0, 0], [0, 5, 6, 7, 8, 0, 0, 0]],
        "label": [[3, 4, *[-1] * 6], [5, 6, 7, 8, 9, -1, -1, -1]],
    }
    padded = {"x": [*packed["x"], [0] * 8], "label": [*packed["label"], [-1] * 8]}
    found = []
    for batch in (packed, alone, padded):
        batch = {key: np.array(rows, np.int32) for key, rows in batch.items()}
        arguments = {"aux": "transformer"} if name == "dgl" else {}
        each = token_nets.trainer(name, arguments=arguments, example=batch, num_stages=1)
        state, metrics = nets.trained(each, [batch], 2)
        found.append((nets.to_arrays(each, state), metrics, each.evaluate(state, batch)))
    for other in found[1:]:
        assert nets.largest_error(other[0], found[0][0]) < 1e-12
        assert other[1][-1] == pytest.approx(found[0][1][-1], rel=1e-6)
        assert other[2] == pytest.approx(found[0][2], rel=1e-6)


def test_losses_are_those_of_labelled_positions():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(6, 5)), np.array([1, 0, 4, 2, 2, 3])
    real = np.array([True, False, True, True, False, False])
    whole = cross_entropy(jnp.asarray(logits[real]), jnp.asarray(labels[real]))
    found = cross_entropy(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(real))
    assert float(found) == pytest.approx(float(whole), rel=1e-12)
    assert float(cross_entropy(jnp.asarray(logits), jnp.asarray(labels), jnp.zeros(6, bool))) == 0
    masked = jnp.asarray(np.where(real, labels, -1)[None])
    hits = np.mean(logits[real].argmax(-1) == labels[real])
    assert float(accuracy(jnp.asarray(logits[None]), masked)) == pytest.approx(hits)


def test_positions_are_drawn_of_those_with_a_label():
    labelled = np.zeros((3, 20), bool)
    labelled[0], labelled[1, 4:12], labelled[2, [3, 17]] = True, True, True
    seen: list[np.ndarray] = []
    for seed in range(20):
        places = np.asarray(drawn(jax.random.key(seed), jnp.asarray(labelled), 6))
        assert all(labelled[row][places[row]].all() for row in range(3))
        assert all(len({*places[row]}) == size for row, size in enumerate((6, 6, 2)))
        seen.append(places)
    assert {*np.concatenate(seen, 1)[0]} == {*range(20)}
    assert len({each.tobytes() for each in seen}) == 20


@pytest.mark.slow
def test_drawn_positions_are_others_in_every_step_and_the_same_in_a_resumed_run():
    """The loss of the same weights on the same batch, at a rate of 0."""
    each = token_nets.trainer("deinforeg", optimizer=optax.sgd(0.0), num_stages=1)
    batch = token_nets.batches(1)
    state, metrics = nets.trained(each, batch, 3)
    losses = [row["block_1/loss"] for row in metrics]
    assert len({*losses}) == 3
    again, metrics = nets.trained(each, batch, 1, each.from_arrays(1, nets.to_arrays(each, state)))
    assert metrics[0]["block_1/loss"] == losses[1]
    assert again.step == 2
    every = token_nets.trainer(
        "deinforeg", arguments={"positions": 99}, optimizer=optax.sgd(0.0), num_stages=1
    )
    _, metrics = nets.trained(every, token_nets.batches(1, padded=False), 2)
    assert metrics[0]["block_1/loss"] == pytest.approx(metrics[1]["block_1/loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("al", {}, "AssociatedLearning has no loss of positions"),
        ("infopro", {}, "InformationPropagation has no loss of positions"),
        ("dgl", {"aux": "mlp"}, "the head of block 0 has BatchNorm"),
        ("deinforeg", {"batch_norm": True}, "the head of block 1 has BatchNorm"),
    ],
)
def test_refused(name, arguments, words):
    with pytest.raises(ValueError, match=words):
        token_nets.trainer(name, arguments=arguments)


def test_features_and_labels_that_do_not_fit():
    batch: dict[str, Any] = {
        "x": np.zeros((4, nets.FEATURES), np.float32),
        "label": np.zeros((4, 6), np.int32),
    }
    with pytest.raises(ValueError, match=r"the output of block 0 is \(4, 24\): labels of pos"):
        jd.Trainer(nets.mlp(), jd.methods.get("bp"), jd.optim.sgd(0.1), example=batch)
    with pytest.raises(ValueError, match="aux is 'transformer', which is for labels of positions"):
        jd.Trainer(
            nets.mlp(),
            jd.methods.get("dgl", aux="transformer"),
            jd.optim.sgd(0.1),
            example=nets.batches(1)[0],
        )
    each, batch = trainer("dgl"), dict(token_nets.batches(1)[0])
    for wrong, words in ((-2, "label -2 is out of range: -1 to 10"), (11, "label 11 is out")):
        labels = batch["label"].copy()
        labels[0, 0] = wrong
        with pytest.raises(ValueError, match=words):
            each.put({**batch, "label": labels})
    with pytest.raises(ValueError, match="holds no labels"):
        each.evaluate(each.init(), {**batch, "label": np.full_like(batch["label"], -1)})
