"""Activations of language models, and where they begin.

Between their blocks goes a dict

- "h": `[batch, length, width]`;
- "begins": `[batch, length]`, 1 at the token that begins a document, which is token 0, and else 0,
  in the dtype of "h".

No position sees a later one, nor one of an earlier document: so a document's states are the same
whatever stands before and behind it. Token 0 is the padding behind the last document as well.
"""

import itertools
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jdecouple._errors import require_int
from jdecouple.models import layers
from jdecouple.models.cuts import Splits
from jdecouple.models.sequence import dropout_layer, embedding_init, require_ids

Tokens = dict[str, jax.Array]
BOUNDARY = 0


class Stepping(Protocol):
    """A block that also takes one token after another, of a single document each row.

    It may have a method `skip(x, known, position)`, which gives what `advance` knows without its
    output: for tokens that left at an exit below, of which `x` are the states there.
    """

    def begin(self, batch: int, length: int, dtype: Any) -> Any:
        """What it knows before the first of at most `length` tokens."""

    def advance(self, x: jax.Array, known: Any, position: jax.Array) -> tuple[jax.Array, Any]:
        """Its output `[batch, width]` for one token, and what it knows then."""


def states(x: Any) -> Any:
    """The states of what goes between blocks, or their shape; what is given if it has no "h"."""
    return x["h"] if isinstance(x, Mapping) and "h" in x else x


def beginnings(begins: jax.Array) -> jax.Array:
    """The position at which the document of every position begins, int `[batch, length]`."""
    places = jnp.where(begins > 0, jnp.arange(begins.shape[1]), 0)
    return jax.lax.cummax(places, axis=1)


class TokenEmbedding(nnx.Module):
    """Tokens to vectors of width `features`.

    Args:
        vocabulary_size: Number of tokens.
        features: Width of the vectors.
        context: Most tokens of a row.
        positions: Whether a learned vector is added for every position in a document.
        drop: Rate of dropout on the vectors.
        init: "torch" and "he_out": vectors are drawn from N(0, 1); "flax" and "he": from
            N(0, 1/features).
    """

    is_embedding: ClassVar[bool] = True

    def __init__(
        self,
        vocabulary_size: int,
        features: int,
        *,
        context: int,
        positions: bool = False,
        drop: float = 0.0,
        init: str = "flax",
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        require_int(1, vocabulary_size=vocabulary_size, context=context)
        draw = embedding_init(init, features)
        self.context = context
        self.table = nnx.Param(draw(rngs.params(), (vocabulary_size, features), param_dtype))
        shape = context, features
        self.positions = nnx.Param(draw(rngs.params(), shape, param_dtype)) if positions else None
        self.drop = dropout_layer(drop, rngs)

    def __call__(self, x: jax.Array) -> Tokens:
        """Vectors of the tokens `x`, int `[batch, length]`, `length <= context`."""
        require_ids(x)
        if x.shape[1] > self.context:
            raise ValueError(f"a row has {x.shape[1]} tokens, the context is {self.context}")
        h = jnp.take(self.table[...], x, axis=0)  # nan for tokens that the table does not have
        begins = (x == BOUNDARY).astype(h.dtype)
        if self.positions is not None:
            within = jnp.arange(x.shape[1]) - beginnings(begins)
            h = h + jnp.take(self.positions[...], within, axis=0)
        return {"h": self.drop(h), "begins": begins}

    def begin(self, batch: int, length: int, dtype: Any) -> tuple:
        """Nothing."""
        return ()

    def advance(self, x: jax.Array, known: tuple, position: jax.Array) -> tuple[jax.Array, tuple]:
        """Vectors `[batch, width]` of tokens, int `[batch]`, at a position."""
        h = jnp.take(self.table[...], x, axis=0)
        if self.positions is not None:
            h = h + self.positions[...][position]
        return h, known


def even_splits(depth: int) -> Splits:
    """Splits "even" of an embedding block and `depth` others: parts of equally many others.

    Where K does not divide their number, the last parts have one more. The first part has the
    embedding as well.

    >>> even_splits(4)["even"]
    {2: (3,), 3: (2, 3), 4: (2, 3, 4)}
    """
    cuts = {}
    for k in range(2, depth + 1):
        small, more = divmod(depth, k)
        sizes = [small + (i >= k - more) for i in range(k)]
        cuts[k] = tuple(1 + end for end in itertools.accumulate(sizes[:-1]))
    return {"even": cuts} if cuts else {}


class TiedReadout(nnx.Module):
    """Products with the vectors of an embedding block, whose table it shares."""

    def __init__(self, embedding: "TokenEmbedding | TiedReadout"):
        self.table: nnx.Param = embedding.table

    def __call__(self, h: jax.Array) -> jax.Array:
        """Logits `[..., tokens]` of states `[..., width]`."""
        return h @ self.table[...].T


def token_classifier(
    hidden: int, num_classes: int, tied: TokenEmbedding | None, **options: Any
) -> nnx.Module:
    """States, LayerNorm, dense without bias, `tied` to an embedding or free: logits of a token."""
    norm = layers.LayerNorm(hidden, param_dtype=options["param_dtype"])
    if tied is not None:
        return nnx.Sequential(states, norm, TiedReadout(tied))
    readout = layers.linear(hidden, num_classes, use_bias=False, **options)
    return nnx.Sequential(states, norm, readout)
