"""Activations that are sequences: what they hold, how heads read them, and where they begin.

Between the blocks of text models and of the ViT goes a dict

- "h": `[batch, length, width]`, 0 at padding;
- "mask": `[batch, length]`, 1 at what counts and 0 at padding, in the dtype of "h";
- "summary": `[batch, width]`, what represents the sequence. Heads and the classifier read it, the
  next block does not.

The mask is no integer, so that a vector-Jacobian product of the whole dict is one of arrays of
floats; its gradient is always zero.
"""

from collections.abc import Mapping
from numbers import Real
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jdecouple.models import layers

Sequence = dict[str, jax.Array]


def pooled(features: Any) -> Any:
    """The one array of features that a head reads: the summary of a sequence, else all of them.

    Args:
        features: A block's output, or its shapes.
    """
    is_sequence = isinstance(features, Mapping) and "summary" in features
    return features["summary"] if is_sequence else features


def keep(h: jax.Array, mask: jax.Array) -> jax.Array:
    """`h` `[batch, length, width]` where `mask` `[batch, length]` is set, elsewhere 0."""
    return jnp.where(mask[..., None] > 0, h, 0)


def read(x: Sequence) -> tuple[jax.Array, jax.Array]:
    """States and mask of a sequence; nothing behind the mask gets through."""
    mask = jax.lax.stop_gradient(x["mask"])
    return keep(x["h"], mask), mask


def sequence(h: jax.Array, mask: jax.Array, summary: jax.Array) -> Sequence:
    """What a block hands on."""
    return {"h": keep(h, mask), "mask": mask, "summary": summary}


def masked_mean(h: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of `h` `[batch, length, width]` over the positions of the mask; 0 where it is empty."""
    dtype = jnp.promote_types(h.dtype, jnp.float32)  # a length above 256 is none of bfloat16's
    total = jnp.sum(keep(h, mask), axis=1, dtype=dtype)
    count = jnp.sum(mask, axis=1, dtype=dtype)
    return (total / jnp.maximum(count, 1)[:, None]).astype(h.dtype)


def dropout(rate: float, rngs: nnx.Rngs) -> nnx.Module:
    """Dropout layer; the identity, without keys, at rate 0.

    Raises:
        ValueError: The rate is no number in [0, 1).
    """
    if isinstance(rate, bool) or not isinstance(rate, Real) or not 0 <= rate < 1:
        raise ValueError(f"dropout must be a number from 0 to below 1, got {rate!r}")
    return nnx.Dropout(rate, rngs=rngs) if rate > 0 else nnx.Sequential()


class Embedding(nnx.Module):
    """Token ids to a sequence of vectors; the summary is their mean.

    Id 0 is padding. Vectors of padding are 0, take no part in the mean and get no gradient, unless
    padding counts as a word.

    Args:
        vocabulary_size: Number of ids.
        features: Width of a vector.
        max_length: Most tokens in a text.
        embeddings: Initial vectors `[vocabulary_size, features]`, or None to draw them.
        positions: Whether a learned vector is added for every position.
        drop: Rate of dropout on the vectors; the summary sees none of it.
        mask_padding: Whether padding is masked; if not, every position counts as a word.
        init: "torch": vectors are drawn from N(0, 1); "flax" and "he": from N(0, 1/features).
        param_dtype: Dtype of the parameters.
        rngs: Source of initial weights and of dropout's keys.

    Raises:
        ValueError: A size is not positive, or the embeddings have another shape.
    """

    is_embedding: ClassVar[bool] = True

    def __init__(
        self,
        vocabulary_size: int,
        features: int,
        *,
        max_length: int,
        embeddings: Any = None,
        positions: bool = False,
        drop: float = 0.0,
        mask_padding: bool = True,
        init: str = "flax",
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        layers.require_positive(vocabulary_size=vocabulary_size, max_length=max_length)
        if not isinstance(mask_padding, bool):
            raise ValueError(f"mask_padding must be True or False, got {mask_padding!r}")
        draw = nnx.initializers.normal(layers.embedding_deviation(init, features))
        self.max_length, self.mask_padding = max_length, mask_padding
        shape = vocabulary_size, features
        if embeddings is None:
            embeddings = draw(rngs.params(), shape, param_dtype)
        elif np.shape(embeddings) != shape:
            raise ValueError(
                f"embeddings must be [vocabulary_size, width] = {list(shape)}, "
                f"got {list(np.shape(embeddings))}"
            )
        self.table = nnx.Param(jnp.array(embeddings, param_dtype))
        shape = max_length, features
        self.positions = nnx.Param(draw(rngs.params(), shape, param_dtype)) if positions else None
        self.drop = dropout(drop, rngs)

    def __call__(self, x: jax.Array) -> Sequence:
        """Sequence of the ids `x`, int `[batch, length]`, `length <= max_length`."""
        if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(
                f"expected token ids, int [batch, length], got {x.dtype}{list(x.shape)}"
            )
        if x.shape[1] > self.max_length:
            raise ValueError(f"a text has {x.shape[1]} tokens, max_length is {self.max_length}")
        h = jnp.take(self.table[...], x, axis=0)  # nan for ids that the table does not have
        if self.positions is not None:
            h = h + self.positions[...][: x.shape[1]]
        mask = (x != 0) if self.mask_padding else jnp.ones(x.shape)
        mask = mask.astype(h.dtype)
        return sequence(self.drop(h), mask, masked_mean(h, mask))


def width_of(embeddings: Any, hidden: int) -> int:
    """Width of given embeddings, `hidden` without any; ValueError if they are no matrix."""
    if embeddings is None:
        return hidden
    shape = np.shape(embeddings)
    if len(shape) != 2:
        raise ValueError(f"embeddings must be [vocabulary_size, width], got {list(shape)}")
    return shape[1]
