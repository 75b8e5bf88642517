"""A carry that crosses between processes as one array arrives bit for bit."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdecouple.pipeline.transfer import pack, packed, unpack

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
