"""Parameters that blocks of different stages share: one gradient, one step, equal copies."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import nets
import numpy as np
import optax
import pytest
import token_nets
from flax import nnx
from tied_simulation import LAST, STAGES, TiedSimulation, weights

import jdecouple as jd
from jdecouple.pipeline.diagnostics import message_sizes
from jdecouple.pipeline.state import modules

pytestmark = pytest.mark.usefixtures("module_x64")
STEPS = 4
SLOW = pytest.mark.slow
LOCAL = [name for name in token_nets.METHODS if nets.method(name).route.local]
DELAYED = [name for name in token_nets.METHODS if name in nets.DELAYED]


WORDS, WIDTH, RATE, MOMENTUM = 5, 4, 0.3, 0.9


class First(nnx.Module):
    """Vectors of words, and a dense layer."""

    def __init__(self, own: Any, table: nnx.Param):
        self.own, self.table = nnx.Param(own), table

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(jnp.tanh(x @ self.table[...]) @ self.own[...])


class Dense(nnx.Module):
    def __init__(self, own: Any):
        self.own = nnx.Param(own)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ self.own[...])


class Turned(nnx.Module):
    def __init__(self, table: nnx.Param):
        self.table = table

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.table[...].T


def examples(count: int) -> list[dict]:
    rng = np.random.default_rng(1)
    return [
        {
            "x": rng.normal(size=(6, WORDS)),
            "label": rng.integers(0, WORDS, 6).astype(np.int32),
        }
        for _ in range(count)
    ]


def small() -> jd.Model:
    """Three blocks, of which the first shares with the classifier."""
    own, table = weights(0, WORDS, WIDTH)
    shared = nnx.Param(table)
    return jd.Model([First(own[0], shared), Dense(own[1]), Dense(own[2])], Turned(shared))


def gpt(**options: Any) -> jd.Model:
    """A tied GPT of three blocks."""
    return token_nets.model(tied=True, param_dtype=jnp.float64, **options)


def build(name: str, stages: int = 1, net: str = "gpt", **options: Any) -> jd.Trainer:
    """A trainer on as many devices as stages, of a net by name."""
    options = {"mesh": jd.make_mesh(stages, devices=jax.devices()[:stages]), **options}
    if net == "gpt":
        return token_nets.trainer(name, **{"model": gpt(), **options})
    arguments = {"aux": "linear"} if name == "dgl" else {}
    optimizer = options.pop("optimizer", jd.optim.sgd(RATE, momentum=MOMENTUM))
    model = options.pop("model", None) or small()
    method = nets.method(name, **arguments)
    return jd.Trainer(model, method, optimizer, example=examples(1)[0], **options)


@functools.cache
def trained(name: str, stages: int = 1, net: str = "gpt", chunk: int = 1, **options: Any) -> tuple:
    """Trainer, its state, arrays and metrics after some steps, by labels that are all there."""
    trainer = build(name, stages, net, **options)
    state, found = trainer.init(), []
    data = token_nets.batches(padded=False) if net == "gpt" else examples(STEPS)
    for start in range(0, STEPS, chunk):
        state, metrics = trainer.steps(state, data[start : start + chunk])
        found += nets.rows(metrics)
    return trainer, state, nets.to_arrays(trainer, state), found


def assert_close(found: tuple, wanted: tuple) -> None:
    assert nets.largest_error(found[2], wanted[2]) < 1e-12
    for here, there in zip(found[3], wanted[3], strict=True):
        assert here == pytest.approx(there, rel=2e-6, abs=1e-7, nan_ok=True)
    for each in found[0].shared:  # the copies are one
        copies = [found[2][name] for name in each.names]
        assert all(copy.tobytes() == copies[0].tobytes() for copy in copies)


def test_the_gradient_is_that_of_plain_jax_and_clipped_as_one():
    """Of the model called block by block, against three stages that are clipped together."""
    model, batch = small(), examples(1)[0]
    definition, params = nnx.split(nnx.List([*model.blocks, model.classifier]))

    @jax.jit
    @jax.grad
    def gradient(params: Any) -> jax.Array:
        x = jnp.asarray(batch["x"])
        for module in nnx.merge(definition, params):
            x = module(x)
        return optax.softmax_cross_entropy_with_integer_labels(x, batch["label"]).mean()

    wanted = gradient(params)
    norm = float(optax.tree.norm(wanted))
    options = {"optimizer": optax.sgd(1.0), "clip_norm": norm / 2, "microbatches": 2}
    trainer = build("bp", STAGES, "small", model=model, schedule="1f1b", **options)
    state, metrics = trainer.step(trainer.init(), batch)
    assert float(metrics["gradient_norm"]) == pytest.approx(norm, rel=1e-6)
    after = nnx.split(nnx.List(trainer.modules(state)))[1]  # which still share the table
    assert jax.tree.structure(after) == jax.tree.structure(params)
    assert len(jax.tree.leaves(after)) == 4
    for old, new, each in zip(*map(jax.tree.leaves, (params, after, wanted)), strict=True):
        np.testing.assert_allclose(old - new, each / 2, rtol=0, atol=1e-12)
    (shared,) = trainer.shared
    assert shared.names == (
        "block_0/params/block/table",
        "block_2/params/head/classifier/table",
    )
    assert shared.stages == (0, 2)


def test_local_stages_train_as_one_program():
    """And what one trainer has begun, another finishes."""
    assert_close(trained("dgl", 3, "small"), trained("dgl", net="small"))
    (whole, *_), (one, *_, wanted, _) = trained("dgl", 3, "small"), trained("dgl", net="small")
    state, _ = nets.trained(whole, examples(STEPS), 2)
    arrays = nets.to_arrays(whole, state)
    state, _ = nets.trained(one, examples(STEPS)[2:], 2, one.from_arrays(2, arrays))
    assert nets.largest_error(nets.to_arrays(one, state), wanted) < 1e-12


@SLOW
@pytest.mark.parametrize("name", ["bp", *LOCAL])
@pytest.mark.parametrize("stages", [2, 3])
def test_stages_of_a_gpt_train_as_one_program(name, stages):
    assert_close(trained(name, stages), trained(name))


@SLOW
@pytest.mark.parametrize(("stages", "schedule"), nets.SYNCHRONOUS)
def test_every_synchronous_schedule_trains_as_one_program(stages, schedule):
    found = trained("early_exit", stages, microbatches=2, schedule=schedule)
    assert_close(found, trained("early_exit", microbatches=2))
    assert_close(found, trained("early_exit"))


ADAM = optax.adam(0.01)
OPTIONS: dict[str, dict[str, Any]] = {
    "averages": {"ema": 0.5, "accumulate": 2, "optimizer": ADAM},
    "clipped": {"clip_norm": 0.5, "ema": 0.5, "microbatches": 2, "optimizer": ADAM},
    "apart": {"fuse": False, "mesh": jd.make_mesh(1, devices=jax.devices()[:1]), "num_stages": 3},
    "fused": {"mesh": jd.make_mesh(1, devices=jax.devices()[:1]), "num_stages": 3},
    "replicas": {"mesh": jd.make_mesh(3, 2), "shard_optimizer": True, "optimizer": ADAM},
    "uneven": {"mesh": jd.make_mesh(replicas=(2, 1, 4)), "optimizer": ADAM},
    "kept": {"remat": "stages"},
    "half": {"dtype": jnp.float16},
}
ELSEWHERE = ("mesh", "num_stages", "fuse", "shard_optimizer")


@SLOW
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name in ("bp", "dgl", "fdg")
        for kind in OPTIONS
        if (name, kind) != ("fdg", "clipped")  # whose batches are not cut
    ],
)
def test_options(name, kind):
    """As in one program, or for a delayed method as on three devices."""
    options = OPTIONS[kind]
    if kind == "clipped" and name != "bp":
        options = {key: each for key, each in options.items() if key != "clip_norm"}
    plain = {key: each for key, each in options.items() if key not in ELSEWHERE}
    if name == "fdg":
        found = trained(name, 3, **options)
        if kind in ("averages", "kept", "half"):
            fused = {"mesh": jd.make_mesh(1, devices=jax.devices()[:1]), "num_stages": 3}
            assert_close(found, trained(name, 3, **plain, **fused))
        else:
            assert_close(found, trained(name, 3, **plain))
        return
    wanted = trained(name, **plain)
    if kind == "half":
        assert np.isfinite(trained(name, 3, **options)[3][-1]["loss"])
        return
    assert_close(trained(name, 3, **options), wanted)


@SLOW
@pytest.mark.parametrize("name", ["bp", "dgl", "fdg"])
def test_several_batches_in_one_call(name):
    mesh = jd.make_mesh(1, devices=jax.devices()[:1])
    found = trained(name, 3, chunk=2, mesh=mesh, num_stages=3)
    assert_close(found, trained(name, 3))


@SLOW
@pytest.mark.parametrize("name", ["bp", "dgl"])
def test_one_layer_that_all_blocks_share(name):
    """Each of its parameters is used three times, in two or three stages."""
    found = []
    for stages in (1, 2, 3):
        net = gpt(depth=3)
        blocks = [net.blocks[0], *[net.blocks[1]] * 3]
        mesh = jd.make_mesh(stages, devices=jax.devices()[:stages])
        found.append(trained(name, model=jd.Model(blocks, net.classifier), mesh=mesh))
    assert [len(each.names) for each in found[0][0].shared].count(3) == 12
    for each in found[1:]:
        assert_close(each, found[0])


# --- Heads that share the table of the embedding ------------------------------------------------

HEADS: dict[str, dict] = {
    "dgl": {"aux": "tied"},
    "man": {"aux": "tied"},
    "greedy_exit": {"branch": "tied"},
    "early_exit": {"branch": "tied"},
}


def test_every_head_adds_its_gradient_to_the_table():
    """Of dgl in two stages: one step is that of the sum of all local losses in plain JAX."""
    batch = token_nets.batches(1, padded=False)[0]
    trainer = build("dgl", 2, arguments=HEADS["dgl"], optimizer=optax.sgd(1.0))
    state = trainer.init()

    def halves(state: Any) -> tuple[Any, Any]:
        return nnx.split(nnx.List([nnx.List(each) for each in modules(trainer.stages, state)]))

    definition, params = halves(state)

    @jax.jit
    @jax.grad
    def gradient(params: Any) -> jax.Array:
        x, total = batch["x"], jnp.zeros(())
        for block, head in nnx.merge(definition, params):
            x = block(x)
            logits = head.logits(x)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
            total += losses.mean()
            x = jax.lax.stop_gradient(x)
        return total

    wanted = gradient(params)
    state, _ = trainer.step(state, batch)
    for old, new, each in zip(
        *map(jax.tree.leaves, (params, halves(state)[1], wanted)), strict=True
    ):
        np.testing.assert_allclose(old - new, each, rtol=0, atol=1e-12)
    (shared,) = trainer.shared
    assert shared.names == (
        "block_0/params/block/table",
        "block_1/params/head/head/readout/layers/2/table",
        "block_2/params/head/head/classifier/layers/2/table",
    )


@SLOW
@pytest.mark.parametrize("name", HEADS)
def test_tied_heads_train_as_one_program(name):
    found = []
    for stages in (1, 2):
        trainer = build(name, stages, arguments=HEADS[name])
        state, metrics = nets.trained(trainer, token_nets.batches(padded=False), STEPS)
        found.append((trainer, state, nets.to_arrays(trainer, state), metrics))
    assert_close(found[1], found[0])


def test_tied_heads_need_a_tied_classifier():
    model = token_nets.model(param_dtype=jnp.float64)
    for name in ("dgl", "greedy_exit"):
        words = ("a head that is 'tied' needs a model whose classifier is the table", "tied=True")
        nets.assert_clear(
            ValueError, words, lambda name=name: build(name, model=model, arguments=HEADS[name])
        )


# --- Late errors ------------------------------------------------------------------------------


@functools.cache
def errors(name: str, devices: int) -> tuple[list[float], TiedSimulation]:
    """Largest difference of any weight after every step and every draining."""
    own, table = weights(0, WORDS, WIDTH)
    data, simulation = examples(14), TiedSimulation(name, own, table, RATE, MOMENTUM)
    mesh = jd.make_mesh(STAGES, devices=jax.devices()[:devices])
    trainer = build(name, STAGES, "small", mesh=mesh)

    def error() -> float:
        arrays = nets.weights(trainer, state)
        found = [arrays[f"block_{k}/params/block/own"] for k in range(STAGES)]
        found += [arrays[copy] for copy in trainer.shared[0].names]
        wanted = [*simulation.own, simulation.table, simulation.table]
        pairs = zip(found, wanted, strict=True)
        return max(float(np.abs(one - other).max()) for one, other in pairs)

    state, found = trainer.init(), []
    for number, batch in enumerate(data):
        state, _ = trainer.step(state, batch)
        simulation.step(batch)
        found.append(error())
        if number == 9:
            ages = [list(each) for each in simulation.ages]
    state = trainer.finish(state)
    for _ in range(2 * LAST):
        simulation.step(None)
    found.append(error())
    simulation.ages = ages
    return found, simulation


@pytest.mark.parametrize(
    ("name", "devices"),
    [
        ("fdg", 3),
        *(pytest.param(*each, marks=SLOW) for each in (("fdg", 1), ("ddg", 1), ("ddg", 3))),
        *(pytest.param("fr", devices, marks=SLOW) for devices in (1, 3)),
    ],
)
def test_late_errors_are_those_of_the_naive_simulation(name, devices):
    """While the stages fill, in the steady state, and when they drain; and so is the staleness."""
    found, simulation = errors(name, devices)
    assert max(found) < 1e-12, found
    start, _ = weights(0, WORDS, WIDTH)
    assert np.abs(simulation.own[1] - start[1]).max() > 0.01
    route = jd.methods.get(name).route
    for k in (0, LAST):
        assert route.staleness(k, STAGES, shared=True).weights == simulation.ages[k][-1]


def test_bytes_of_what_stages_share():
    assert message_sizes(build("bp", 3, "small").stages)["ties"] == (((0, 2), WORDS * WIDTH * 8),)
    assert not message_sizes(build("bp", net="small").stages)["ties"]


def test_the_trainer_tells_how_late_a_shared_gradient_is():
    (shared,) = build("fdg", 3, "small").shared
    assert [each.weights for each in shared.staleness] == [4, 0]
    assert [each.error for each in shared.staleness] == [2, 0]
    (together,) = build("fdg", net="small").shared
    assert [each.weights for each in together.staleness] == [0, 0]


@SLOW
@pytest.mark.parametrize("name", [name for name in DELAYED if name != "2bw"])
def test_delayed_stages_on_devices_of_their_own(name):
    mesh = jd.make_mesh(1, devices=jax.devices()[:1])
    assert_close(trained(name, 3), trained(name, 3, mesh=mesh, num_stages=3))


# --- What is refused ------------------------------------------------------------------------


def test_two_versions_of_what_stages_share_are_refused():
    told = "method 2bw", "several stages share block_0/params/block/table"
    nets.assert_clear(ValueError, told, lambda: build("2bw", 3))


def test_refused():
    norm = nnx.BatchNorm(nets.FEATURES, rngs=nnx.Rngs(0))
    dense = nnx.Linear(nets.FEATURES, nets.FEATURES, rngs=nnx.Rngs(0))
    last = nnx.Linear(nets.FEATURES, nets.CLASSES, rngs=nnx.Rngs(0))
    words = ("blocks[0]", "blocks[2]", "share a BatchStat", "parameters may be shared")
    nets.assert_clear(ValueError, words, lambda: jd.Model([norm, dense, norm]))
    three = jd.Model([dense, dense, nnx.Sequential(dense, nnx.relu)], last)
    for options, words in (
        ({"engine": "spmd"}, ("engine 'spmd' gives every block weights of its own",)),
        ({"schedule": "interleaved"}, ("'interleaved' trains stages on different batches",)),
        ({"frozen": [1]}, ("frozen block 1 shares block/bias with another",)),
    ):
        arguments = three, nets.method("greedy_exit"), jd.optim.sgd(0.1)
        more = {"example": nets.batches(1)[0], "num_stages": 3, "mesh": jd.make_mesh(3), **options}
        call = functools.partial(jd.Trainer, *arguments, **more)
        nets.assert_clear(ValueError, words, call)
    trainer = build("dgl", 3, "small")
    words = ("a chunk of 2 batches", "share")
    nets.assert_clear(ValueError, words, lambda: trainer.check_steps(2))
