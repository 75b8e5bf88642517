"""Causal Transformers that tell the next token: an embedding block, then one layer a block."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jdecouple._errors import require_bool, require_int, require_number, require_one_of
from jdecouple.models import layers
from jdecouple.models.base import Model
from jdecouple.models.cuts import cuttable
from jdecouple.models.reversible import joined, streams
from jdecouple.models.sequence import dropout_layer
from jdecouple.models.tokens import (
    TokenEmbedding,
    Tokens,
    beginnings,
    even_splits,
    token_classifier,
)
from jdecouple.models.transformer import attention

POSITIONS = ("rope", "learned")
_BASE = 10_000.0


def rotated(x: jax.Array, position: jax.Array) -> jax.Array:
    """Rotary positions (arXiv 2104.09864): pairs of numbers turned by the position.

    Number i is paired with number i + size/2, as in GPT-NeoX and Llama.

    Args:
        x: `[..., length, heads, size]`, of an even size.
        position: `[..., length]`, int.
    """
    half = x.shape[-1] // 2
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    speed = _BASE ** (-jnp.arange(half, dtype=dtype) / half)
    angle = position[..., None, None].astype(dtype) * speed
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    first, second = x[..., :half].astype(dtype), x[..., half:].astype(dtype)
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class DecoderBlock(nnx.Module):
    """Causal self-attention and a feed-forward layer, each behind LayerNorm, past a shortcut.

    Args:
        hidden: Width of the states.
        heads: Attention heads, a divisor of `hidden`.
        feed_forward: Width inside the feed-forward layer.
        rotary: Whether queries and keys are turned by their positions.
        drop: Rate of dropout on attention weights and before each addition.
    """

    num_streams: ClassVar[int] = 1

    def __init__(
        self,
        hidden: int,
        heads: int,
        feed_forward: int,
        *,
        rotary: bool = True,
        drop: float = 0.0,
        init: str = "flax",
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        require_int(1, hidden=hidden, heads=heads, feed_forward=feed_forward)
        multiple = self.num_streams * heads * (2 if rotary else 1)
        if hidden % multiple:
            raise ValueError(f"hidden is {hidden}: a multiple of {multiple} is needed")
        hidden //= self.num_streams
        self.heads, self.rotary = heads, rotary
        options: dict[str, Any] = {"init": init, "param_dtype": param_dtype, "rngs": rngs}
        self.attention_norm = layers.LayerNorm(hidden, param_dtype=param_dtype)
        self.projections = layers.linear(hidden, 3 * hidden, **options)
        self.out = layers.linear(hidden, hidden, **options)
        self.feed_norm = layers.LayerNorm(hidden, param_dtype=param_dtype)
        self.up = layers.linear(hidden, feed_forward, **options)
        self.down = layers.linear(feed_forward, hidden, **options)
        self.drop = dropout_layer(drop, rngs)

    def __call__(self, x: Tokens) -> Tokens:
        """Tokens of the same shapes."""
        h, begins = x["h"], jax.lax.stop_gradient(x["begins"])
        return {"h": self._add(h, self._attended(self._read(h), begins)), "begins": begins}

    def begin(self, batch: int, length: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """Keys and values of no positions yet, `[batch, length, heads, size]`."""
        hidden = self.out.in_features
        empty = jnp.zeros((batch, length, self.heads, hidden // self.heads), dtype)
        return empty, empty

    def advance(
        self, x: jax.Array, known: tuple[jax.Array, jax.Array], position: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """States `[batch, width]` of one position, beside keys and values of those before."""
        h = x[:, None]
        query, (keys, values) = self._remembered(self._read(h), known, position)
        seen = jnp.broadcast_to(jnp.arange(keys.shape[1]) <= position, keys.shape[:2])
        attended = self._mixed(attention(query, keys, values, seen, self.drop))
        return self._add(h, attended)[:, 0], (keys, values)

    def skip(
        self, x: jax.Array, known: tuple[jax.Array, jax.Array], position: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Keys and values with those of one position of states `[batch, width]`."""
        return self._remembered(self._read(x[:, None]), known, position)[1]

    def _remembered(
        self, h: jax.Array, known: tuple[jax.Array, jax.Array], position: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        query, *own = self._heads(self.attention_norm(h), position[None, None])
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(before, now, position, axis=1)
            for before, now in zip(known, own, strict=True)
        )
        return query, (keys, values)

    def _heads(self, h: jax.Array, position: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        batch, length, hidden = h.shape
        parts = self.projections(h).reshape(batch, length, 3, self.heads, hidden // self.heads)
        query, key, value = (parts[:, :, part] for part in range(3))
        if self.rotary:
            query, key = rotated(query, position), rotated(key, position)
        return query, key, value

    def _attended(self, h: jax.Array, begins: jax.Array) -> jax.Array:
        start, place = beginnings(begins), jnp.arange(h.shape[1])
        # Of the same document, and not later.
        seen = (start[:, :, None] == start[:, None, :]) & (place[:, None] >= place)
        query, key, value = self._heads(self.attention_norm(h), place - start)
        return self._mixed(attention(query, key, value, seen, self.drop))

    def _mixed(self, attended: jax.Array) -> jax.Array:
        return self.drop(self.out(attended.reshape(*attended.shape[:2], -1)))

    def _fed(self, h: jax.Array) -> jax.Array:
        return self.down(nnx.gelu(self.up(self.feed_norm(h))))

    def _read(self, h: jax.Array) -> jax.Array:
        """What attention reads of the states."""
        return h

    def _add(self, h: jax.Array, attended: jax.Array) -> jax.Array:
        h = h + attended
        return h + self.drop(self._fed(h))


class ReversibleDecoderBlock(DecoderBlock):
    """The same layers on two streams, which are the halves of the states (arXiv 2001.04451).

    (a, b) becomes (a + feed_forward(c), c) with c = b + attention(a), so that the input is a
    function of the output. The arguments are those of `DecoderBlock`; each stream, and the layers,
    have half of `hidden`.
    """

    num_streams: ClassVar[int] = 2

    def __init__(self, *sizes: int, drop: float = 0.0, rngs: nnx.Rngs, **options: Any):
        super().__init__(*sizes, drop=drop, rngs=rngs, **options)
        self.feed_drop = dropout_layer(drop, rngs)  # keys of its own: the inverse calls it first

    def inverse(self, y: Tokens) -> Tokens:
        """The input that the output came from, but for rounding."""
        first, second = streams(y["h"])
        first = first - self.feed_drop(self._fed(second))
        second = second - self._attended(first, y["begins"])
        return {"h": joined(first, second), "begins": y["begins"]}

    def _read(self, h: jax.Array) -> jax.Array:
        return streams(h)[0]

    def _add(self, h: jax.Array, attended: jax.Array) -> jax.Array:
        first, second = streams(h)
        second = second + attended
        return joined(first + self.feed_drop(self._fed(second)), second)


@cuttable
def gpt(
    num_classes: int,
    *,
    context: int,
    hidden: int = 128,
    depth: int = 4,
    heads: int = 4,
    feed_forward: int = 0,
    positions: str = "rope",
    dropout: float = 0.0,
    tied: bool = False,
    reversible: bool = False,
    init: str = "flax",
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
) -> Model:
    """Embedding block and `depth` causal layers, LayerNorm before each (as in GPT-2).

    Arguments not listed are those of all builders, see `jdecouple.models`.

    Args:
        hidden: Width of the states.
        depth: Number of blocks behind the embedding.
        heads: Attention heads of every block, a divisor of `hidden`.
        feed_forward: Width inside the feed-forward layers; 0 for 4 x that of what they read.
        positions: "rope": queries and keys are turned by their positions (arXiv 2104.09864), in
            pairs of numbers i and i + size/2; "learned": a vector for every position is added to
            the embedding.
        dropout: Share of numbers dropped from embeddings, attention weights and before every
            addition.
        tied: Whether the classifier's dense layer is the table of the embedding block, which is
            then drawn from N(0, 1/`hidden`) whatever the `init`.
        reversible: Whether all blocks but the first have an inverse: each works on two streams of
            half of `hidden`, see `jdecouple.models.gpt.ReversibleDecoderBlock`.

    Returns:
        A model of 1 + `depth` blocks from tokens, int `[batch, length]`, to what
        `jdecouple.models.tokens` says. The classifier, LayerNorm and a dense layer without bias,
        gives logits `[batch, length, num_classes]`. Split "even" cuts it into 2 to `depth` parts of
        equally many layers, the first with the embedding.
    """
    require_int(1, num_classes=num_classes, hidden=hidden, depth=depth)
    require_int(0, feed_forward=feed_forward)
    require_one_of(POSITIONS, positions=positions)
    require_number(below=1, dropout=dropout)
    require_bool(tied=tied, reversible=reversible)
    options: dict[str, Any] = {"init": init, "param_dtype": param_dtype, "rngs": rngs}
    learned = positions == "learned"
    drawn = options | {"init": "flax" if tied else init}
    embedding = TokenEmbedding(
        num_classes, hidden, context=context, positions=learned, drop=dropout, **drawn
    )
    block = ReversibleDecoderBlock if reversible else DecoderBlock
    inside = feed_forward or 4 * hidden // block.num_streams
    own = options | {"rotary": not learned, "drop": dropout}
    decoders = [block(hidden, heads, inside, **own) for _ in range(depth)]
    readout = token_classifier(hidden, num_classes, embedding if tied else None, **options)
    return Model([embedding, *decoders], readout, even_splits(depth))
