"""Activations that are sequences: what they hold, how heads read them, and where they begin.

Between the blocks of text models and of the ViT goes a dict

- "h": `[batch, length, width]`, 0 at padding;
- "mask": `[batch, length]`, 1 at what counts and 0 at padding, in the dtype of "h";
- "summary": `[batch, width]`, what represents the sequence. Heads and the classifier read it, the
  next block does not;
- "state", where LSTM blocks pass theirs on: `[batch, 2, 2, hidden]`, at which state (output and
  cell) either direction ended.

The mask is no integer, so that a vector-Jacobian product of the whole dict is one of arrays of
floats; its gradient is always zero.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jdecouple._errors import require_bool, require_int, require_number, require_one_of
from jdecouple.models import layers

Sequence = dict[str, jax.Array]
CLASSIFIERS = ("linear", "deinforeg", "scpl")


def pooled(features: Any) -> Any:
    """The part of a block's output, or of its shapes, that a head reads: a sequence's summary."""
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
    """The carry of a block whose activations are a sequence."""
    return {"h": keep(h, mask), "mask": mask, "summary": summary}


def masked_mean(h: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of `h` `[batch, length, width]` over the positions of the mask; 0 where it is empty."""
    dtype = jnp.promote_types(h.dtype, jnp.float32)  # a length above 256 is none of bfloat16's
    total = jnp.sum(keep(h, mask), axis=1, dtype=dtype)
    count = jnp.sum(mask, axis=1, dtype=dtype)
    return (total / jnp.maximum(count, 1)[:, None]).astype(h.dtype)


def dropout_layer(rate: float, rngs: nnx.Rngs) -> nnx.Module:
    """Dropout layer; at rate 0 the identity, without keys."""
    require_number(below=1, dropout=rate)
    return nnx.Dropout(rate, rngs=rngs) if rate > 0 else nnx.Sequential()


def classifier_layers(
    classifier: str, width: int, num_classes: int, **options: Any
) -> list[Callable[..., jax.Array]]:
    """Layers from a summary `[batch, width]` to logits.

    Args:
        classifier: "linear": dense; "deinforeg": tanh, dense (arXiv 2506.18193); "scpl": dense of
            the same width, tanh, dense (arXiv 2602.00062).
        width: Width of the summary.
        num_classes: Number of classes.
        **options: `init`, `param_dtype` and `rngs`.

    Raises:
        ValueError: No such classifier.
    """
    require_one_of(CLASSIFIERS, classifier=classifier)
    stack: list[Callable[..., jax.Array]] = []
    if classifier == "scpl":
        stack.append(layers.linear(width, width, **options))
    if classifier != "linear":
        stack.append(layers.ACTIVATIONS["tanh"])
    return [*stack, layers.linear(width, num_classes, **options)]


class Embedding(nnx.Module):
    """Token ids to a sequence of vectors of width `features`; the summary is their mean.

    Id 0 is padding. Vectors of padding are 0, take no part in the mean and get no gradient, unless
    padding counts as a word. In the mean alone it may count as well.

    Args:
        embeddings: Initial vectors `[vocabulary_size, features]`, or None to draw them.
        positions: Whether a learned vector is added for every position.
        drop: Rate of dropout on the vectors; the summary sees none of it.
        mask_padding: Whether padding is masked; if not, every position counts as a word.
        mask_embedding: Whether the summary leaves padding out; None: as `mask_padding` says.
        init: "torch" and "he_out": vectors are drawn from N(0, 1); "flax" and "he": from
            N(0, 1/features).
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
        mask_embedding: bool | None = None,
        init: str = "flax",
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        require_int(1, vocabulary_size=vocabulary_size, max_length=max_length)
        mask_embedding = mask_padding if mask_embedding is None else mask_embedding
        require_bool(mask_padding=mask_padding, mask_embedding=mask_embedding)
        draw = embedding_init(init, features)
        self.max_length = max_length
        self.mask_padding, self.mask_embedding = mask_padding, mask_embedding
        shape = vocabulary_size, features
        if embeddings is None:
            embeddings = draw(rngs.params(), shape, param_dtype)
        elif np.shape(embeddings) != shape:
            raise ValueError(
                f"embeddings are {list(np.shape(embeddings))}: "
                f"[vocabulary_size, width] = {list(shape)} is needed"
            )
        self.table = nnx.Param(jnp.array(embeddings, param_dtype))
        shape = max_length, features
        self.positions = nnx.Param(draw(rngs.params(), shape, param_dtype)) if positions else None
        self.drop = dropout_layer(drop, rngs)

    def __call__(self, x: jax.Array) -> Sequence:
        """Sequence of the ids `x`, int `[batch, length]`, `length <= max_length`."""
        require_ids(x)
        if x.shape[1] > self.max_length:
            raise ValueError(f"a text has {x.shape[1]} tokens, max_length is {self.max_length}")
        h = jnp.take(self.table[...], x, axis=0)  # nan for ids that the table does not have
        if self.positions is not None:
            h = h + self.positions[...][: x.shape[1]]
        real, everything = (x != 0).astype(h.dtype), jnp.ones(x.shape, h.dtype)
        summary = masked_mean(h, real if self.mask_embedding else everything)
        return sequence(self.drop(h), real if self.mask_padding else everything, summary)


def embedding_init(init: str, features: int) -> Any:
    """How vectors are drawn: N(0, 1) for "torch" and "he_out", else N(0, 1/features)."""
    require_one_of(layers.INITS, init=init)
    return nnx.initializers.normal(
        1.0 if init in ("torch", "he_out") else 1.0 / math.sqrt(features)
    )


def require_ids(x: jax.Array) -> None:
    """Raises ValueError unless these are token ids, int `[batch, length]`."""
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(
            f"x is {x.dtype}{list(x.shape)}: token ids, int [batch, length], are needed"
        )


class Further(nnx.Module):
    """A block that reads a further part of a text behind the states that come from below.

    The part is an entry of the batch of its own, so that no block below sees it.

    Args:
        name: Name of the entry, token ids, int `[batch, length]`.
        embedding: Embedding of the part.
        block: What reads both.
        width: Width of the states from below, to which vectors of another width are brought.
    """

    def __init__(
        self,
        name: str,
        embedding: Embedding,
        block: nnx.Module,
        width: int,
        *,
        init: str = "flax",
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.inputs = (name,)
        self.embedding, self.block = embedding, block
        own = embedding.table.shape[1]
        options = {"init": init, "param_dtype": param_dtype, "rngs": rngs}
        self.resize = layers.linear(own, width, **options) if own != width else nnx.Sequential()

    def __call__(self, x: Sequence, **parts: jax.Array) -> Sequence:
        """What the block gives for `[batch, length + length of the part]`."""
        h, mask = read(x)
        more = self.embedding(*parts.values())
        longer = jnp.concatenate([h, self.resize(more["h"])], axis=1)
        both = jnp.concatenate([mask, more["mask"].astype(mask.dtype)], axis=1)
        return self.block({**x, **sequence(longer, both, x["summary"])})


def read_further(
    blocks: Iterable[nnx.Module],
    further: tuple[int, ...],
    widths: Iterable[int],
    embed: Callable[[], Embedding],
    **options: Any,
) -> list[nnx.Module]:
    """Lets blocks read further parts of a text, the entries "x_1", "x_2", ... of the batch.

    Args:
        blocks: An embedding block, and others.
        further: Index of the block that reads each part, rising.
        widths: Width of what every block but the first reads.
        embed: Makes the embedding of a part.
        **options: `init`, `param_dtype` and `rngs`.

    Raises:
        ValueError: No such block, or one for two parts.
    """
    blocks, widths = list(blocks), [0, *widths]
    most = len(blocks) - 1
    rising = all(a < b for a, b in itertools.pairwise((0, *further, most + 1)))
    if not rising:
        raise ValueError(f"further is {further}: rising indices of blocks, 1 to {most}, are needed")
    for number, index in enumerate(further, 1):
        part = Further(f"x_{number}", embed(), blocks[index], widths[index], **options)
        blocks[index] = part
    return blocks


def width_of(embeddings: Any, hidden: int) -> int:
    """Width of given embeddings, `hidden` without any; ValueError if they are no matrix."""
    if embeddings is None:
        return hidden
    if np.ndim(embeddings) != 2:
        shape = list(np.shape(embeddings))
        raise ValueError(f"embeddings are {shape}: [vocabulary_size, width] is needed")
    return np.shape(embeddings)[1]
