"""Stacks of bidirectional LSTMs over texts: an embedding block, then one block a layer."""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import initializers

from jdecouple._errors import require_bool, require_int, require_one_of
from jdecouple.models import layers, rows
from jdecouple.models.base import Model
from jdecouple.models.cuts import cuttable
from jdecouple.models.sequence import (
    Embedding,
    Sequence,
    classifier_layers,
    dropout_layer,
    pooled,
    read,
    read_further,
    sequence,
    width_of,
)


class BidirectionalLSTM(nnx.Module):
    """One LSTM layer in both directions, whose states stand still at padding.

    So the last state of either direction is that at its last real position, wherever the padding
    lies. Gates are in PyTorch's order: input, forget, cell, output. PyTorch keeps two biases that
    it only ever adds; here is their sum.

    Args:
        merge: "mean" of the two directions' states as what the next block reads, or "concat".
            The summary is the mean of their last states in either case.
        pass_state: Whether both directions start at the state at which those of the block below
            ended, where that hands it on, and the block hands on its own. If not, they start at
            zero.
        drop: Rate of dropout on the incoming states.
        init: "torch" and "he_out": all parameters uniform in +-1/sqrt(hidden), the bias the sum of
            two such; "flax": LeCun-normal and, between states, orthogonal, bias 0; "he": normal of
            variance 2/fan_in, bias 0.
    """

    def __init__(
        self,
        in_features: int,
        hidden: int,
        *,
        merge: str = "mean",
        pass_state: bool = False,
        drop: float = 0.0,
        init: str = "flax",
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        require_one_of(("mean", "concat"), merge=merge)
        require_bool(pass_state=pass_state)
        self.merge, self.pass_state = merge, pass_state
        self.drop = dropout_layer(drop, rngs)

        def draw(initializer: Any, *shape: int) -> nnx.Param:
            keys = (rngs.params(), rngs.params())
            return nnx.Param(jnp.stack([initializer(key, shape, param_dtype) for key in keys]))

        kernel, recurrent, bias = initializers_of(init, hidden)
        self.kernel = draw(kernel, in_features, 4 * hidden)
        self.recurrent = draw(recurrent, hidden, 4 * hidden)
        self.bias = draw(bias, 4 * hidden)

    def __call__(self, x: Sequence) -> Sequence:
        """Sequence of states of width `hidden` (2 `hidden` under "concat")."""
        h, mask = read(x)
        words = self.drop(h).transpose(1, 0, 2)
        real = mask.T[..., None] > 0
        gates = self._gates(words, 0), self._gates(words[::-1], 1)
        below = x.get("state") if self.pass_state else None
        start = None if below is None else (below[:, 0].swapaxes(0, 1), below[:, 1].swapaxes(0, 1))
        (ahead, back), end = recurrence(gates, (real, real[::-1]), self.recurrent[...], start)
        last = (ahead[-1] + back[-1]) / 2
        back = back[::-1]
        merged = (ahead + back) / 2 if self.merge == "mean" else jnp.concatenate([ahead, back], -1)
        found = sequence(merged.transpose(1, 0, 2), mask, last)
        if self.pass_state:
            found["state"] = jnp.stack([each.swapaxes(0, 1) for each in end], axis=1)
        return found

    def _gates(self, words: jax.Array, direction: int) -> jax.Array:
        """What inputs and bias add to the gates of a direction, `[time, batch, 4 hidden]`."""
        gates = rows.multiply_rows(words, self.kernel[...][direction])
        return gates + rows.broadcast_rows(self.bias[...][direction], gates.shape[1:])


Pair: TypeAlias = tuple[jax.Array, jax.Array]  # an array of each direction


@jax.custom_vjp
def recurrence(
    gates: Pair, real: Pair, recurrent: jax.Array, start: Pair | None
) -> tuple[Pair, Pair]:
    """States of two LSTMs, which stand still where nothing is real.

    The directions take their steps together, but what a step reads and writes lies apart: an array
    of both would be transposed. The gradient of the recurrent weights is one product behind the
    backward scan. Inside the scan the devices that share a batch would have to sum their parts of
    it at every step.

    Args:
        gates: what inputs and biases add to the gates, `[time, batch, 4 hidden]`.
        real: `[time, batch, 1]`, whether a position counts.
        recurrent: weights `[2, hidden, 4 hidden]`.
        start: outputs and cells before the first step, `[2, batch, hidden]`; None: zero.

    Returns:
        Outputs of each, `[time, batch, hidden]`; outputs and cells behind the last step,
        `[2, batch, hidden]`.
    """
    return _scan(gates, real, recurrent, start)


def _scan(gates: Pair, real: Pair, recurrent: jax.Array, start: Pair | None) -> tuple[Pair, Pair]:
    def step(state: Pair, inputs: tuple[Pair, Pair]) -> tuple[Pair, Pair]:
        h, c = state
        gates, real = map(jnp.stack, inputs)
        gates = gates + jnp.einsum("dbh,dhg->dbg", h, recurrent)
        into, forget, cell, out = jnp.split(gates, 4, axis=-1)
        new_c = nnx.sigmoid(forget) * c + nnx.sigmoid(into) * jnp.tanh(cell)
        h = jnp.where(real, nnx.sigmoid(out) * jnp.tanh(new_c), h)
        return (h, jnp.where(real, new_c, c)), (h[0], h[1])

    if start is None:
        zeros = jnp.zeros((2, gates[0].shape[1], recurrent.shape[1]), gates[0].dtype)
        start = zeros, zeros
    end, states = jax.lax.scan(step, start, (gates, real))
    return states, end


def _recurrence_fwd(gates: Pair, real: Pair, recurrent: jax.Array, start: Pair | None) -> tuple:
    found, pullback = jax.vjp(
        lambda gates, start: _scan(gates, real, recurrent, start), gates, start
    )
    return found, (pullback, found[0], start)


def _recurrence_bwd(residuals: tuple, cotangent: tuple[Pair, Pair]) -> tuple:
    pullback, states, start = residuals
    gates, into_start = pullback(cotangent)
    first = [jnp.zeros_like(each[0]) for each in states] if start is None else start[0]

    def weights(first: jax.Array, states: jax.Array, gates: jax.Array) -> jax.Array:
        before = jnp.concatenate([first[None], states[:-1]])
        return jnp.einsum("tbh,tbg->hg", before, gates)

    return gates, None, jnp.stack([*map(weights, first, states, gates)]), into_start


recurrence.defvjp(_recurrence_fwd, _recurrence_bwd)


@cuttable
def lstm(
    num_classes: int,
    *,
    vocabulary_size: int,
    max_length: int,
    embeddings: Any = None,
    hidden: int = 300,
    depth: int = 4,
    merge: str = "mean",
    pass_state: bool = False,
    classifier: str = "linear",
    dropout: float = 0.0,
    mask_padding: bool = True,
    mask_embedding: bool | None = None,
    further: tuple[int, ...] = (),
    init: str = "flax",
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
) -> Model:
    """Embedding block and `depth` bidirectional LSTMs, as in DeInfoReg and SCPL.

    The defaults are the sizes of arXiv 2506.18193 and 2602.00062. Words are drawn with width
    `hidden`. SCPL (2602.00062) counts the embedding as a layer: its four are `depth` 3. Arguments
    not listed are those of all builders, see `jdecouple.models`.

    Args:
        hidden: Width of the states of one direction.
        depth: Number of LSTM blocks.
        merge: What the next block reads of the two directions' states: their "mean", or both
            ("concat", as in both papers' code; the first LSTM block then differs from the others).
        pass_state: Whether every LSTM starts at the last states of the one below, as in SCPL's
            code, and not at zero.
        classifier: "linear": dense; "deinforeg": tanh, dense; "scpl": dense of `hidden`, tanh,
            dense.
        dropout: Share of numbers dropped from the input of every LSTM block.
        mask_padding: Whether padding is masked: states stand still there, and means leave it out.
            False is the authors' way: padding is a word like others.
        mask_embedding: Whether the embedding block's summary leaves padding out; None: as
            `mask_padding` says.
        further: Blocks that read the further parts of a text (`data.parts`), in their order.

    Returns:
        A model of 1 + `depth` blocks from token ids, int `[batch, length]`, to sequences (see
        `jdecouple.models.sequence`) whose summary `[batch, hidden]` is, of an LSTM block, the
        mean of the two directions' states at their last real positions. The classifier reads the
        summary.
    """
    require_int(1, num_classes=num_classes, hidden=hidden, depth=depth)
    options: dict[str, Any] = {"init": init, "param_dtype": param_dtype, "rngs": rngs}
    padding: dict[str, Any] = {"max_length": max_length, "mask_padding": mask_padding}
    padding["mask_embedding"] = mask_embedding
    words = width_of(embeddings, hidden)

    def embed() -> Embedding:
        return Embedding(vocabulary_size, words, embeddings=embeddings, **padding, **options)

    blocks: list[nnx.Module] = [embed()]
    widths = [words] + (depth - 1) * [hidden if merge == "mean" else 2 * hidden]
    for width in widths:
        block = BidirectionalLSTM(
            width, hidden, merge=merge, pass_state=pass_state, drop=dropout, **options
        )
        blocks.append(block)
    readout = classifier_layers(classifier, hidden, num_classes, **options)
    blocks = read_further(blocks, further, widths, embed, **options)
    return Model(blocks, nnx.Sequential(pooled, *readout))


def initializers_of(init: str, hidden: int) -> tuple[Any, Any, Any]:
    """Initializers of kernel, recurrent kernel and bias."""
    require_one_of(layers.INITS, init=init)
    if init == "flax":
        return initializers.lecun_normal(), initializers.orthogonal(), initializers.zeros
    if init == "he":
        return initializers.he_normal(), initializers.he_normal(), initializers.zeros
    draw = layers.uniform(hidden)

    def draw_two(key: jax.Array, shape: tuple, dtype: Any) -> jax.Array:
        return draw(key, shape, dtype) + draw(jax.random.fold_in(key, 1), shape, dtype)

    return draw, draw, draw_two
