"""What training yields depends neither on the stages nor on the devices nor on the fusing.

In float64 the sums that XLA reorders agree to 1e-12; where the compiled stages are the same, the
numbers are the same to the last bit.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
from flax import nnx

import jdecouple as jd

STEPS = 20
TOLERANCE = 1e-12
AUGMENTED = {"augmented": 2, "deep": 4}  # blocks
METHODS = pytest.mark.parametrize(  # test_methods.py has every route on three stages
    "name", nets.marked(jd.methods.names(), ("deinforeg", "fdg"))
)
DROPPING = pytest.mark.parametrize(  # fr draws again where it replays
    "name", nets.marked(jd.methods.names(), ("fr",))
)
LOCAL = nets.LOCAL
ALONE = [name for name in LOCAL if name not in nets.FOLLOWING]


def setting(net: str) -> tuple[jd.Model, list[dict], Any]:
    """Model, batches and augmentation of a net; all have BatchNorm."""
    if net in AUGMENTED:  # on images that are augmented on the device
        depth = AUGMENTED[net]
        model = nets.user_model(64, depth=depth, dropout=0.0, param_dtype=jnp.float64)
        return model, nets.images(), jd.data.augment.get("basic", mean=[0.5], std=[0.25])
    dropout = {"dropout": 0.2, "plain": 0.0}[net]
    model = nets.user_model(depth=2, dropout=dropout, param_dtype=jnp.float64)
    return model, nets.batches(dtype=np.float64), None


@functools.cache
def trained(
    name: str,
    net: str,
    stages: int = 1,
    data: int = 1,
    microbatches: int = 1,
    *,
    devices: int | None = None,
    **options: Any,
) -> tuple:
    """Trainer, state after 20 steps, metrics of every step."""
    with jax.enable_x64(True):
        model, batches, transform = setting(net)
        trainer = jd.Trainer(
            model,
            nets.method(name),
            jd.optim.sgd(0.05, momentum=0.9),
            mesh=jd.make_mesh(stages, data, devices=devices and jax.devices()[:devices]),
            microbatches=microbatches,
            example=batches[0],
            transform=transform,
            **options,
        )
        return trainer, *nets.trained(trainer, batches, STEPS)


def run(*arguments: Any, **options: Any) -> tuple[dict[str, np.ndarray], list[dict[str, float]]]:
    """Arrays of the state after 20 steps, and the metrics of every step."""
    trainer, state, metrics = trained(*arguments, **options)
    return nets.to_arrays(trainer, state), metrics


def assert_close(found: tuple, wanted: tuple) -> None:
    assert nets.largest_error(found[0], wanted[0]) < TOLERANCE
    for here, there in zip(found[1], wanted[1], strict=True):
        # Metrics are float32, and nan before a delayed pipeline is full.
        assert here == pytest.approx(there, rel=2e-6, abs=1e-7, nan_ok=True)


def assert_same(found: tuple, wanted: tuple) -> None:
    assert nets.same_bits(found[0], wanted[0])
    np.testing.assert_equal(found[1], wanted[1])


def on_one_device(name: str, net: str, stages: int) -> tuple:
    """The same training in one call on one device; exact methods need not even have stages."""
    if name in nets.EXACT:
        return run(name, net)
    return run(name, net, stages, devices=1)


@METHODS
def test_twenty_steps_move_blocks_heads_and_statistics(name, x64):
    """What the other tests compare is neither constant nor single precision."""
    arrays, _ = run(name, "augmented")
    assert {key.split("/")[0] for key in arrays} == {f"block_{i}" for i in range(2)}
    model, _, _ = setting("augmented")
    kernel = np.asarray(model.blocks[0].dense.kernel[...])
    moved = arrays["block_0/params/block/dense/kernel"]
    assert moved.dtype == np.float64
    assert np.abs(moved - kernel).max() > 1e-3
    assert np.abs(arrays["block_0/stats/block/norm/mean"]).max() > 1e-3
    assert any(key.startswith("block_1/params/head/") for key in arrays)


@METHODS
@pytest.mark.parametrize(
    ("stages", "data"),
    [
        (2, 2),
        *(pytest.param(*mesh, marks=pytest.mark.slow) for mesh in ((2, 1), (4, 1), (1, 2), (4, 2))),
    ],
)
def test_pipelined_equals_sequential(name, stages, data):
    net = "augmented" if stages <= 2 else "deep"
    assert_close(run(name, net, stages, data), on_one_device(name, net, stages))


@DROPPING
@pytest.mark.parametrize(("stages", "data"), [(2, 1), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_dropout_does_not_tell_the_partition(name, stages, data):
    assert_close(run(name, "dropout", stages, data), on_one_device(name, "dropout", stages))


@pytest.mark.parametrize("name", nets.marked(nets.EXACT, ("greedy_exit",)))
@pytest.mark.parametrize(
    ("stages", "data", "microbatches"),
    [
        (2, 1, 2),
        pytest.param(2, 2, 2, marks=pytest.mark.slow),
        pytest.param(2, 1, 4, marks=pytest.mark.slow),
    ],
)
def test_pipelined_equals_sequential_with_microbatches(name, stages, data, microbatches):
    found = run(name, "plain", stages, data, microbatches)
    assert_close(found, run(name, "plain", 1, 1, microbatches))


@pytest.mark.parametrize("name", nets.marked(jd.methods.names(), ("fr",)))
def test_stages_apart_on_one_device_are_the_same_to_the_bit(name):
    assert_same(run(name, "dropout", 2, devices=1, fuse=False), run(name, "dropout", 2))


@pytest.mark.parametrize("name", nets.marked(jd.methods.names(), ()))
def test_more_stages_than_devices_are_the_same_to_the_bit(name):
    found = run(name, "deep", 4, devices=2)
    assert_same(found, run(name, "deep", 4))


@pytest.mark.slow
@pytest.mark.parametrize("name", nets.marked(jd.methods.names(), ("bp",)))
def test_more_stages_than_devices_fused(name):
    """Two stages on one device become one call."""
    assert_close(run(name, "dropout", 2, devices=1), run(name, "dropout", 2))


@DROPPING
def test_a_run_repeats_to_the_bit(name, x64):
    trainer, state, metrics = trained(name, "dropout", 2)
    _, batches, _ = setting("dropout")
    again, same = nets.trained(trainer, batches, STEPS)
    assert_same((nets.to_arrays(trainer, again), same), (nets.to_arrays(trainer, state), metrics))


def test_another_seed_draws_other_dropout():
    arrays, metrics = run("bp", "dropout", seed=1)
    wanted, before = run("bp", "dropout")
    key = "block_0/params/block/dense/kernel"
    assert np.abs(arrays[key] - wanted[key]).max() > 1e-4
    assert metrics[0]["loss"] != before[0]["loss"]


@pytest.mark.parametrize("name", nets.marked(LOCAL, ("deinforeg",)))
def test_another_seed_draws_other_heads(name):
    """And the same blocks, which are the caller's."""
    (batch,) = nets.batches(1)
    states = []
    for seed in (0, 0, 1):
        trainer = jd.Trainer(
            nets.mlp(), nets.method(name), jd.optim.sgd(0.1), example=batch, seed=seed
        )
        states.append(nets.weights(trainer, trainer.init()))
    first, same, other = states
    assert nets.same_bits(first, same)
    differ = {key for key in first if not np.array_equal(first[key], other[key])}
    assert all("/head/" in key for key in differ)
    given = "block_3/params/head/classifier/"  # where a last head is the caller's classifier alone
    drawn = {key.split("/")[0] for key in first if "/head/" in key and not key.startswith(given)}
    assert {key.split("/")[0] for key in differ} == drawn >= {f"block_{i}" for i in range(3)}


@pytest.mark.slow
def test_augmentation_does_not_tell_the_microbatches(x64):
    """Without BatchNorm the route is exact, so every image must have got its own key."""
    batches = nets.images()
    found = []
    for microbatches in (1, 2):
        model = jd.models.mlp(
            nets.CLASSES,
            image_size=8,
            channels=1,
            hidden=8,
            depth=1,
            param_dtype=jnp.float64,
            rngs=nnx.Rngs(0),
        )
        trainer = jd.Trainer(
            model,
            nets.method("bp"),
            jd.optim.sgd(0.05),
            microbatches=microbatches,
            example=batches[0],
            transform=jd.data.augment.get("basic", mean=[0.5], std=[0.25]),
        )
        state, _ = nets.trained(trainer, batches, STEPS)
        found.append(nets.to_arrays(trainer, state))
    assert nets.largest_error(*found) < TOLERANCE


# --- The synchronous route is exact --------------------------------------------------------


def synchronous(microbatches: int, stages: int = 1) -> dict[str, np.ndarray]:
    """BP without BatchNorm and dropout, in float64."""
    with jax.enable_x64(True):
        batches = nets.batches(dtype=np.float64)
        trainer = jd.Trainer(
            nets.mlp(param_dtype=jnp.float64),
            nets.method("bp"),
            jd.optim.sgd(0.05, momentum=0.9),
            num_stages=stages,
            microbatches=microbatches,
            example=batches[0],
        )
        state, _ = nets.trained(trainer, batches, STEPS)
        return nets.to_arrays(trainer, state)


@pytest.mark.slow  # test_synchronous.py has fast ones
@pytest.mark.parametrize(("microbatches", "stages"), [(2, 1), (4, 2)])
def test_gradient_of_the_microbatches_is_that_of_the_batch(microbatches, stages):
    assert nets.largest_error(synchronous(microbatches, stages), synchronous(1)) < TOLERANCE


def test_synchronous_route_is_backpropagation(x64):
    """Against plain JAX, written out by hand."""
    batches = nets.batches(dtype=np.float64)
    model = nets.mlp(param_dtype=jnp.float64)
    layers = [*(block.layers[-2] for block in model.blocks), model.classifier]
    params = [(layer.kernel[...], layer.bias[...]) for layer in layers]

    @jax.jit
    @jax.grad
    def gradient(params, x, labels):
        for kernel, bias in params[:-1]:
            x = jnp.maximum(x @ kernel + bias, 0)
        kernel, bias = params[-1]
        scores = jax.nn.log_softmax(x @ kernel + bias)
        return -jnp.mean(scores[jnp.arange(len(labels)), labels])

    velocity = jax.tree.map(jnp.zeros_like, params)
    for step in range(STEPS):
        batch = batches[step % len(batches)]
        found = gradient(params, batch["x"], batch["label"])
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, found)
        params = jax.tree.map(lambda p, v: p - 0.05 * v, params, velocity)
    arrays = synchronous(1)
    for index, (kernel, bias) in enumerate(params):
        where = "block_3/params/head/classifier"
        if index < 4:
            where = f"block_{index}/params/block/layers/{1 if index == 0 else 0}"
        assert np.abs(arrays[where + "/kernel"] - kernel).max() < TOLERANCE
        assert np.abs(arrays[where + "/bias"] - bias).max() < TOLERANCE


# --- The local route: no gradient crosses a boundary ----------------------------------------


@pytest.mark.parametrize("name", nets.marked(jd.methods.names(), ("bp", "greedy_exit")))
@pytest.mark.parametrize("stages", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_only_local_methods_ignore_the_block_above(name, stages):
    """Weights of three blocks after five steps, where the last of four differs."""
    batches = nets.batches()
    trainer = jd.Trainer(
        nets.mlp(),
        nets.method(name),
        jd.optim.sgd(0.05, momentum=0.9),
        num_stages=stages,
        mesh=jd.make_mesh(1, devices=jax.devices()[:1]),
        example=batches[0],
    )
    start = nets.to_arrays(trainer, trainer.init())
    kernel = "block_3/params/block/layers/0/kernel"
    ends = []
    for factor in (1, -3):
        state = trainer.from_arrays(0, {**start, kernel: factor * start[kernel]})
        state, _ = nets.trained(trainer, batches, 5, state)
        arrays = nets.weights(trainer, state)
        ends.append({key: leaf for key, leaf in arrays.items() if not key.startswith("block_3/")})
    assert nets.same_bits(*ends) == (name in ALONE)


@dataclasses.dataclass(frozen=True)
class Louder:
    """Another objective with the loss of the last head multiplied."""

    inner: Any
    needs_classifier: bool
    trains_classifier: bool

    def head(self, site: Any, rngs: Any) -> Any:
        head = self.inner.head(site, rngs)
        return Scaled(head) if site.is_last else head

    def front(self, site: Any, rngs: Any) -> Any:
        return self.inner.front(site, rngs) if hasattr(self.inner, "front") else None


class Scaled(nnx.Module):
    def __init__(self, head: Any):
        self.inner = head

    def __call__(self, features: Any, message: Any) -> Any:
        output = self.inner(features, message)
        return output._replace(loss=5 * output.loss)

    def logits(self, features: Any) -> Any:
        return self.inner.logits(features)


def with_louder_last_head(name: str, *, louder: bool) -> dict[str, np.ndarray]:
    batches = nets.batches()
    method = nets.method(name)
    if louder:
        inner = method.objective
        objective = Louder(inner, inner.needs_classifier, inner.trains_classifier)
        method = dataclasses.replace(method, objective=objective)
    trainer = jd.Trainer(
        nets.mlp(depth=2),
        method,
        jd.optim.sgd(0.05),
        num_stages=2,
        mesh=jd.make_mesh(1, devices=jax.devices()[:1]),
        fuse=False,
        example=batches[0],
    )
    state, _ = nets.trained(trainer, batches, 5)
    arrays = nets.weights(trainer, state)
    return {key: value for key, value in arrays.items() if key.startswith("block_0/")}


@pytest.mark.parametrize("name", nets.marked(jd.methods.names(), ()))
def test_only_local_methods_ignore_the_loss_above(name):
    same = nets.same_bits(
        with_louder_last_head(name, louder=True), with_louder_last_head(name, louder=False)
    )
    assert same == (name in ALONE)
