"""Stacks of bidirectional LSTMs over texts: an embedding block, then one block a layer."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jdecouple.models import layers
from jdecouple.models.base import Model
from jdecouple.models.sequence import Embedding, Sequence, dropout, pooled, read, sequence, width_of

MERGES = ("mean", "concat")


class BidirectionalLSTM(nnx.Module):
    """One LSTM layer in both directions, whose states stand still at padding.

    So the last state of either direction is that at its last real position, wherever the padding
    lies. Gates are in PyTorch's order: input, forget, cell, output. PyTorch keeps two biases that
    it only ever adds; here is their sum.

    Args:
        in_features: Width of the incoming states.
        hidden: Width of the states of one direction.
        merge: "mean" of the two directions' states as what the next block reads, or "concat".
            The summary is the mean of their last states in either case.
        drop: Rate of dropout on the incoming states.
        init: "torch": all parameters uniform in +-1/sqrt(hidden), the bias the sum of two such;
            "flax": LeCun-normal and, between states, orthogonal, bias 0; "he": normal of variance
            2/fan_in, bias 0.
        param_dtype: Dtype of the parameters.
        rngs: Source of initial weights and of dropout's keys.
    """

    def __init__(
        self,
        in_features: int,
        hidden: int,
        *,
        merge: str = "mean",
        drop: float = 0.0,
        init: str = "flax",
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        layers.require_one_of(MERGES, merge=merge)
        self.merge = merge
        self.drop = dropout(drop, rngs)

        def draw(way: Any, *shape: int) -> nnx.Param:
            keys = (rngs.params(), rngs.params())
            return nnx.Param(jnp.stack([way(key, shape, param_dtype) for key in keys]))

        inward, between, bias = _initializers(init, hidden)
        self.kernel = draw(inward, in_features, 4 * hidden)
        self.recurrent = draw(between, hidden, 4 * hidden)
        self.bias = draw(bias, 4 * hidden)

    def __call__(self, x: Sequence) -> Sequence:
        """Sequence of states of width `hidden` (2 `hidden` under "concat")."""
        h, mask = read(x)
        h = self.drop(h)
        both = jnp.stack([h, h[:, ::-1]])  # [direction, batch, time, features]
        real = jnp.stack([mask, mask[:, ::-1]]).transpose(2, 0, 1)[..., None] > 0
        gates = jnp.einsum("dbti,dig->tdbg", both, self.kernel[...]) + self.bias[...][:, None]
        recurrent = self.recurrent[...]

        def step(carry: tuple, now: tuple) -> tuple[tuple, jax.Array]:
            h, c = carry
            gates, real = now
            gates = gates + jnp.einsum("dbh,dhg->dbg", h, recurrent)
            into, forget, cell, out = jnp.split(gates, 4, axis=-1)
            moved = nnx.sigmoid(forget) * c + nnx.sigmoid(into) * jnp.tanh(cell)
            h = jnp.where(real, nnx.sigmoid(out) * jnp.tanh(moved), h)
            return (h, jnp.where(real, moved, c)), h

        nothing = jnp.zeros((*gates.shape[1:3], recurrent.shape[1]), gates.dtype)
        (last, _), states = jax.lax.scan(step, (nothing, nothing), (gates, real))
        up, down = states[:, 0], states[::-1, 1]
        merged = (up + down) / 2 if self.merge == "mean" else jnp.concatenate([up, down], -1)
        return sequence(merged.transpose(1, 0, 2), mask, last.mean(0))


def lstm(
    num_classes: int,
    *,
    vocabulary_size: int,
    max_length: int,
    embeddings: Any = None,
    hidden: int = 300,
    depth: int = 4,
    merge: str = "mean",
    dropout: float = 0.0,
    mask_padding: bool = True,
    init: str = "flax",
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
) -> Model:
    """Embedding block and `depth` bidirectional LSTMs, as in DeInfoReg and SCPL.

    The defaults are the sizes of arXiv 2506.18193 and 2602.00062.

    Args:
        num_classes: Number of logits.
        vocabulary_size: Number of token ids; 0 is padding.
        max_length: Most tokens in a text.
        embeddings: Initial word vectors `[vocabulary_size, width]`, trained further; None draws
            them, of width `hidden`.
        hidden: Width of the states of one direction.
        depth: Number of LSTM blocks.
        merge: What a block hands on of the two directions' states: their "mean", or both
            ("concat"; the first LSTM block then differs from the others).
        dropout: Share of numbers dropped from the input of every LSTM block.
        mask_padding: Whether padding is masked: states stand still there, and means leave it out.
            False is the authors' way: padding is a word like others.
        init: "flax", "torch" or "he", see :class:`BidirectionalLSTM` and
            :class:`~jdecouple.models.sequence.Embedding`.
        param_dtype: Dtype of the parameters.
        rngs: Source of initial weights, and of dropout's keys.

    Returns:
        A model of 1 + `depth` blocks from token ids, int `[batch, length]`, to sequences (see
        :mod:`jdecouple.models.sequence`) whose summary `[batch, hidden]` is, of an LSTM block, the
        mean of the two directions' states at their last real positions. The classifier is one dense
        layer on the summary.

    Raises:
        ValueError: A size is not positive, dropout not in [0, 1), a name unknown, or the embeddings
            do not fit the vocabulary.
    """
    layers.require_positive(num_classes=num_classes, hidden=hidden, depth=depth)
    options = {"init": init, "param_dtype": param_dtype, "rngs": rngs}
    features = width_of(embeddings, hidden)
    blocks: list[nnx.Module] = [
        Embedding(
            vocabulary_size,
            features,
            max_length=max_length,
            embeddings=embeddings,
            mask_padding=mask_padding,
            **options,
        )
    ]
    for _ in range(depth):
        blocks.append(BidirectionalLSTM(features, hidden, merge=merge, drop=dropout, **options))
        features = hidden if merge == "mean" else 2 * hidden
    return Model(blocks, nnx.Sequential(pooled, layers.linear(hidden, num_classes, **options)))


def _initializers(init: str, hidden: int) -> tuple[Any, Any, Any]:
    """How kernel, recurrent kernel and bias are drawn."""
    layers.require_init(init)
    ways = nnx.initializers
    if init == "flax":
        return ways.lecun_normal(), ways.orthogonal(), ways.zeros
    if init == "he":
        return ways.he_normal(), ways.he_normal(), ways.zeros
    bound = 1.0 / math.sqrt(hidden)

    def uniform(key: jax.Array, shape: tuple, dtype: Any) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    def two(key: jax.Array, shape: tuple, dtype: Any) -> jax.Array:
        return uniform(key, shape, dtype) + uniform(jax.random.fold_in(key, 1), shape, dtype)

    return uniform, uniform, two
