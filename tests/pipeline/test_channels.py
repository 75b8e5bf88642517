"""What a block hands to a later one by name passes the blocks and stages between them."""

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import nets
import numpy as np
import optax
import pytest
import unets
from flax import nnx

import jdecouple as jd
from jdecouple.models.channels import Alive, alive

pytestmark = pytest.mark.usefixtures("module_x64")
STEPS = 4
LOCAL = [name for name in unets.METHODS if nets.method(name).route.local]
DELAYED = [name for name in unets.METHODS if name in nets.DELAYED]


@functools.cache
def trained(name: str, stages: int = 1, devices: int | None = None, **options: Any) -> tuple:
    """Arrays of the state, metrics of every step, an evaluation."""
    trainer = unets.trainer(name, stages, devices, **options)
    state, metrics = nets.trained(trainer, unets.batches(), STEPS)
    return nets.to_arrays(trainer, state), metrics, trainer.evaluate(state, unets.batches())


def assert_close(found: tuple, wanted: tuple) -> None:
    assert nets.largest_error(found[0], wanted[0]) < 1e-12
    for here, there in zip(found[1], wanted[1], strict=True):
        assert here == pytest.approx(there, rel=2e-6, abs=1e-7, nan_ok=True)
    assert found[2] == pytest.approx(wanted[2], rel=1e-6)


def test_the_channels_of_a_net():
    first, *_, last = alive(unets.model().blocks)
    assert first == Alive((), ("ink", "skip_0"))
    assert last == Alive(("ink", "skip_0"), ())
    assert [len(each.before) for each in alive(unets.model().blocks)] == [0, 2, 3, 3, 2]
    assert [*alive(unets.model().cut((0, 2, 3)).blocks)][1] == alive(unets.model().blocks)[2]
    assert alive(unets.model().cut(1).blocks) == [Alive()]


def test_gradients_through_skips_are_those_of_plain_jax():
    """Of the model called block by block, against three stages; every weight moves."""
    model, (batch, *_) = unets.model(), unets.batches()
    whole = nnx.List([*model.blocks, model.classifier])

    @nnx.jit
    def gradient(whole: nnx.List) -> Any:
        def loss(whole: nnx.List) -> jax.Array:
            x, known = batch["x"], {}
            for block in whole[:-1]:
                x = block(x, **{name: known[name] for name in getattr(block, "inputs", ())})
                if hasattr(block, "outputs"):
                    x, more = x
                    known |= more
            logits = whole[-1](x).reshape(-1, unets.LEVELS)
            labels = jnp.asarray(batch["label"]).reshape(-1)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return nnx.grad(loss)(whole)

    wanted = [*map(np.asarray, jax.tree.leaves(gradient(whole)))]
    options = {"optimizer": optax.sgd(1.0), "schedule": "1f1b", "microbatches": 2}
    trainer = unets.trainer("bp", 3, model=model, **options)
    state, _ = trainer.step(trainer.init(), batch)
    after = jax.tree.leaves(nnx.state(nnx.List(trainer.modules(state)), nnx.Param))
    before = jax.tree.leaves(nnx.state(whole, nnx.Param))
    assert min(np.abs(each).max() for each in wanted) > 1e-4
    for old, new, each in zip(before, after, wanted, strict=True):
        np.testing.assert_allclose(old - new, each, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("stages", "schedule"), nets.SYNCHRONOUS)
def test_every_synchronous_schedule_trains_as_one_program(stages, schedule):
    """An exit at every block has losses at several resolutions, too."""
    found = trained("early_exit", stages, microbatches=2, schedule=schedule)
    assert_close(found, trained("early_exit", microbatches=2))


@pytest.mark.parametrize("name", nets.marked(("bp", *LOCAL), ("dgl",)))
@pytest.mark.parametrize("stages", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_stages_train_as_one_program(name, stages):
    assert_close(trained(name, stages), trained(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", DELAYED)
def test_delayed_stages_on_devices_of_their_own(name):
    assert_close(trained(name, 3), trained(name, 3, 1))


@functools.cache
def momentum(name: str, stages: int) -> dict[str, np.ndarray]:
    """After five batches and draining, at a vanishing learning rate."""
    optimizer = jd.optim.sgd(1e-200, momentum=0.9)
    trainer = unets.trainer(name, stages, 1, optimizer=optimizer)
    state, _ = nets.trained(trainer, unets.batches(), 5)
    arrays = nets.to_arrays(trainer, trainer.finish(state))
    return {key: leaf for key, leaf in arrays.items() if "trace" in key}


@pytest.mark.parametrize(
    "name", nets.marked([n for n in DELAYED if n not in ("adl", "2bw")], ("fdg",))
)
def test_late_skips_meet_their_own_batch(name):
    """Where weights stand still, every gradient is backpropagation's; batches differ."""
    assert nets.largest_error(momentum(name, 3), momentum("bp", 1)) < 1e-12


@pytest.mark.slow
def test_a_local_module_hands_on_values_and_gets_no_gradient():
    """What is behind the first module changes nothing in it."""
    ends = []
    for factor in (1, -3):
        trainer = unets.trainer("dgl", 3)
        start = nets.to_arrays(trainer, trainer.init())
        kernel = "block_4/params/block/pixels/kernel"
        state = trainer.from_arrays(0, {**start, kernel: factor * start[kernel]})
        state, _ = nets.trained(trainer, unets.batches(), 2, state)
        arrays = nets.weights(trainer, state)
        ends.append({key: leaf for key, leaf in arrays.items() if not key.startswith("block_4/")})
    assert nets.same_bits(*ends)


@pytest.mark.slow
def test_a_cut_into_modules_changes_no_number():
    """Skips inside a module, and from one to another, under bp."""
    wanted = [*trained("bp")[0].values()]
    for cut in ((0, 2, 4), (0, 1), (0,)):
        found = trained("bp", model=unets.model().cut(cut), num_stages=1, boundaries=None)
        assert sorted(map(np.shape, found[0].values())) == sorted(map(np.shape, wanted))
        losses = [[row["loss"] for row in metrics] for metrics in (found[1], trained("bp")[1])]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bp", "dgl", "fdg"])
def test_rounded_messages_and_half_precision(name):
    """Masks go as they are; the loss falls all the same."""
    for options in ({"wire": "int8"}, {"dtype": jnp.bfloat16}):
        _, metrics, found = trained(name, 3, **options)
        assert np.isfinite(found["loss"])
        assert metrics[-1]["loss"] == pytest.approx(trained(name, 3)[1][-1]["loss"], rel=0.02)


class Begin(nnx.Module):
    """Hands on how long its input is, and a whole number."""

    outputs: ClassVar[tuple[str, ...]] = ("length", "count")

    def __init__(self, rngs: nnx.Rngs):
        self.dense = nnx.Linear(nets.FEATURES, 6, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, x: jax.Array) -> Any:
        more = {"length": jnp.abs(self.dense(x)), "count": jnp.sum(x > 0, axis=1)}
        return nnx.tanh(self.dense(x)), more


class Go(nnx.Module):
    """Reads both."""

    inputs: ClassVar[tuple[str, ...]] = ("length", "count")

    def __init__(self, rngs: nnx.Rngs):
        self.dense = nnx.Linear(6, 6, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, x: jax.Array, length: jax.Array, count: jax.Array) -> jax.Array:
        return nnx.tanh(self.dense(x) * length + count[:, None] / 10)


def chain(*more: nnx.Module) -> jd.Model:
    rngs = nnx.Rngs(0)
    classifier = nnx.Linear(6, nets.CLASSES, param_dtype=jnp.float64, rngs=rngs)
    return jd.Model([Begin(rngs), *(Go(rngs) for _ in range(3)), *more], classifier)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bp", "greedy_exit"])
def test_one_program_for_all_stages(name):
    """The SPMD engine takes what all equal blocks read."""
    found = []
    for stages, engine in ((1, "mpmd"), (4, "spmd")):
        data = nets.batches(dtype=np.float64)
        trainer = jd.Trainer(
            chain(),
            nets.method(name),
            jd.optim.sgd(0.1),
            mesh=jd.make_mesh(stages),
            engine=engine,
            example=data[0],
        )
        state, _ = nets.trained(trainer, data, STEPS)
        found.append(nets.to_arrays(trainer, state))
    assert nets.largest_error(*found) < 1e-12


class Returns(nnx.Module):
    """Returns what it is told."""

    outputs: ClassVar[tuple[str, ...]] = ("more",)

    def __init__(self, more: Any):
        self.more = nnx.data(more)

    def __call__(self, x: jax.Array) -> Any:
        return x if self.more is None else (x, dict.fromkeys(self.more, x))


class Reads(Returns):
    """Reads what nobody hands on."""

    inputs: ClassVar[str] = "nothing"
    outputs: ClassVar[tuple[str, ...]] = ()


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (Returns(None), "block 4 (Returns) fails|it returns|(x, {more})"),
        (Returns(["other"]), "it returns entries other|(x, {more})"),
        (Reads(None), "block 4 (Reads) reads 'nothing'|no block before hands it on"),
    ],
)
def test_refused(block, words):
    data = nets.batches(1, dtype=np.float64)[0]
    arguments = chain(block), nets.method("bp"), jd.optim.sgd(0.1)
    nets.assert_clear(ValueError, words.split("|"), lambda: jd.Trainer(*arguments, example=data))


@pytest.mark.parametrize("name", unets.ANEW)
def test_methods_that_make_a_block_anew_refuse_skips(name):
    words = ["skip_1"] if name != "lopt" else ["block 1", "lopt needs", "skip_0"]
    nets.assert_clear(ValueError, words, lambda: unets.trainer(name, 1))


def test_names_that_are_taken():
    for name, words in (
        ("loss", "block 0 names 'loss' in its outputs"),
        ("id", "block 0 hands on 'id', which the batch has"),
    ):
        block = Returns([name])
        block.outputs = (name,)
        data = {**nets.batches(1)[0], "id": np.zeros(16, np.int32)}
        with pytest.raises(ValueError, match=words):
            jd.Trainer(
                jd.Model([block, *nets.mlp().blocks], nets.mlp().classifier),
                nets.method("bp"),
                jd.optim.sgd(0.1),
                example=data,
            )
