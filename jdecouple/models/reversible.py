"""Blocks whose input is a function of their output, so that nothing of it has to be kept."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jdecouple.models.cuts import Chain


class ReversibleUnit(nnx.Module):
    """Two streams, which are the halves of the last axis: (a, b) becomes (b + branch(a), a).

    It is the residual unit of a reversible net (arXiv 1707.04585) as PETRA has it (2406.02052): one
    branch a unit, and the streams change places, so that the next unit's branch reads the sum.

    Args:
        branch: From one stream to what is added to the other, of the same shape. It must not depend
            on anything but its input, its parameters and its keys of the batch.
    """

    def __init__(self, branch: nnx.Module):
        self.branch = branch

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., 2 n]`, both streams, to the same shape."""
        first, second = streams(x)
        return joined(second + self.branch(first), first)

    def inverse(self, y: jax.Array) -> jax.Array:
        """The input that the output came from, but for rounding."""
        total, first = streams(y)
        return joined(first, total - self.branch(first))


def streams(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both halves of the last axis; ValueError if it has none."""
    if x.shape[-1] % 2:
        raise ValueError(f"two streams have {x.shape[-1]} features: an even number is needed")
    first, second = jnp.split(x, 2, axis=-1)
    return first, second


def joined(first: jax.Array, second: jax.Array) -> jax.Array:
    """Two streams as one array."""
    return jnp.concatenate([first, second], axis=-1)


def is_reversible(block: Any) -> bool:
    """Whether a block has an `inverse`; of consecutive units all must have one.

    >>> unit = ReversibleUnit(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    >>> is_reversible(Chain(unit, unit)), is_reversible(Chain(unit, unit.branch))
    (True, False)
    >>> x = jnp.arange(8.0)
    >>> bool(jnp.allclose(Chain(unit, unit).inverse(unit(unit(x))), x, atol=1e-5))
    True
    """
    if isinstance(block, Chain):
        return all(map(is_reversible, block.layers))
    return callable(getattr(block, "inverse", None))
