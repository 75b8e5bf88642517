"""MAN: a simulation in NumPy, what follows which unit, where it runs, and what is refused."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
import token_nets
from flax import nnx

import jdecouple as jd
from jdecouple.methods.objectives import MomentumNet

RATE, MOMENTUM, WIDTH, DEPTH, STEPS = 0.3, 0.7, 6, 3, 5
FRONT = "head/front"


def model(width: int = WIDTH, param_dtype: Any = jnp.float64) -> jd.Model:
    """Dense blocks with tanh."""
    sizes, options = [nets.FEATURES, *DEPTH * [width]], {"param_dtype": param_dtype}
    rngs = nnx.Rngs(0)
    blocks = [
        nnx.Sequential(nnx.Linear(a, b, rngs=rngs, **options), nnx.tanh)
        for a, b in itertools.pairwise(sizes)
    ]
    return jd.Model(blocks, nnx.Linear(width, nets.CLASSES, rngs=rngs, **options))


def trainer(net: Any = None, **options: Any) -> jd.Trainer:
    arguments = {"aux": "linear", "ema_decay": MOMENTUM, **options.pop("arguments", {})}
    method = jd.methods.get("man", **arguments)
    options = {"example": nets.batches(1)[0], **options}
    return jd.Trainer(net or model(), method, jd.optim.sgd(RATE), **options)


# --- A simulation ---------------------------------------------------------------------------


def dense(layer: dict, x: np.ndarray) -> np.ndarray:
    return x @ layer["kernel"] + layer["bias"]


def dense_gradient(layer: dict, x: np.ndarray, error: np.ndarray) -> tuple[dict, np.ndarray]:
    return {"kernel": x.T @ error, "bias": error.sum(0)}, error @ layer["kernel"].T


def simulate(
    arrays: dict[str, np.ndarray], data: list[dict], scaled: bool
) -> dict[str, np.ndarray]:
    """All weights after five batches, from the first ones by name."""
    arrays = dict(arrays)

    def layer(name: str) -> dict:
        return {part: arrays[f"{name}/{part}"] for part in ("kernel", "bias")}

    for step in range(STEPS):
        x, labels = data[step % len(data)].values()
        old = dict(arrays)  # what all blocks have in this batch
        for k in range(DEPTH):
            params, stats = f"block_{k}/params", f"block_{k}/stats"
            block = f"{params}/block/layers/0"
            h = np.tanh(dense(layer(block), x))
            moved: dict[str, Any] = {}
            if k < DEPTH - 1:
                bias, readout = (
                    f"{params}/{FRONT}/learned/layers/0",
                    f"{params}/head/head/readout/layers/1",
                )
                average = f"{stats}/{FRONT}/followed/layers/0"
                s = arrays[f"{params}/{FRONT}/scale"] if scaled else 1.0
                b, a = np.tanh(dense(layer(bias), h)), np.tanh(dense(layer(average), h))
                y = s * b + (2 - s) * a
            else:
                y, readout = h, f"{params}/head/classifier"
            logits = dense(layer(readout), y)
            chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            error = (chances - np.eye(nets.CLASSES)[labels]) / len(labels)
            moved[readout], error = dense_gradient(layer(readout), y, error)
            if k < DEPTH - 1:
                if scaled:
                    arrays[f"{params}/{FRONT}/scale"] = s - RATE * (error * (b - a)).sum()
                moved[bias], into = dense_gradient(layer(bias), h, s * error * (1 - b**2))
                _, through = dense_gradient(layer(average), h, (2 - s) * error * (1 - a**2))
                error = into + through
            moved[block], _ = dense_gradient(layer(block), x, error * (1 - h**2))
            for name, gradient in moved.items():
                for part, value in gradient.items():
                    arrays[f"{name}/{part}"] = arrays[f"{name}/{part}"] - RATE * value
            if k < DEPTH - 1:
                for part in ("kernel", "bias"):
                    now = old[f"block_{k + 1}/params/block/layers/0/{part}"]
                    was = arrays[f"{average}/{part}"]
                    arrays[f"{average}/{part}"] = MOMENTUM * was + (1 - MOMENTUM) * now
            x = h
    return arrays


@pytest.mark.parametrize(
    ("scaled", "options"),
    [
        (True, {"mesh": 3}),
        pytest.param(True, {"num_stages": 1}, marks=pytest.mark.slow),
        *(
            pytest.param(False, options, marks=pytest.mark.slow)
            for options in ({"num_stages": 1}, {"mesh": 3}, {"num_stages": 2, "fuse": False})
        ),
    ],
)
def test_a_simulation(scaled, options, x64):
    options = {**options}
    if "mesh" in options:
        options["mesh"] = jd.make_mesh(options["mesh"])
    data = nets.batches(2, dtype=np.float64)
    each = trainer(arguments={"scaled": scaled}, example=data[0], **options)
    state = each.init()
    wanted = simulate(nets.to_arrays(each, state), data, scaled)
    state, _ = nets.trained(each, data, STEPS, state)
    found = nets.to_arrays(each, state)
    assert sum("followed" in name for name in found) == 4
    assert nets.largest_error(found, wanted) < 1e-12


# --- What follows what ----------------------------------------------------------------------


def test_the_first_unit_of_the_next_module_is_followed():
    """Convolutions, scales and biases; statistics of BatchNorm are the copy's own."""
    net = jd.models.resnet(
        5, depth=14, width=0.25, image_size=8, channels=1, cut=(0, 3, 5), rngs=nnx.Rngs(0)
    )
    each = trainer(net, example=nets.images(1)[0], num_stages=1)
    state = each.init()
    before = nets.to_arrays(each, state)
    state, _ = nets.trained(each, nets.images(1), 1, state)
    after = nets.to_arrays(each, state)
    for k in (0, 1):
        prefix = f"block_{k}/stats/{FRONT}/followed/"
        names = [name for name in before if name.startswith(prefix)]
        own = [name for name in names if name.endswith(("mean", "var"))]
        assert (len(names), len(own)) == (10, 4)
        for name in names:
            source = f"block_{k + 1}/params/block/layers/0/" + name.removeprefix(prefix)
            if name in own:
                assert source not in before
                assert not np.array_equal(before[name], after[name])
                continue
            moved = MOMENTUM * before[name] + (1 - MOMENTUM) * before[source]
            np.testing.assert_allclose(after[name], moved, rtol=1e-6, atol=1e-7)
        kernel = "layers/0/branch/layers/0/kernel"
        three = [
            before[prefix + kernel],
            before[f"block_{k + 1}/params/block/layers/0/{kernel}"],
            before[f"block_{k}/params/{FRONT}/learned/{kernel}"],
        ]
        assert len({array.tobytes() for array in three}) == 3  # each drawn for itself


@pytest.mark.parametrize("kind", nets.marked(("gpt", "lstm_lm"), ()))
def test_layers_of_tokens_are_followed(kind):
    """Both copies read whole rows; their states are added, documents begin where they did."""
    net, example = token_nets.model(kind), token_nets.batches(1)[0]
    each = trainer(net, example=example, arguments={"aux": "norm"}, num_stages=1)
    front = each.heads(each.init())[0].front
    assert type(front.followed) is type(front.learned) is type(net.blocks[1])
    assert not jax.tree.leaves(nnx.state(front.followed, nnx.Param))

    @jax.jit
    def run(ids: jax.Array) -> Any:
        x = net.blocks[0](ids)
        return x, front(x), front.learned(x)["h"] + front.followed(x)["h"]

    x, y, total = run(example["x"])
    np.testing.assert_allclose(y["h"], total, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(y["begins"], x["begins"])


@pytest.mark.slow
def test_averages_keep_their_dtype_in_half_precision():
    each = trainer(model(param_dtype=jnp.float32), dtype=jnp.bfloat16, num_stages=1)
    state = each.init()
    before = nets.to_arrays(each, state)
    state, _ = nets.trained(each, nets.batches(1), 1, state)
    after = nets.to_arrays(each, state)
    name = f"block_0/stats/{FRONT}/followed/layers/0/kernel"
    now = before["block_1/params/block/layers/0/kernel"]
    moved = MOMENTUM * before[name] + (1 - MOMENTUM) * now
    assert after[name].dtype == np.float32
    np.testing.assert_allclose(after[name], moved, rtol=1e-6)


@pytest.mark.slow
def test_large_stages_on_devices_of_their_own():
    """Whose arrays are not joined: what is handed down is not what the next call gives away."""
    found = []
    for devices in (1, 3):
        each = trainer(
            model(300, jnp.float32),
            mesh=jd.make_mesh(3, devices=jax.devices()[:devices]),
            fuse=False,
        )
        found.append(nets.to_arrays(each, nets.trained(each, nets.batches(2), 4)[0]))
    assert nets.same_bits(*found)


@pytest.mark.slow
def test_replicas_have_the_same_averages(x64):
    data = nets.batches(2, dtype=np.float64)
    found = []
    for mesh in (jd.make_mesh(1), jd.make_mesh(3, 2)):
        each = trainer(example=data[0], mesh=mesh)
        found.append(nets.to_arrays(each, nets.trained(each, data, 3)[0]))
    assert nets.largest_error(*found) < 1e-12


def test_microbatches_move_the_averages_once(x64):
    data = nets.batches(1, dtype=np.float64)
    each = trainer(example=data[0], num_stages=1, microbatches=2)
    state = each.init()
    before = nets.to_arrays(each, state)
    after = nets.to_arrays(each, nets.trained(each, data, 1, state)[0])
    name = f"block_0/stats/{FRONT}/followed/layers/0/kernel"
    now = before["block_1/params/block/layers/0/kernel"]
    moved = MOMENTUM * before[name] + (1 - MOMENTUM) * now
    np.testing.assert_allclose(after[name], moved, rtol=1e-12)


@pytest.mark.slow
def test_a_frozen_block_follows_nothing():
    each = trainer(model(param_dtype=jnp.float32), frozen=(0,), num_stages=2)
    state = each.init()
    before = nets.to_arrays(each, state)
    after = nets.to_arrays(each, nets.trained(each, nets.batches(1), 1, state)[0])
    still = [name for name in before if name.startswith("block_0/")]
    assert nets.same_bits(*({name: x[name] for name in still} for x in (before, after)))
    name = f"block_1/stats/{FRONT}/followed/layers/0/kernel"
    assert not np.array_equal(before[name], after[name])


@pytest.mark.slow
def test_chunks_are_single_steps_where_stages_are_fused(x64):
    data = nets.batches(3, dtype=np.float64)
    each = trainer(example=data[0], num_stages=3, fuse=True, mesh=jd.make_mesh(1))
    wanted = nets.to_arrays(each, nets.trained(each, data, 3)[0])
    state, _ = each.steps(each.init(), data)
    assert nets.largest_error(nets.to_arrays(each, state), wanted) < 1e-12


def test_refused():
    with pytest.raises(ValueError, match=r"ema_decay is 1.0: a number in \[0, 1\)"):
        MomentumNet(ema_decay=1.0)
    net = model(param_dtype=jnp.float32)
    apart = trainer(net, mesh=jd.make_mesh(3))
    words = "a chunk of 2 batches", "man has 3 stages apart"
    nets.assert_clear(ValueError, words, lambda: apart.check_steps(2))
    words = "schedule 'interleaved'", "man follows the weights", "'local'"
    options = {"schedule": "interleaved", "num_stages": 2, "mesh": jd.make_mesh(1)}
    nets.assert_clear(ValueError, words, lambda: trainer(net, **options))
    words = "engine 'spmd'", "heads that follow"
    options = {"engine": "spmd", "mesh": jd.make_mesh(3)}
    nets.assert_clear(ValueError, words, lambda: trainer(net, **options))
