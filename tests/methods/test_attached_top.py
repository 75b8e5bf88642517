"""The last units between every block and its head: a simulation, lateness, refusals."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
import token_nets
from flax import nnx

import jdecouple as jd

DEPTH, STEPS = 4, 6


def trainer(name: str = "greedy_exit", attached: int = 2, **options: Any) -> jd.Trainer:
    """Four dense blocks of one width."""
    example = options.pop("example", None) or nets.batches(1)[0]
    net = options.pop("net", None) or nets.mlp(
        depth=DEPTH, param_dtype=jnp.float64, activation="tanh"
    )
    method = nets.method(name, attached=attached)
    return jd.Trainer(net, method, jd.optim.sgd(0.1), example=example, **options)


def weights(arrays: dict[str, np.ndarray], prefix: str) -> list[np.ndarray]:
    return [arrays[f"{prefix}/{part}"] for part in ("kernel", "bias")]


@functools.cache
def states(count: int) -> list[dict[str, np.ndarray]]:
    """Arrays before every batch, and behind the last; two devices for four blocks."""
    each = trainer(mesh=jd.make_mesh(count))
    state = each.init()
    found = [nets.to_arrays(each, state)]
    for step in range(STEPS):
        state, _ = each.step(state, nets.batches()[step % 4])
        found.append(nets.to_arrays(each, state))
    return found


@pytest.mark.parametrize("count", [1, 2])
def test_copies_are_as_late_as_blocks_lie_between(count, x64):
    """Of the unit in block 3: one batch late in block 2, two in block 1, three in block 0."""
    arrays = states(count)
    followed = {0: (2, 3), 1: (2, 3), 2: (3,)}
    for block, units in followed.items():
        for place, unit in enumerate(units):
            for step in range(STEPS + 1):
                copy = f"block_{block}/stats/head/front/layers/{place}/layers/0"
                then = arrays[max(0, step - (unit - block))]
                model = weights(then, f"block_{unit}/params/block/layers/0")
                for ours, theirs in zip(weights(arrays[step], copy), model, strict=True):
                    assert np.array_equal(ours, theirs), (block, unit, step)
    assert not any("block_3/stats" in name for name in arrays[0])
    moved = "block_3/params/block/layers/0/kernel"
    assert not np.array_equal(arrays[0][moved], arrays[1][moved])


def test_a_step_is_that_of_the_loss_behind_the_copies(x64):
    """Against JAX's gradient of the net as it is written down."""
    before, after = states(1)[2:4]
    batch = nets.batches()[2]
    x, labels = jnp.asarray(batch["x"], jnp.float64), batch["label"]
    for block in range(DEPTH):
        own = f"block_{block}/params"
        first = f"{own}/block/layers/{0 if block else 1}"
        names = [name for name in before if name.startswith(own + "/")]

        def loss(params, block=block, first=first, x=x):
            h = jnp.tanh(x @ params[f"{first}/kernel"] + params[f"{first}/bias"])
            for place in range(min(2, DEPTH - 1 - block)):
                copy = f"block_{block}/stats/head/front/layers/{place}/layers/0"
                kernel, bias = weights(before, copy)
                h = jnp.tanh(h @ kernel + bias)
            (kernel,) = (params[n] for n in params if "/head/" in n and n.endswith("kernel"))
            (bias,) = (params[n] for n in params if "/head/" in n and n.endswith("bias"))
            chances = jax.nn.log_softmax(h @ kernel + bias)
            return -jnp.mean(chances[jnp.arange(len(labels)), labels])

        params = {name: jnp.asarray(before[name]) for name in names}
        gradients = jax.grad(loss)(params)
        for name in names:
            wanted = before[name] - 0.1 * gradients[name]
            np.testing.assert_allclose(after[name], wanted, rtol=0, atol=1e-12, err_msg=name)
        kernel, bias = weights(before, first)
        x = jnp.tanh(x @ kernel + bias)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["greedy_exit", "dgl", "deinforeg"])
def test_placement_and_restarts_change_nothing_for_tokens(name, x64):
    data = token_nets.batches()
    net = token_nets.model(depth=3, cut=(0, 2, 3), param_dtype=jnp.float64)
    found = []
    for stages in (1, 3):
        method = token_nets.method(name, attached=1)
        each = jd.Trainer(
            net, method, jd.optim.sgd(0.1), mesh=jd.make_mesh(stages), example=data[0]
        )
        state, _ = nets.trained(each, data, 4)
        found.append(nets.to_arrays(each, state))
    assert nets.largest_error(*found) < 1e-12
    state, _ = nets.trained(each, data, 2)
    state, _ = nets.trained(each, data[2:], 2, each.from_arrays(2, nets.to_arrays(each, state)))
    assert nets.same_bits(nets.to_arrays(each, state), found[1])


def test_refused():
    for name, words in (
        ("bp", ("attached is 2", "bp is not local")),
        ("man", ("attached is 2", "man has auxiliary nets of its own")),
        ("auglocal", ("attached is 2", "auglocal has auxiliary")),
    ):
        nets.assert_clear(ValueError, words, lambda name=name: nets.method(name, attached=2))
    words = "attached is -1", "at least 0"
    nets.assert_clear(ValueError, words, lambda: nets.method("dgl", attached=-1))
    assert "attached" in jd.methods.arguments("dgl")
    assert not any("attached" in jd.methods.arguments(name) for name in ("bp", "man", "fdg"))
    words = "AssociatedLearning has an answer that comes down", "in front"
    net = nets.mlp(depth=DEPTH)
    nets.assert_clear(ValueError, words, lambda: trainer("al", net=net))
    words = "attached is 2, whose weights frozen blocks", "frozen 1"
    nets.assert_clear(ValueError, words, lambda: trainer(net=net, frozen=(1,)))
    images = {"blocks": "4|6|8", "image_size": 8, "channels": 1, "rngs": nnx.Rngs(0)}
    net = jd.models.vgg(nets.CLASSES, **images)
    words = "attached is 1: the last units fail on what block 0 gives, float32", "8, 8, 4"
    nets.assert_clear(
        ValueError, words, lambda: trainer("dgl", 1, net=net, example=nets.images(1)[0])
    )
