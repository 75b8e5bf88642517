"""Going on with a text: one token after another, with what every block knows of those before."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jdecouple._errors import require_int, require_number
from jdecouple.data.tokenizer import BOUNDARY
from jdecouple.models.tokens import Stepping
from jdecouple.pipeline.mesh import StageDevices, jit


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: what logits are divided by; 0: the likeliest token is taken.
        top_k: so many of the likeliest tokens may be chosen; 0: all.
        seed: of the draws; token number n of a continuation has a key of its own.

    Raises:
        ValueError: a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        require_number(temperature=self.temperature)
        require_int(0, top_k=self.top_k)
        require_int(0, 2**32 - 1, seed=self.seed)

    def choose(self, logits: jax.Array, key: jax.Array) -> jax.Array:
        """A token, int32 [], of its `logits` [tokens]."""
        if not self.temperature:
            return jnp.argmax(logits).astype(jnp.int32)
        if 0 < self.top_k < logits.shape[-1]:
            least = jax.lax.top_k(logits, self.top_k)[0][-1]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return jax.random.categorical(key, logits / self.temperature).astype(jnp.int32)


class Progress(NamedTuple):
    """How far a row of tokens is.

    Attributes:
        tokens: int32 [context + 1].
        place: of the token that is read next.
        known: what every block knows.
        ended: whether the document has ended.
    """

    tokens: jax.Array
    place: jax.Array
    known: Any
    ended: jax.Array


class Generator:
    """Blocks and the head of an exit, in evaluation mode, as what tells the next token.

    Args:
        blocks: those up to the exit.
        head: of the last of them.
        context: most tokens of a row.

    Raises:
        ValueError: a block takes no single tokens.
    """

    def __init__(self, blocks: list[nnx.Module], head: Any, context: int):
        if (front := getattr(head, "front", None)) is not None:
            blocks, head = [*blocks, front], head.head
        units = [unit for block in blocks for unit in getattr(block, "layers", (block,))]
        for unit in units:
            if not (hasattr(unit, "begin") and hasattr(unit, "advance")):
                raise ValueError(
                    f"{type(unit).__name__} takes no single tokens: a block with the methods begin "
                    "and advance is needed to generate"
                )
        self._context = context
        self._graph, self._state = nnx.split((units, head))

    def __call__(self, tokens: np.ndarray, count: int, sampling: Sampling) -> np.ndarray:
        """At most `count` tokens that follow on `tokens`, int [n], until the document ends.

        What is seen is at most `context` tokens: when a row is full, a new one begins with the
        last half of it.
        """
        found, seen = np.zeros(0, np.int32), tokens[-self._context :]
        placement = StageDevices.on(tuple(jnp.zeros(()).devices()))
        rule = dataclasses.replace(sampling, seed=0)  # which is compiled for all seeds
        run = _compiled(self._graph, self._context, rule, placement)
        while len(found) < count:
            row = np.zeros(self._context + 1, np.int32)
            row[: len(seen)] = seen
            wanted = min(self._context + 1, len(seen) + count - len(found))
            sizes = np.array([len(seen), wanted, len(found), sampling.seed], np.uint32)
            row, end = jax.device_get(run(self._state, row, sizes))
            new = row[len(seen) : end]
            found = np.concatenate([found, new])
            if len(new) and new[-1] == BOUNDARY:
                return found[:-1]
            seen = row[:end][-max(1, self._context // 2) :]
        return found


@functools.lru_cache(maxsize=8)
def _compiled(
    graph: Any, context: int, sampling: Sampling, placement: StageDevices
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Fills a row: of weights, tokens, and how many are there, are wanted, were made before."""

    def fill(state: Any, row: jax.Array, sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
        units, head = nnx.merge(graph, state)
        given, wanted, made, seed = sizes
        key = jax.random.key(seed)

        def goes_on(now: Progress) -> jax.Array:
            return (now.place + 1 < wanted) & ~now.ended

        def read(now: Progress) -> Progress:
            h, known = now.tokens[now.place][None], []
            for unit, before in zip(units, now.known, strict=True):
                h, after = unit.advance(h, before, now.place)
                known.append(after)
            logits = head.logits(h[:, None])[0, 0]
            following = now.place + 1
            own = jax.random.fold_in(key, made + following - given)
            is_new = following >= given
            token = jnp.where(is_new, sampling.choose(logits, own), now.tokens[following])
            tokens = now.tokens.at[following].set(token)
            return Progress(tokens, following, known, is_new & (token == BOUNDARY))

        blocks: list[Stepping] = units
        known = [unit.begin(1, context, dtype) for unit, dtype in _dtypes(blocks)]
        start = Progress(row, jnp.zeros((), jnp.int32), known, jnp.zeros((), bool))
        end = jax.lax.while_loop(goes_on, read, start)
        return end.tokens, end.place + 1

    return jit(fill, placement)


def _dtypes(units: list[Any]) -> list[tuple[Any, Any]]:
    """Each with the dtype of its weights."""
    leaves = [jax.tree.leaves(nnx.state(unit, nnx.Param)) for unit in units]
    return [(unit, jnp.result_type(*own)) for unit, own in zip(units, leaves, strict=True)]
