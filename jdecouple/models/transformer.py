"""Transformer encoders over texts: an embedding block, then one encoder layer a block."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jdecouple._errors import require_int, require_number, require_one_of
from jdecouple.models import layers
from jdecouple.models.base import Model
from jdecouple.models.cuts import cuttable
from jdecouple.models.sequence import (
    Embedding,
    Sequence,
    classifier_layers,
    dropout_layer,
    masked_mean,
    pooled,
    read,
    read_further,
    sequence,
)


class Layout(NamedTuple):
    """What the two kinds of encoder differ in."""

    positions: bool  # whether the embedding block adds a learned vector for every position
    expansion: int  # width of the feed-forward layer over that of the states
    activation: str  # name of the function inside the feed-forward layer
    unbiased: bool  # whether LayerNorm divides by the unbiased standard deviation
    norm_each: bool  # whether LayerNorm ends every block; else it begins the classifier


LAYOUTS = {
    "standard": Layout(True, 4, "gelu", unbiased=False, norm_each=False),
    "paper": Layout(False, 1, "relu", unbiased=True, norm_each=True),
}
POOLINGS = ("mean", "class")


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    drop: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Scaled dot-product attention (arXiv 1706.03762, equation 1) of every head.

    `query`, `key`, `value` and the result are `[batch, length, heads, size]`. `mask`, `[batch,
    length]`, or `[batch, queries, length]`, is 0 at positions that get no weight; a row of zeros
    alone gives every position the same, and finite gradients. `drop` is the dropout on the weights.

    `jax.nn.dot_product_attention` takes its softmax in float32, whatever the dtype.
    """
    scores = jnp.einsum("btnh,bsnh->bnts", query / math.sqrt(query.shape[-1]), key)
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    seen = mask[:, None, None, :] if mask.ndim == 2 else mask[:, None]
    scores = jnp.where(seen > 0, scores, jnp.finfo(scores.dtype).min)
    weights = nnx.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bnts,bsnh->btnh", drop(weights), value)


class EncoderBlock(nnx.Module):
    """Self-attention and a feed-forward layer, each behind LayerNorm and past a shortcut.

    Args:
        layout: Which kind of encoder it is part of.
        pooling: What the summary is: the "mean" over real positions, or the first position, that
            of the "class" token.
        drop: Rate of dropout on attention weights, inside the feed-forward layer and before each
            addition.
        init: "xavier": weights of the dense layers are uniform in +-sqrt(6/(fan_in + fan_out)), the
            attention's projections each for itself, biases as under "torch".
    """

    def __init__(
        self,
        hidden: int,
        heads: int,
        feed_forward: int,
        *,
        layout: Layout = LAYOUTS["standard"],
        pooling: str = "mean",
        drop: float = 0.0,
        init: str = "flax",
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        require_int(1, hidden=hidden, heads=heads, feed_forward=feed_forward)
        if hidden % heads:
            raise ValueError(f"hidden is {hidden}: a multiple of heads={heads} is needed")
        require_one_of(POOLINGS, pooling=pooling)
        self.heads, self.pooling = heads, pooling
        self.activation = layers.ACTIVATIONS[layout.activation]
        norm = {"unbiased": layout.unbiased, "param_dtype": param_dtype}
        options = {"init": init, "param_dtype": param_dtype, "rngs": rngs}
        self.attention_norm = layers.LayerNorm(hidden, **norm)
        self.projections = _dense(hidden, hidden, 3, **options)
        self.out = _dense(hidden, hidden, **options)
        self.feed_norm = layers.LayerNorm(hidden, **norm)
        self.up = _dense(hidden, feed_forward, **options)
        self.down = _dense(feed_forward, hidden, **options)
        self.norm = layers.LayerNorm(hidden, **norm) if layout.norm_each else None
        self.drop = dropout_layer(drop, rngs)

    def __call__(self, x: Sequence) -> Sequence:
        """Sequence of the same shapes."""
        h, mask = read(x)
        h = h + self.drop(self._attend(self.attention_norm(h), mask))
        inner = self.drop(self.activation(self.up(self.feed_norm(h))))
        h = h + self.drop(self.down(inner))
        if self.norm is not None:
            h = self.norm(h)
        summary = h[:, 0] if self.pooling == "class" else masked_mean(h, mask)
        return sequence(h, mask, summary)

    def _attend(self, h: jax.Array, mask: jax.Array) -> jax.Array:
        batch, length, hidden = h.shape
        parts = self.projections(h).reshape(batch, length, 3, self.heads, hidden // self.heads)
        query, key, value = (parts[:, :, part] for part in range(3))
        return self.out(attention(query, key, value, mask, self.drop).reshape(h.shape))


def _dense(
    in_features: int, out_features: int, count: int = 1, *, init: str, **options: Any
) -> layers.Linear:
    """`count` dense layers side by side."""
    if init != "xavier":
        return layers.linear(in_features, count * out_features, init=init, **options)
    layer = layers.linear(in_features, count * out_features, init="torch", **options)
    # From +-1/sqrt(fan_in).
    scale = math.sqrt(6 * in_features / (in_features + out_features))
    layer.kernel.set_value(layer.kernel[...] * scale)
    return layer


@cuttable
def transformer(
    num_classes: int,
    *,
    vocabulary_size: int,
    max_length: int,
    embeddings: Any = None,
    hidden: int = 300,
    depth: int = 4,
    heads: int = 6,
    feed_forward: int = 0,
    layout: str = "standard",
    classifier: str = "linear",
    dropout: float = 0.0,
    embedding_dropout: float | None = None,
    mask_padding: bool = True,
    mask_embedding: bool | None = None,
    further: tuple[int, ...] = (),
    init: str = "flax",
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
) -> Model:
    """Embedding block and `depth` encoder layers (arXiv 1706.03762, pre-norm as in 2002.04745).

    Arguments not listed are those of all builders, see `jdecouple.models`.

    Args:
        hidden: Width of the states; 300 in DeInfoReg (arXiv 2506.18193) and SCPL (2602.00062).
        depth: Number of encoder blocks. SCPL counts the embedding too: its four layers are 3.
        heads: Attention heads of every block, a divisor of `hidden`.
        feed_forward: Width inside the feed-forward layers; 0 for the layout's own.
        layout: "standard": learned positions, feed-forward of 4 x `hidden` with GELU, LayerNorm
            before the classifier's dense layer. "paper": no positions, feed-forward of `hidden`
            with ReLU, LayerNorm with the unbiased standard deviation, which also ends every block.
        classifier: "linear": dense; "deinforeg": tanh, dense; "scpl": dense of `hidden`, tanh,
            dense.
        dropout: Share of numbers dropped from embeddings, attention weights, inside the
            feed-forward layers and before every addition. The papers' code has 0.1, and 0 for
            embeddings.
        embedding_dropout: Share of numbers dropped from embeddings; None: as `dropout` says.
        mask_padding: Whether padding is masked, in attention as in means. If not, it is a word
            like others.
        mask_embedding: Whether the embedding block's summary leaves padding out; None: as
            `mask_padding` says. In the papers' code padding is masked, but counts in that mean.
        further: Blocks that read the further parts of a text (`data.parts`), in their order.
        init: Initial weights; "xavier", as in the papers' code, is "torch" with dense weights of
            the encoder layers uniform in +-sqrt(6/(fan_in + fan_out)).

    Returns:
        A model of 1 + `depth` blocks from token ids, int `[batch, length]`, to sequences (see
        `jdecouple.models.sequence`) whose summary `[batch, hidden]` is the mean over real
        positions. The classifier reads the summary.
    """
    require_int(1, num_classes=num_classes, hidden=hidden, depth=depth)
    require_one_of(LAYOUTS, layout=layout)
    require_one_of((*layers.INITS, "xavier"), init=init)
    if embedding_dropout is None:
        embedding_dropout = dropout
    require_number(below=1, dropout=dropout, embedding_dropout=embedding_dropout)
    kind = LAYOUTS[layout]
    shared: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
    options: dict[str, Any] = {"init": "torch" if init == "xavier" else init, **shared}

    def embed() -> Embedding:
        return Embedding(
            vocabulary_size,
            hidden,
            max_length=max_length,
            embeddings=embeddings,
            positions=kind.positions,
            drop=embedding_dropout,
            mask_padding=mask_padding,
            mask_embedding=mask_embedding,
            **options,
        )

    blocks: list[nnx.Module] = [embed()]
    blocks += encoder(
        hidden, depth, heads, feed_forward, layout=kind, drop=dropout, init=init, **shared
    )
    readout = normed_classifier(classifier, hidden, num_classes, kind, **options)
    return Model(read_further(blocks, further, depth * [hidden], embed, **options), readout)


def encoder(
    hidden: int, depth: int, heads: int, feed_forward: int, *, layout: Layout, **options: Any
) -> list[nnx.Module]:
    """`depth` equal encoder blocks; `feed_forward` 0 means the layout's own width."""
    width = layout.expansion * hidden if feed_forward == 0 else feed_forward
    return [EncoderBlock(hidden, heads, width, layout=layout, **options) for _ in range(depth)]


def normed_classifier(
    classifier: str, hidden: int, num_classes: int, layout: Layout, **options: Any
) -> nnx.Module:
    """Summary of a sequence, LayerNorm if no block has it, `classifier_layers`."""
    dtype = options["param_dtype"]
    norm = [] if layout.norm_each else [layers.LayerNorm(hidden, param_dtype=dtype)]
    readout = classifier_layers(classifier, hidden, num_classes, **options)
    return nnx.Sequential(pooled, *norm, *readout)
