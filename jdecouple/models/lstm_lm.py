"""Stacks of LSTMs that tell the next token: an embedding block, then one layer a block."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jdecouple._errors import require_bool, require_int, require_number
from jdecouple.models import rows
from jdecouple.models.base import Model
from jdecouple.models.cuts import cuttable
from jdecouple.models.lstm import initializers_of
from jdecouple.models.sequence import dropout_layer
from jdecouple.models.tokens import TokenEmbedding, Tokens, even_splits, token_classifier

State = tuple[jax.Array, jax.Array]
"""Output and cell, `[batch, hidden]` each."""


class CausalLSTM(nnx.Module):
    """One LSTM layer past a shortcut, whose state is zero where a document begins.

    Gates are in PyTorch's order: input, forget, cell, output.

    Args:
        hidden: Width of inputs and states.
        drop: Rate of dropout on the incoming states.
        init: As of `lstm.BidirectionalLSTM`.
    """

    def __init__(
        self,
        hidden: int,
        *,
        drop: float = 0.0,
        init: str = "flax",
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kernel, recurrent, bias = initializers_of(init, hidden)
        width = 4 * hidden
        self.kernel = nnx.Param(kernel(rngs.params(), (hidden, width), param_dtype))
        self.recurrent = nnx.Param(recurrent(rngs.params(), (hidden, width), param_dtype))
        self.bias = nnx.Param(bias(rngs.params(), (width,), param_dtype))
        self.drop = dropout_layer(drop, rngs)

    def __call__(self, x: Tokens) -> Tokens:
        """Tokens of the same shapes."""
        h, begins = x["h"], jax.lax.stop_gradient(x["begins"])
        gates = self._gates(self.drop(h)).transpose(1, 0, 2)
        recurrent = self.recurrent[...]

        def step(state: State, now: tuple[jax.Array, jax.Array]) -> tuple[State, jax.Array]:
            gates, fresh = now
            known = [jnp.where(fresh, 0, each) for each in state]
            state = moved(gates, (known[0], known[1]), recurrent)
            return state, state[0]

        zeros = jnp.zeros((h.shape[0], recurrent.shape[0]), gates.dtype)
        fresh = begins.T[..., None] > 0
        _, outputs = jax.lax.scan(step, (zeros, zeros), (gates, fresh))
        return {"h": h + outputs.transpose(1, 0, 2), "begins": begins}

    def begin(self, batch: int, length: int, dtype: Any) -> State:
        """Zeros."""
        zeros = jnp.zeros((batch, self.recurrent.shape[0]), dtype)
        return zeros, zeros

    def advance(self, x: jax.Array, known: State, position: jax.Array) -> tuple[jax.Array, State]:
        """States `[batch, width]` behind one more token."""
        state = moved(self._gates(self.drop(x[:, None]))[:, 0], known, self.recurrent[...])
        return x + state[0], state

    def _gates(self, h: jax.Array) -> jax.Array:
        gates = rows.multiply_rows(h, self.kernel[...])
        return gates + rows.broadcast_rows(self.bias[...], gates.shape)


def moved(gates: jax.Array, state: State, recurrent: jax.Array) -> State:
    """The state behind a step; `gates` `[batch, 4 hidden]` are what inputs and bias add to them."""
    h, c = state
    into, forget, cell, out = jnp.split(gates + h @ recurrent, 4, axis=-1)
    c = nnx.sigmoid(forget) * c + nnx.sigmoid(into) * jnp.tanh(cell)
    return nnx.sigmoid(out) * jnp.tanh(c), c


@cuttable
def lstm_lm(
    num_classes: int,
    *,
    context: int,
    hidden: int = 128,
    depth: int = 4,
    dropout: float = 0.0,
    tied: bool = False,
    init: str = "flax",
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
) -> Model:
    """Embedding block and `depth` causal LSTM layers, each past a shortcut.

    Arguments not listed are those of all builders, see `jdecouple.models`.

    Args:
        hidden: Width of the states.
        depth: Number of blocks behind the embedding.
        dropout: Share of numbers dropped from embeddings and from the input of every LSTM.
        tied: As of `gpt`.

    Returns:
        A model of 1 + `depth` blocks from tokens, int `[batch, length]`, to what
        `jdecouple.models.tokens` says. The classifier, LayerNorm and a dense layer without bias,
        gives logits `[batch, length, num_classes]`. Split "even" is that of `gpt`.
    """
    require_int(1, num_classes=num_classes, hidden=hidden, depth=depth)
    require_number(below=1, dropout=dropout)
    require_bool(tied=tied)
    options: dict[str, Any] = {"init": init, "param_dtype": param_dtype, "rngs": rngs}
    own = options | {"init": "flax" if tied else init}
    embedding = TokenEmbedding(num_classes, hidden, context=context, drop=dropout, **own)
    blocks: list[nnx.Module] = [embedding]
    blocks += [CausalLSTM(hidden, drop=dropout, **options) for _ in range(depth)]
    readout = token_classifier(hidden, num_classes, embedding if tied else None, **options)
    return Model(blocks, readout, even_splits(depth))
