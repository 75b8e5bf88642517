"""A message that crosses between processes as one array arrives bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdecouple.pipeline import Seat
from jdecouple.pipeline.packing import packed, packer, unpack

MESSAGES = {
    "activations": {"x": ("float32", (4, 3)), "label": ("int32", ())},
    "half precision": {"x": ("bfloat16", (2, 5)), "label": ("int32", ()), "mask": ("bool", (3,))},
    "double precision": {"x": ("float64", (3,)), "label": ("int32", ()), "y": ("uint8", (5, 1))},
    "nested": {"x": {"h": ("float32", (2,)), "c": ("float32", ())}, "label": ("int64", ())},
}


def message(kinds: dict, *, lead: tuple[int, ...]) -> dict:
    """Random bits, not-a-numbers among them."""
    rng = np.random.default_rng(0)

    def fill(kind: tuple) -> jax.Array:
        dtype, shape = kind
        size = (*lead, *shape)
        if dtype == "bool":
            return jnp.asarray(rng.integers(0, 2, size), bool)
        count = int(np.prod(size)) * jnp.dtype(dtype).itemsize
        return jnp.asarray(np.frombuffer(rng.bytes(count), jnp.dtype(dtype)).reshape(size))

    return jax.tree.map(fill, kinds, is_leaf=lambda each: isinstance(each, tuple))


@pytest.mark.parametrize("stacked", [False, True], ids=["one batch", "stacked batches"])
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("name", MESSAGES)
def test_bits_arrive(name, devices, stacked, x64):
    sender, receiver = (
        Seat.on(tuple(jax.devices()[first : first + devices])) for first in (0, devices)
    )
    if stacked:
        sender, receiver = sender.stacked, receiver.stacked
    sent = sender.place(message(MESSAGES[name], lead=(3, 8) if stacked else (8,)))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), sent)
    array = packer(sender)(sent)
    wanted = packed(shapes, sender.axis)
    assert (array.shape, array.dtype) == (wanted.shape, wanted.dtype)
    assert array.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(sent))
    moved = jax.device_put(array, receiver.sharding(array))
    found = unpack(moved, shapes, receiver)
    assert jax.tree.structure(found) == jax.tree.structure(sent)
    for here, there in zip(jax.tree.leaves(found), jax.tree.leaves(sent), strict=True):
        assert (here.shape, here.dtype) == (there.shape, there.dtype)
        assert here.sharding.is_equivalent_to(receiver.sharding(there), here.ndim)
        assert np.asarray(here).tobytes() == np.asarray(there).tobytes()


def test_what_is_no_row_an_example_stays_apart():
    batched = jax.ShapeDtypeStruct((8, 2), jnp.float32)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    assert packed(scalar, 0) is None
    assert packed({"x": batched}, 0) is None
    assert packed({"x": batched, "loss": scalar}, 0) is None
    assert packed({"x": batched, "y": batched}, 0).shape == (8, 4)
