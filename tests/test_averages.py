"""Exponential moving averages of the weights: their numbers, and who reads them."""

import functools

import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
from flax import nnx

import jdecouple as jd
from jdecouple import growth
from jdecouple.methods.routes import accumulating
from jdecouple.methods.routes.updates import begin_average, has_stepped, move_average

DECAY = 0.9
DATA = nets.batches()
SPMD = {"num_stages": 2, "mesh": jd.make_mesh(2), "engine": "spmd"}
PIPELINES = {
    "bp": {"accumulate": 2},
    "early_exit": {"num_stages": 2, "fuse": False, "microbatches": 2, "clip_norm": 0.5},
    "deinforeg": SPMD,
    "gpipe": SPMD,
    "al": {"num_stages": 2, "fuse": False},
    "fdg": {"num_stages": 2, "accumulate": 2},
    "adl": {"num_stages": 2},
}
MOVES = {"bp": 4, "early_exit": 10, "deinforeg": 20, "gpipe": 20, "al": 10, "fdg": 3, "adl": 3}
"""Steps of blocks in five batches."""
NAMES = pytest.mark.parametrize("name", nets.marked(PIPELINES, ("bp",)))


@functools.cache
def build(name: str) -> jd.Trainer:
    """Blocks with BatchNorm; "gpipe" is backpropagation by the engine spmd."""
    options = PIPELINES[name]
    model = nets.mlp(depth=4 if options is SPMD else 2, batch_norm=True)
    return nets.build("bp" if name == "gpipe" else name, model=model, ema=DECAY, **options)


def part(arrays: dict, *kinds: str) -> dict:
    """Arrays of a kind, such as "params" or "ema", by what is left of their names."""
    pairs = ((name.split("/"), x) for name, x in arrays.items())
    size = 1 + len(kinds)
    return {"/".join([p[0], *p[size:]]): x for p, x in pairs if tuple(p[1:size]) == kinds}


@NAMES
def test_averages_are_numpys(name):
    """They begin as the weights and move with every step; not while gradients accumulate."""
    trainer = build(name)
    state = trainer.init()
    before = nets.to_arrays(trainer, state)
    kinds = ("params", "stats")
    wanted = {kind: part(before, kind) for kind in kinds}
    for kind in kinds:
        assert nets.same_bits(part(before, "ema", kind), wanted[kind])
    moves = 0
    for step in range(5):
        state, _ = trainer.step(state, DATA[step % 4])
        after = nets.to_arrays(trainer, state)
        moved = {
            block
            for block in {key.split("/")[0] for key in wanted["params"]}
            if any(
                np.any(x != part(before, "params")[key])
                for key, x in part(after, "params").items()
                if key.startswith(block)
            )
        }
        moves += len(moved)
        for kind in kinds:
            for key, x in part(after, kind).items():
                if key.split("/")[0] not in moved:
                    continue
                if kind == "stats" and trainer.schedule.overlapping and key.startswith("block_0/"):
                    x = part(before, kind)[key]  # its forward, of a later batch, comes behind
                wanted[kind][key] = DECAY * wanted[kind][key] + (1 - DECAY) * x
            found = part(after, "ema", kind)
            assert nets.largest_error(found, wanted[kind]) < 1e-6
            assert all(x.dtype == np.float32 for x in found.values())
        before = after
    assert moves == MOVES[name]


@NAMES
def test_a_state_goes_on_to_the_bit(name, tmp_path):
    """Kept in the middle of what accumulates; evaluation and training are the same."""
    trainer = build(name)
    state, _ = nets.trained(trainer, DATA, 3)
    trainer.save(state, tmp_path)
    moved = trainer.restore(tmp_path)
    assert trainer.evaluate(moved, DATA) == trainer.evaluate(state, DATA)
    one, two = (nets.trained(trainer, DATA[3:], 2, each)[0] for each in (state, moved))
    assert nets.same_bits(nets.to_arrays(trainer, one), nets.to_arrays(trainer, two))


@NAMES
def test_evaluation_is_that_of_the_averages(name):
    """So are `predict` and `modules`; what is trained is there, too."""
    trainer = build(name)
    state, _ = nets.trained(trainer, DATA, 3)
    arrays = nets.to_arrays(trainer, state)
    assert any(
        np.any(x != arrays[key.replace("/ema/", "/")]) for key, x in arrays.items() if "ema" in key
    )
    averages = {key.replace("/ema/", "/"): x for key, x in arrays.items() if "/ema/" in key}
    plain = trainer.from_arrays(3, {**arrays, **averages})  # whose weights are the averages
    assert trainer.evaluate(state, DATA) == trainer.evaluate(plain, DATA)
    np.testing.assert_array_equal(trainer.predict(state, DATA), trainer.predict(plain, DATA))
    for averaged, source in ((True, plain), (False, state)):
        pairs = [
            (modules(state, averaged=averaged), modules(source, averaged=False))
            for modules in (trainer.modules, trainer.heads)
        ]
        for found, wanted in pairs:
            leaves, others = (
                jax.tree.leaves(nnx.state([m for m in x if m])) for x in (found, wanted)
            )
            assert leaves
            for one, other in zip(leaves, others, strict=True):
                if not jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
                    np.testing.assert_array_equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("freeze", [True, False])
def test_growing(freeze):
    """Frozen blocks keep their averages, which the new ones train on; else they go on moving."""
    model = nets.mlp(depth=3, batch_norm=True)
    classifier = nnx.Linear(24, nets.CLASSES, rngs=nnx.Rngs(7))
    trainer = nets.build("greedy_exit", model=jd.Model(model.blocks[:2], classifier), ema=DECAY)
    state, _ = nets.trained(trainer, DATA, 3)
    before, scores = nets.to_arrays(trainer, state), trainer.evaluate(state, DATA)
    *blocks, _ = trainer.modules(state)
    trainer, state = growth.grow(
        trainer, state, model.blocks[2:], classifier=model.classifier, freeze=freeze
    )
    begun = nets.to_arrays(trainer, state)
    old = {name: x for name, x in before.items() if "/ema/" in name}
    assert all(begun[name].tobytes() == x.tobytes() for name, x in old.items())
    new = {name: x for name, x in begun.items() if name.startswith("block_2/ema/")}
    assert new
    assert all(np.array_equal(x, begun[name.replace("/ema/", "/")]) for name, x in new.items())
    found = trainer.evaluate(state, DATA)
    assert {name: found[name] for name in scores if "exit" in name} == pytest.approx(
        {name: x for name, x in scores.items() if "exit" in name}
    )
    state, _ = nets.trained(trainer, DATA, 2, state)
    after = nets.to_arrays(trainer, state)
    assert all(np.array_equal(after[name], x) == freeze for name, x in old.items() if x.any())
    if not freeze:
        return
    for block in blocks:
        block.eval()
    kept = [{**batch, "x": np.asarray(blocks[1](blocks[0](batch["x"])))} for batch in DATA]
    upper = nets.build(
        "greedy_exit",
        model=jd.Model(model.blocks[2:], model.classifier),
        example=kept[0],
        ema=DECAY,
    )
    start = {
        name.replace("block_2", "block_0"): x
        for name, x in begun.items()
        if name.startswith("block_2")
    }
    reference, _ = nets.trained(upper, kept, 2, upper.from_arrays(3, start))
    wanted = {
        k.replace("block_0", "block_2"): x for k, x in nets.to_arrays(upper, reference).items()
    }
    assert nets.largest_error({k: after[k] for k in wanted}, wanted) < 1e-5


def test_averages_that_begin_late_begin_as_the_weights():
    """Blocks of a model that was trained without them, as `grow` and a run that goes on find it."""
    trainer = nets.build("bp")
    arrays = nets.to_arrays(trainer, trainer.init())
    assert not any("/ema/" in name for name in arrays)
    other = nets.build("bp", ema=DECAY)
    arrays = {name: x + 1 if x.dtype == np.float32 else x for name, x in arrays.items()}
    found = nets.to_arrays(other, growth.from_arrays(other, 0, arrays))
    averages = {name.replace("/ema/", "/"): x for name, x in found.items() if "/ema/" in name}
    assert nets.same_bits(averages, {name: arrays[name] for name in averages})


def test_arrays_of_other_dtypes():
    """Half precision is averaged in float32; whole numbers are taken over."""
    arrays = {"w": jnp.full(2, 1.5, jnp.bfloat16), "count": jnp.array(3)}
    average = begin_average(arrays)
    assert average["w"].dtype == jnp.float32
    later = {"w": jnp.full(2, 2.5, jnp.bfloat16), "count": jnp.array(4)}
    moved = move_average(0.99, average, later, jnp.array(True))
    np.testing.assert_allclose(moved["w"], 1.51, rtol=1e-6)
    assert moved["count"] == 4
    stayed = move_average(0.99, average, later, jnp.array(False))
    assert stayed["count"] == 3
    np.testing.assert_array_equal(stayed["w"], average["w"])


def test_a_step_within_another_wrapper_is_found():
    optimizer = accumulating(accumulating(jd.optim.sgd(0.1), 2), 3)
    weights = {"w": jnp.ones(2)}
    state, steps = optimizer.init(weights), []
    for _ in range(12):
        _, new = optimizer.update(weights, state, weights)
        steps.append(bool(has_stepped(state, new)))
        state = new
    assert steps == [n in (5, 11) for n in range(12)]
    assert has_stepped(jd.optim.sgd(0.1).init(weights), ()) is True


@pytest.mark.parametrize("ema", [0.0, 1.0, -0.5, True, "0.9"])
def test_bad_decays(ema):
    words = (f"ema is {ema!r}", "a number in (0, 1) is needed")
    nets.assert_clear(ValueError, words, lambda: nets.build("bp", ema=ema))
