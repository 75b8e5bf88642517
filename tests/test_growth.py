"""Blocks that are frozen, models that grow, and blocks that read further entries of a batch."""

import functools

import chex
import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
from flax import nnx

import jdecouple as jd
from jdecouple import growth
from jdecouple.methods.routes import Stage
from jdecouple.pipeline.mpmd.stage_fns import TRAINING, make_stage_fn

LOCAL = [name for name in jd.methods.names() if nets.method(name).route.local]
METHODS = pytest.mark.parametrize("name", nets.marked(LOCAL, ("deinforeg",)))


PIPELINES = {
    "apart": {"num_stages": 4, "fuse": False},
    "microbatches": {"num_stages": 2, "mesh": jd.make_mesh(2), "microbatches": 2},
    "replicas": {"boundaries": (0, 2), "mesh": jd.make_mesh(2, 2)},
}


@functools.cache
def whole() -> jd.Model:
    return nets.mlp(depth=4, batch_norm=True)


def first(count: int = 2) -> jd.Model:
    return jd.Model(whole().blocks[:count], nnx.Linear(24, nets.CLASSES, rngs=nnx.Rngs(7)))


def trained(name: str, steps: int = 2, **options) -> tuple:
    """A trainer of two blocks and its state."""
    trainer = nets.build(name, model=first(), **options)
    return trainer, nets.trained(trainer, nets.batches(), steps)[0]


def grown(trainer, state, **options) -> tuple:
    """The same with the other two blocks."""
    model = whole()
    return growth.grow(trainer, state, model.blocks[2:], classifier=model.classifier, **options)


def of_blocks(arrays: dict, indices: tuple, kinds: tuple = ("params", "stats", "opt")) -> dict:
    wanted = {(f"block_{i}", kind) for i in indices for kind in kinds}
    return {name: x for name, x in arrays.items() if tuple(name.split("/")[:2]) in wanted}


@METHODS
def test_frozen_blocks_stay_as_they_are(name):
    """They have neither metrics nor an optimiser's state; the new ones train, and all evaluate."""
    data = nets.batches()
    trainer, state = trained(name)
    before, scores = nets.to_arrays(trainer, state), trainer.evaluate(state, data)
    trainer, state = grown(trainer, state, num_stages=3, fuse=False)
    fresh = nets.to_arrays(trainer, state)
    state, metrics = nets.trained(trainer, data, 3, state)
    after = nets.to_arrays(trainer, state)
    assert state.step == 5
    old = of_blocks(before, (0, 1), ("params", "stats"))
    assert nets.same_bits(of_blocks(after, (0, 1)), old)
    for index in (2, 3):
        new, begun = (of_blocks(x, (index,), ("params", "opt")) for x in (after, fresh))
        chex.assert_tree_all_finite(new)
        assert not nets.same_bits(new, begun)
    blocks = {key.split("/")[0] for key in metrics[-1]} - {"loss", "accuracy"}
    assert blocks == {"block_2", "block_3"}
    found = trainer.evaluate(state, data)
    assert {"exit_3/accuracy", "accuracy"} <= found.keys()
    exits = [key for key in scores if key.startswith("exit_")]
    if name != "al":  # whose only answer comes down from the last block
        assert {key: found[key] for key in exits} == pytest.approx({k: scores[k] for k in exits})


@pytest.mark.slow  # the document growth.md has one, which tests/test_snippets.py runs
@pytest.mark.parametrize("name", LOCAL)
def test_a_grown_model_learns_on(name):
    """What the first blocks could not tell apart, more of them do not tell apart worse."""
    x = np.random.default_rng(3).normal(size=(64, nets.FEATURES)).astype(np.float32)
    batch = {"x": x, "label": (4.99 * (np.tanh(x[:, 0] * 2) + 1) / 2).astype(np.int32)}
    options = {"example": batch, "optimizer": jd.optim.adam(1e-2)}
    trainer = nets.build(name, model=first(), **options)
    state, _ = nets.trained(trainer, [batch], 40)
    before = trainer.evaluate(state, batch)["accuracy"]
    trainer, state = grown(trainer, state)
    state, _ = nets.trained(trainer, [batch], 60, state)
    assert trainer.evaluate(state, batch)["accuracy"] >= before > 0.3


@pytest.mark.slow
def test_new_blocks_train_as_on_features_that_were_kept():
    """To train behind frozen blocks is to train on what they give in evaluation."""
    data = nets.batches()
    trainer, state = trained("deinforeg")
    *blocks, _ = trainer.modules(state)
    for block in blocks:
        block.eval()
    kept = [{**batch, "x": np.asarray(blocks[1](blocks[0](batch["x"])))} for batch in data]
    trainer, state = grown(trainer, state)
    begun = nets.to_arrays(trainer, state)
    upper = nets.build(
        "deinforeg",
        model=jd.Model(whole().blocks[2:]),
        num_classes=nets.CLASSES,
        example=kept[0],
    )
    moved = {f"block_{i - 2}": f"block_{i}" for i in (2, 3)}

    def below(arrays: dict) -> dict:
        return {
            lower + name.removeprefix(own): x
            for lower, own in moved.items()
            for name, x in of_blocks(arrays, (int(own[-1]),)).items()
        }

    state, _ = nets.trained(trainer, data, 3, state)
    reference, _ = nets.trained(upper, kept, 3, upper.from_arrays(0, below(begun)))
    found, wanted = below(nets.to_arrays(trainer, state)), nets.to_arrays(upper, reference)
    assert nets.largest_error(found, wanted) < 1e-5


@pytest.mark.parametrize("name", nets.marked(LOCAL, ()))
def test_blocks_that_train_on_do_so_as_if_nothing_had_grown(name):
    data = nets.batches()
    trainer, state = trained(name)
    bigger, more = grown(trainer, state, freeze=False)
    kept = of_blocks(nets.to_arrays(bigger, more), (0, 1))
    assert nets.same_bits(kept, nets.to_arrays(trainer, state))
    more, metrics = nets.trained(bigger, data, 2, more)
    state, _ = nets.trained(trainer, data, 2, state)
    found = of_blocks(nets.to_arrays(bigger, more), (0, 1))
    assert nets.largest_error(found, nets.to_arrays(trainer, state)) < 1e-5
    assert {"block_0/loss", "block_1/loss", "block_2/loss", "block_3/loss"} <= metrics[0].keys()


@pytest.mark.parametrize("pipeline", nets.marked(PIPELINES, ()))
def test_frozen_stages_in_every_pipeline(pipeline):
    """A stage of frozen blocks alone is one of a forward alone; the numbers are the same."""
    data, options = nets.batches(), PIPELINES[pipeline]
    micro = {"microbatches": options.get("microbatches", 1)}
    trainer, state = trained("infopro", **micro)
    one, alone = grown(trainer, state)
    other, apart = grown(trainer, state, **options)
    alone, wanted = nets.trained(one, data, 3, alone)
    apart, found = nets.trained(other, data, 3, apart)
    assert found[-1] == pytest.approx(wanted[-1], rel=1e-4)
    arrays = nets.to_arrays(other, apart)
    assert nets.largest_error(arrays, nets.to_arrays(one, alone)) < 1e-5
    old = of_blocks(nets.to_arrays(trainer, state), (0, 1), ("params", "stats"))
    assert nets.same_bits(of_blocks(arrays, (0, 1)), old)


@pytest.mark.slow
def test_several_batches_in_one_call():
    data = nets.batches()
    trainer, state = trained("deinforeg", num_stages=2, fuse=False)
    one, alone = grown(trainer, state)
    other, together = grown(trainer, state)
    alone, wanted = nets.trained(one, data, 3, alone)
    together, found = other.steps(together, data[:3])
    assert nets.rows(found)[-1] == pytest.approx(wanted[-1], rel=1e-4)
    error = nets.largest_error(nets.to_arrays(other, together), nets.to_arrays(one, alone))
    assert error < 1e-5


def flops(function, *arguments) -> float:
    """Of a compiled function, by XLA's own count."""
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("name", nets.marked(LOCAL, ()))
def test_frozen_stages_cost_a_forward(name):
    trainer, state = trained(name)
    trainer, _ = grown(trainer, state, num_stages=2, boundaries=(0, 2))
    stage = trainer.stages[0]
    shapes = jax.eval_shape(stage.initial)
    step_ids = jax.ShapeDtypeStruct((3, 2), jnp.int32)
    call = make_stage_fn(stage, trainer.method.route, TRAINING)
    found = flops(call, shapes, None, None, stage.carry, None, step_ids, None)

    def forward(state, carry):
        handed = {}
        for unit, *arrays in zip(stage.units, state["params"], state["stats"], strict=True):
            features, logits = unit.evaluate(*arrays, carry)
            handed |= unit.pass_on(*arrays, carry)[1].carry if unit.hands_on else {}
            carry = {**carry, **handed, "x": features}
        del logits
        return carry

    wanted = flops(forward, shapes, stage.carry)
    assert wanted <= found <= 1.1 * wanted + 200
    assert found < 0.5 * sum(trainer.block_costs()[2:])
    assert sum(trainer.block_costs()[:2]) < 0.5 * sum(trainer.block_costs()[2:])


def test_balance_knows_what_is_frozen():
    """Three frozen blocks and one that trains are no three against one."""
    trainer = nets.build("dgl", model=whole(), num_stages=2, frozen=(0, 1, 2))
    assert trainer.boundaries == (0, 3)


@pytest.mark.slow
def test_a_frozen_block_thaws_with_a_fresh_optimiser_state():
    trainer, state = trained("greedy_exit")
    trainer, state = grown(trainer, state)
    trainer, state = growth.grow(
        trainer,
        state,
        [nnx.Linear(24, 24, rngs=nnx.Rngs(1))],
        classifier=nnx.Linear(24, nets.CLASSES, rngs=nnx.Rngs(1)),
        freeze=False,
    )
    arrays = nets.to_arrays(trainer, state)
    assert not any(np.any(x) for x in of_blocks(arrays, (0, 4), ("opt",)).values())
    state, metrics = nets.trained(trainer, nets.batches(), 1, state)
    assert {f"block_{i}/loss" for i in range(5)} <= metrics[0].keys()
    exits = {f"exit_{i}/accuracy" for i in range(5)}
    assert exits <= trainer.evaluate(state, nets.batches(1)).keys()


def test_arrays_of_a_checkpoint_by_hand():
    """The trainer of the grown model may be made anew, in another process."""
    trainer, state = trained("scpl")
    wanted, more = grown(trainer, state)
    arrays = nets.to_arrays(trainer, state)
    model = jd.Model(whole().blocks, whole().classifier, before=first())
    anew = nets.build("scpl", model=model, frozen=range(2), num_stages=1)
    found = growth.from_arrays(anew, state.step, arrays)
    assert found.step == 2
    assert nets.same_bits(nets.to_arrays(anew, found), nets.to_arrays(wanted, more))


def test_what_is_refused():
    trainer, state = trained("deinforeg")
    arrays = nets.to_arrays(trainer, state)
    other, more = grown(trainer, state)
    del more
    clear = nets.assert_clear
    clear(ValueError, ("local method", "bp"), lambda: grown(*trained("bp")))
    clear(ValueError, ("local method", "fdg"), lambda: nets.build("fdg", frozen=(0,)))
    clear(ValueError, ("frozen", "all 2"), lambda: nets.build("deinforeg", frozen=(0, 1)))
    clear(TypeError, ("frozen is a",), lambda: nets.build("deinforeg", frozen=iter([0])))
    clear(ValueError, ("frozen is 2", "0 to 1"), lambda: nets.build("deinforeg", frozen=(2,)))
    mesh = jd.make_mesh(2)
    clear(
        ValueError,
        ("spmd", "frozen ones, 0, 1"),
        lambda: grown(trainer, state, engine="spmd", mesh=mesh),
    )
    for none in ({}, {"other": jnp.zeros(3)}):
        clear(ValueError, ("block_0",), functools.partial(growth.from_arrays, other, 2, none))
    missing = {name: x for name, x in arrays.items() if "block_1/stats" not in name}
    clear(ValueError, ("block_1/stats",), lambda: growth.from_arrays(other, 2, missing))
    clear(
        ValueError,
        ("block 2",),
        lambda: growth.grow(trainer, state, [nnx.Linear(7, 7, rngs=nnx.Rngs(0))]),
    )
    clear(ValueError, ("2 blocks", "2 that"), lambda: growth.grow(trainer, state, []))
    block = whole().blocks[2]
    clear(TypeError, ("blocks is a", "Sequence"), lambda: growth.grow(trainer, state, block))
    clear(TypeError, ("trainer is a State",), lambda: growth.grow(state, trainer, [block]))
    clear(TypeError, ("blocks[2]", "Module"), lambda: growth.grow(trainer, state, [jnp.tanh]))
    counts = (3, 5)
    sizes = {"carry": nets.batches(1)[0], "num_classes": nets.CLASSES}
    phases = functools.partial(growth.phases, whole(), nets.method("al"), **sizes)
    clear(ValueError, ("(3, 5)", "4"), lambda: phases(counts))
    clear(ValueError, ("3 blocks", "3 that"), lambda: phases((3, 3, 4)))


class Joined(nnx.Module):
    """A dense block that also reads other entries of the batch."""

    def __init__(self, size: int, *inputs: str, rngs: nnx.Rngs):
        self.inputs = inputs
        self.dense = nnx.Linear(size, 24, rngs=rngs)

    def __call__(self, x, **others):
        assert set(others) == set(self.inputs)
        return nnx.relu(self.dense(jnp.concatenate([x, *others.values()], axis=1)))


def side_batches(scale: float = 1.0) -> list[dict]:
    rng = np.random.default_rng(5)
    return [
        {**batch, "more": scale * rng.normal(size=(16, 3)).astype(np.float32)}
        for batch in nets.batches()
    ]


def side_model() -> jd.Model:
    rngs = nnx.Rngs(3)
    blocks = [*whole().blocks[:2], Joined(27, "more", rngs=rngs)]
    return jd.Model(blocks, nnx.Linear(24, nets.CLASSES, rngs=rngs))


@pytest.mark.parametrize("name", nets.marked(["deinforeg", "bp", "fdg", "al"], ()))
def test_a_block_reads_an_entry_that_others_never_see(name):
    """Through every kind of route, in training and in evaluation."""
    found = {}
    for scale in (1.0, 100.0):
        data = side_batches(scale)
        trainer = nets.build(name, model=side_model(), num_stages=2, example=data[0])
        state, _ = nets.trained(trainer, data, 3)
        found[scale] = nets.weights(trainer, state), trainer.evaluate(state, data)
    (one, scores), (other, others) = found.values()
    assert not nets.same_bits(of_blocks(one, (2,)), of_blocks(other, (2,)))
    assert scores["loss"] != others["loss"]
    if trainer.method.route.local:
        assert nets.same_bits(of_blocks(one, (0, 1)), of_blocks(other, (0, 1)))


@pytest.mark.slow
def test_a_grown_block_reads_what_the_old_ones_never_saw():
    data = side_batches()
    trainer = nets.build("deinforeg", model=first(), example=data[0])
    state, _ = nets.trained(trainer, data, 2)
    before = trainer.evaluate(state, data)
    block = side_model().blocks[2]
    trainer, state = growth.grow(trainer, state, [block])
    state, _ = nets.trained(trainer, data, 2, state)
    after = trainer.evaluate(state, data)
    assert after["exit_1/loss"] == pytest.approx(before["exit_1/loss"])
    assert after["exit_2/loss"] == after["loss"]


def test_entries_that_are_not_there_or_not_for_blocks():
    lacking = functools.partial(nets.build, "bp", model=side_model())
    nets.assert_clear(ValueError, ("block 2", "'more'", "label, x"), lacking)
    block = Joined(25, "label", rngs=nnx.Rngs(0))
    model = jd.Model([whole().blocks[0], block], first().classifier)
    nets.assert_clear(ValueError, ("block 1", "'label'"), lambda: nets.build("bp", model=model))


def test_an_attribute_of_that_name_that_means_something_else():
    block = nnx.Linear(24, 24, rngs=nnx.Rngs(0))
    block.inputs = 24
    trainer = nets.build("bp", model=jd.Model([whole().blocks[0], block], first().classifier))
    assert isinstance(trainer.stages[0], Stage)
