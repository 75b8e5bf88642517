"""A carry that crosses between processes as one array arrives bit for bit."""

import chex
import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest

import jdecouple as jd
from jdecouple.pipeline.mpmd import executor, messages
from jdecouple.pipeline.transfer import pack, packed, transfer, unpack

BATCH = 8
CARRIES = {
    "activations": {"x": ("float32", (4, 3)), "label": ("int32", ())},
    "half precision": {"x": ("bfloat16", (2, 5)), "label": ("int32", ()), "mask": ("bool", (3,))},
    "double precision": {"x": ("float64", (3,)), "label": ("int32", ()), "y": ("uint8", (5, 1))},
    "nested": {"x": {"h": ("float32", (2,)), "c": ("float32", ())}, "label": ("int64", ())},
    "an error": ("float32", (2, 2)),
}


def carry(kinds: dict) -> dict:
    """Random bits, not-a-numbers among them."""
    rng = np.random.default_rng(0)

    def fill(kind: tuple) -> jax.Array:
        dtype, shape = kind
        size = (BATCH, *shape)
        if dtype == "bool":
            return jnp.asarray(rng.integers(0, 2, size), bool)
        count = int(np.prod(size)) * jnp.dtype(dtype).itemsize
        return jnp.asarray(np.frombuffer(rng.bytes(count), jnp.dtype(dtype)).reshape(size))

    return jax.tree.map(fill, kinds, is_leaf=lambda each: isinstance(each, tuple))


@pytest.mark.parametrize("name", CARRIES)
def test_bits_arrive(name, x64):
    sent = carry(CARRIES[name])
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), sent)
    array = jax.jit(pack)(sent)
    assert (array.shape, array.dtype) == (packed(shapes).shape, packed(shapes).dtype)
    assert array.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(sent))
    found = jax.jit(lambda array: unpack(array, shapes))(array)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, sent)
    bits = [[np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(x)] for x in (found, sent)]
    assert bits[0] == bits[1]


@pytest.mark.parametrize("name", ["bp", "deinforeg"])
def test_small_carries_go_to_another_device_as_one_array(name, monkeypatch):
    """To the bit as single arrays, errors and the sum of losses too."""
    found, sent = [], []
    for limit in (0, messages.MESSAGE_BYTES):
        counts: list[int] = []

        def spy(tree, *arguments, counts=counts):
            counts.append(len(jax.tree.leaves(tree)))
            return transfer(tree, *arguments)

        monkeypatch.setattr(messages, "MESSAGE_BYTES", limit)
        monkeypatch.setattr(executor, "transfer", spy)
        own = nets.build(name, model=nets.mlp(depth=2), num_stages=2, mesh=jd.make_mesh(2))
        state, metrics = nets.trained(own, nets.batches(), 3)
        found.append(nets.to_arrays(own, state) | {"loss": np.array(metrics[-1]["loss"])})
        sent.append(counts)
    single, joined = sent
    assert len(single) == len(joined) > 0
    assert {*joined} == {1}
    assert max(single) > 1
    assert nets.same_bits(*found)
