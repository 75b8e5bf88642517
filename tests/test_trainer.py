"""The Trainer's promises to its caller, for every method."""

import functools
import itertools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import nets
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh

import jdecouple as jd

METHODS = nets.METHODS
DATA = nets.batches()


@functools.cache
def shared(name: str) -> jd.Trainer:
    """Two stages on two devices; compiled once for all tests of this file."""
    return nets.build(name, num_stages=2)


@functools.cache
def fused(name: str) -> jd.Trainer:
    return nets.build(name)


# --- Training -------------------------------------------------------------------------------

REGULARIZATION = ("variance", "invariance", "covariance", "cross_entropy", "accuracy", "loss")
SIMILARITY = ("similarity", "cross_entropy", "accuracy", "loss")
AT_THE_END = ((), ("cross_entropy", "accuracy", "loss"))
BLOCK_METRICS = {  # of both blocks; test_methods.py checks those of methods that are not here
    "bp": AT_THE_END,
    **dict.fromkeys(nets.DELAYED, AT_THE_END),
    **dict.fromkeys(("early_exit", "greedy_exit"), AT_THE_END[1:] * 2),
    "deinforeg": (REGULARIZATION, REGULARIZATION),
    "al": (("bridge", "autoencoder", "loss"),) * 2,
    "scpl": (("contrastive", "loss"), ("contrastive", "cross_entropy", "accuracy", "loss")),
    "dgl": (AT_THE_END[1], AT_THE_END[1]),
    "predsim": (SIMILARITY, ("classifier", *SIMILARITY)),
    "infopro": (("reconstruction", "contrastive", "loss"), AT_THE_END[1]),
}


@METHODS
def test_metrics(name):
    trainer = shared(name)
    state = trainer.init()
    for _ in range(trainer.latency + 1):
        state, metrics = trainer.step(state, DATA[0])
    wanted = {key for key in metrics if "/" in key}
    if name in BLOCK_METRICS:
        assert wanted == {f"block_{i}/{term}" for i in (0, 1) for term in BLOCK_METRICS[name][i]}
    exits = any(key.endswith("/accuracy") for key in wanted)  # al answers in evaluation alone
    assert metrics.keys() - wanted == ({"loss", "accuracy"} if exits else {"loss"})
    assert all(isinstance(value, jax.Array) for value in metrics.values())
    chex.assert_shape(list(metrics.values()), ())
    chex.assert_type(list(metrics.values()), jnp.float32)
    losses = [float(metrics[key]) for key in wanted if key.endswith("/loss")]
    assert float(metrics["loss"]) == pytest.approx(sum(losses), rel=1e-6)
    if exits:
        assert metrics["accuracy"] == metrics["block_1/accuracy"]
    assert trainer.gather_metrics(metrics) == pytest.approx(
        {key: float(value) for key, value in metrics.items()}
    )


@pytest.mark.parametrize("name", nets.marked(jd.methods.names(), ("deinforeg",)))
def test_metrics_are_those_of_the_forward_by_hand(name):
    """Loss and accuracy are of the weights before the update, in training mode."""
    trainer = shared(name)
    state = trainer.init()
    blocks, heads = trainer.modules(state), trainer.heads(state)
    for _ in range(trainer.latency + 1):  # nothing is updated before the first error is known
        state, metrics = trainer.step(state, DATA[0])
    message = jax.tree.map(jnp.asarray, DATA[0])
    for index in range(2):
        blocks[index].train()
        features = blocks[index](message["x"])
        if heads[index] is None:
            message |= {"x": features}
            continue
        heads[index].train()
        output = heads[index](features, message)
        message |= {**output.carry, "x": features}
        found = float(metrics[f"block_{index}/loss"])
        assert found == pytest.approx(float(output.loss), rel=1e-4)
    if "accuracy" in metrics:
        hits = np.asarray(output.logits).argmax(1) == DATA[0]["label"]
        assert float(metrics["accuracy"]) == pytest.approx(hits.mean())


@METHODS
def test_training_lowers_the_loss_of_every_block(name):
    trainer = shared(name)
    state, metrics = nets.trained(trainer, DATA[:1], 40)
    for key in metrics[0]:
        if key.endswith("loss"):
            assert metrics[-1][key] < 0.9 * metrics[trainer.latency][key], key
    if name != "deinforeg":  # its classifiers learn at a thousandth of the rate
        assert trainer.evaluate(state, DATA[0])["accuracy"] > 0.5
        if "accuracy" in metrics[-1]:
            assert metrics[-1]["accuracy"] > max(0.6, metrics[trainer.latency]["accuracy"])


@METHODS
def test_an_uploaded_batch_trains_the_same(name):
    trainer = shared(name)
    direct, first = trainer.step(trainer.init(), DATA[0])
    placed, second = trainer.step(trainer.init(), trainer.put(DATA[0]))
    assert nets.same_bits(nets.to_arrays(trainer, direct), nets.to_arrays(trainer, placed))
    np.testing.assert_equal(dict(first), dict(second))


def test_arrays_on_a_device_are_a_batch():
    trainer = shared("bp")
    direct, _ = trainer.step(trainer.init(), DATA[0])
    device = jax.tree.map(jnp.asarray, DATA[0])
    other, _ = trainer.step(trainer.init(), device)
    assert nets.same_bits(nets.to_arrays(trainer, direct), nets.to_arrays(trainer, other))


@METHODS
@pytest.mark.parametrize("how", nets.marked([shared, fused], [shared]))
def test_nothing_is_compiled_after_the_first_step(name, how, monkeypatch, caplog):
    trainer = how(name)
    state, _ = trainer.step(trainer.init(), DATA[0])
    trainer.wait(state)
    with nets.nothing_compiles(monkeypatch, caplog):
        for batch in DATA:
            state, _ = trainer.step(state, batch)
        trainer.wait(state)


def test_a_compilation_and_a_trace_would_be_told(monkeypatch, caplog):
    with pytest.raises(AssertionError, match="ompil"), nets.nothing_compiles(monkeypatch, caplog):
        jax.jit(lambda x: x + 1)(jnp.zeros(3))
    caplog.clear()
    layer = nets.mlp(depth=1).classifier
    with pytest.raises(AssertionError, match="traced"), nets.nothing_compiles(monkeypatch, caplog):
        jax.eval_shape(layer, jnp.zeros((2, 24)))


@pytest.mark.parametrize("how", [shared, fused])
def test_old_state_is_donated(how):
    trainer = how("bp")
    old = trainer.init()
    state, _ = trainer.step(old, DATA[0])
    trainer.wait(state)
    for values in old.stages.arrays:
        weights = jax.tree.leaves((values["params"], values["opt"]))
        assert all(leaf.is_deleted() for leaf in weights)
    assert (old.step, state.step) == (0, 1)


def test_a_mesh_of_jax_is_accepted():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("stage", "data"))
    trainer = nets.build("bp", mesh=mesh)
    assert [[device.id for device in placement.devices] for placement in trainer.placements] == [
        [0, 1],
        [2, 3],
    ]


# --- Dispatch -------------------------------------------------------------------------------


@jax.jit
def slowly(x, rounds):
    """`x`, after matrix products of about a millisecond each."""
    matrix = jnp.full((256, 256), 1e-3, jnp.float32)
    done = jax.lax.fori_loop(0, rounds, lambda _, m: jnp.tanh(m @ m), matrix)
    return x + 0 * done[0, 0]


def late(batch: dict, rounds: int = 1000) -> dict:
    """The batch, with inputs that another device still computes."""
    return {**batch, "x": slowly(jax.device_put(batch["x"], jax.devices()[7]), rounds)}


def warm_up(trainer: jd.Trainer) -> Any:
    """A state; all that the tests of dispatch call is compiled."""
    state, _ = trainer.step(trainer.init(), late(DATA[0], rounds=1))
    trainer.wait(state)
    return state


@pytest.mark.parametrize("name", nets.marked(jd.methods.names(), ("bp", "fdg")))
def test_step_returns_before_the_work_is_done(name):
    trainer = shared(name)
    state, batch = warm_up(trainer), late(DATA[0])
    for _ in range(3):
        state, metrics = trainer.step(state, batch)
    assert not batch["x"].is_ready()
    assert not metrics["loss"].is_ready()
    trainer.wait(state)
    assert batch["x"].is_ready()


@pytest.mark.parametrize(
    ("name", "limit"), [("bp", 3), pytest.param("deinforeg", 1, marks=pytest.mark.slow)]
)
def test_max_in_flight_bounds_what_is_dispatched(name, limit):
    trainer = nets.build(name, num_stages=2, max_in_flight=limit)
    state, batch = warm_up(trainer), late(DATA[0])
    for _ in range(limit):
        state, _ = trainer.step(state, batch)
    assert not batch["x"].is_ready()
    state, _ = trainer.step(state, DATA[1])  # waits for the first
    assert batch["x"].is_ready()
    trainer.wait(state)


# --- State and modules ----------------------------------------------------------------------


@pytest.mark.parametrize("name", nets.marked(jd.methods.names(), ("deinforeg",)))
def test_training_leaves_the_model_alone(name):
    model = nets.mlp(depth=2, batch_norm=True)
    modules = (*model.blocks, model.classifier)
    before = [jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(each))) for each in modules]
    trainer = nets.build(name, model=model)
    first = nets.to_arrays(trainer, trainer.init())
    state, _ = nets.trained(trainer, DATA, 3)
    for module, wanted in zip(modules, before, strict=True):
        found = nnx.to_pure_dict(nnx.state(module))
        chex.assert_trees_all_equal(found, wanted)
    assert nets.same_bits(nets.to_arrays(trainer, trainer.init()), first)
    assert not nets.same_bits(nets.to_arrays(trainer, state), first)


@pytest.mark.slow
def test_replicas_have_weights_of_their_own():
    """A step donates the state; what it came from may be placed again."""
    trainer = nets.build("scpl", mesh=jd.make_mesh(1, 2))
    first = nets.to_arrays(trainer, trainer.init())
    nets.trained(trainer, DATA, 2)
    assert nets.same_bits(nets.to_arrays(trainer, trainer.init()), first)


@METHODS
def test_initial_weights_are_the_models(name):
    trainer = shared(name)
    model = trainer.model
    for found, wanted in zip(trainer.modules(trainer.init()), model.blocks, strict=False):
        chex.assert_trees_all_equal(*(nnx.to_pure_dict(nnx.state(x)) for x in (found, wanted)))


def test_a_method_that_ignores_the_classifier_returns_it_untouched():
    trainer = shared("deinforeg")
    state, _ = nets.trained(trainer, DATA, 2)
    assert trainer.modules(state)[-1] is trainer.model.classifier


@pytest.mark.parametrize("name", ["bp", "scpl"])
def test_the_trained_classifier_is_returned(name):
    trainer = shared(name)
    state, _ = nets.trained(trainer, DATA, 2)
    found = trainer.modules(state)[-1]
    assert isinstance(found, nnx.Linear)
    wanted = nets.to_arrays(trainer, state)["block_1/params/head/classifier/kernel"]
    np.testing.assert_array_equal(found.kernel[...], wanted)
    assert np.abs(found.kernel[...] - trainer.model.classifier.kernel[...]).max() > 1e-3


@METHODS
def test_modules_are_copies(name):
    """Neither training further nor changing them touches the other."""
    trainer = shared(name)
    state, _ = nets.trained(trainer, DATA, 2)
    blocks = trainer.modules(state)
    kernel = np.array(blocks[0].layers[1].kernel[...])
    assert np.abs(kernel).max() > 0
    blocks[1].layers[0].kernel.set_value(jnp.zeros_like(blocks[1].layers[0].kernel[...]))
    assert np.abs(nets.to_arrays(trainer, state)["block_1/params/block/layers/0/kernel"]).max() > 0
    state, _ = nets.trained(trainer, DATA, 4, state)
    trainer.wait(state)
    np.testing.assert_array_equal(blocks[0].layers[1].kernel[...], kernel)
    assert np.abs(trainer.modules(state)[0].layers[1].kernel[...] - kernel).max() > 1e-4


def test_modules_share_no_random_state():
    trainer = nets.build("bp", model=nets.user_model(depth=2, dropout=0.5))
    state = trainer.init()
    first, second = trainer.modules(state)[0], trainer.modules(state)[0]
    x = jnp.ones((4, nets.FEATURES))
    before = int(second.dropout.rngs.count[...])
    first(x)
    assert int(second.dropout.rngs.count[...]) == before
    assert int(trainer.modules(state)[0].dropout.rngs.count[...]) == before


@METHODS
def test_modules_give_what_evaluate_measures(name):
    trainer = shared(name)
    state, _ = nets.trained(trainer, DATA, 10)
    measured = trainer.evaluate(state, DATA)
    blocks, heads = trainer.modules(state)[:2], trainer.heads(state)
    exits: dict[int, list] = {0: [], 1: []}
    for batch in DATA:
        x = jnp.asarray(batch["x"])
        for index, (block, head) in enumerate(zip(blocks, heads, strict=True)):
            block.eval()
            x = block(x)
            if head is not None:
                head.eval()
                logits = head.logits(x)
                if logits is None and index == 1:
                    logits = heads[0].descend(head.descend(head.turn(x)))
                if logits is not None:
                    exits[index].append((logits, batch["label"]))
    keys = set()
    for index, found in exits.items():
        if not found:
            continue
        logits = jnp.concatenate([each for each, _ in found])
        labels = np.concatenate([each for _, each in found])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        accuracy = (np.asarray(logits).argmax(1) == labels).mean()
        assert measured[f"exit_{index}/loss"] == pytest.approx(float(loss), rel=1e-5)
        assert measured[f"exit_{index}/accuracy"] == pytest.approx(accuracy)
        keys |= {f"exit_{index}/loss", f"exit_{index}/accuracy"}
    assert measured.keys() == keys | {"loss", "accuracy"}
    assert measured["loss"] == measured["exit_1/loss"]
    assert measured["accuracy"] == measured["exit_1/accuracy"]


def test_a_state_goes_through_named_arrays():
    """Into a trainer of another partition, which goes on training with them."""
    first, second = shared("bp"), fused("bp")
    state, _ = nets.trained(first, DATA, 3)
    arrays = nets.to_arrays(first, state)
    moved = second.from_arrays(state.step, arrays)
    assert nets.same_bits(nets.to_arrays(second, moved), arrays)
    chex.assert_trees_all_equal_shapes_and_dtypes(first.to_arrays(first.abstract()), arrays)
    one, _ = first.step(state, DATA[3])
    two, _ = second.step(moved, DATA[3])
    assert nets.largest_error(nets.to_arrays(first, one), nets.to_arrays(second, two)) < 1e-5


# --- Evaluation -----------------------------------------------------------------------------


def pieces(sizes: list[int]) -> list[dict]:
    """All examples of DATA, cut into batches of these sizes."""
    whole = {key: np.concatenate([batch[key] for batch in DATA]) for key in DATA[0]}
    assert sum(sizes) == len(whole["label"])
    ends = np.cumsum([0, *sizes])
    return [{key: leaf[a:b] for key, leaf in whole.items()} for a, b in itertools.pairwise(ends)]


@METHODS
def test_evaluation_counts_every_example_once(name):
    trainer = shared(name)
    state, _ = nets.trained(trainer, DATA, 10)
    wanted = trainer.evaluate(state, DATA)
    exits = [key for key in wanted if key.endswith("accuracy")]
    assert all((64 * wanted[key]).is_integer() for key in exits)
    for sizes in ([64], [30, 30, 4], [1, 15, 48]):
        found = trainer.evaluate(state, pieces(sizes))
        assert found == pytest.approx(wanted, rel=1e-5)
        assert [found[key] for key in exits] == [wanted[key] for key in exits]


OTHER_MESHES = [{}, {"mesh": (1, 3), "batch": 15}, {"mesh": (2, 2)}]
FAST = [(name, {}) for name in ("bp", "al")] + [("early_exit", OTHER_MESHES[1])]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        case if case in FAST else pytest.param(*case, marks=pytest.mark.slow)
        for case in itertools.product(jd.methods.names(), OTHER_MESHES)
    ],
)
def test_evaluation_does_not_depend_on_the_mesh(name, options):
    trainer = shared(name)
    state, _ = nets.trained(trainer, DATA, 10)
    wanted = trainer.evaluate(state, DATA)
    if options:
        example = {key: leaf[: options.get("batch", 16)] for key, leaf in DATA[0].items()}
        other = nets.build(name, mesh=jd.make_mesh(*options["mesh"]), example=example)
    else:
        other = fused(name)
    moved = other.from_arrays(state.step, nets.to_arrays(trainer, state))
    assert other.evaluate(moved, pieces([30, 30, 4])) == pytest.approx(wanted, rel=1e-5)


def test_one_batch_is_data_too_and_an_iterator_is_read_once():
    trainer = shared("bp")
    state = trainer.init()
    assert trainer.evaluate(state, DATA[0]) == trainer.evaluate(state, DATA[:1])
    assert trainer.evaluate(state, iter(DATA)) == trainer.evaluate(state, DATA)


def test_evaluation_changes_nothing():
    trainer = shared("deinforeg")
    state, _ = nets.trained(trainer, DATA, 2)
    before = nets.to_arrays(trainer, state)
    trainer.evaluate(state, DATA)
    assert nets.same_bits(nets.to_arrays(trainer, state), before)


# --- Compute dtype --------------------------------------------------------------------------


@pytest.mark.parametrize("name", nets.marked(jd.methods.names(), ("deinforeg",)))
def test_bfloat16_computes_and_float32_keeps(name):
    trainer = nets.build(name, dtype=jnp.bfloat16, num_stages=2)
    state, metrics = nets.trained(trainer, DATA[:1], 40)
    arrays = trainer.to_arrays(state)
    kept = {leaf.dtype for key, leaf in arrays.items() if "/params/" in key or "/stats/" in key}
    assert kept == {jnp.dtype("float32")}
    assert trainer.stages[1].carry["x"].dtype == jnp.bfloat16
    assert metrics[-1]["loss"] < 0.9 * metrics[trainer.latency]["loss"]
    assert math.isfinite(trainer.evaluate(state, DATA[0])["loss"])
    exact, _ = nets.trained(shared(name), DATA[:1], 4)
    first, _ = nets.trained(trainer, DATA[:1], 4)
    error = nets.largest_error(nets.weights(trainer, first), nets.weights(shared(name), exact))
    assert 0 < error < 0.05


# --- Models without a classifier, odd blocks -------------------------------------------------


@pytest.mark.parametrize("name", nets.marked(["bp", "deinforeg"], ["deinforeg"]))
def test_a_model_without_a_classifier(name):
    options = {} if name == "bp" else {"num_classes": nets.CLASSES}
    trainer = nets.build(name, model=nets.logits_model(), **options)
    state, metrics = nets.trained(trainer, DATA[:1], 20)
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert len(trainer.modules(state)) == 2
    assert trainer.num_classes == nets.CLASSES
