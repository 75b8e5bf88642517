"""Going on with a text: one token after another, with what every block knows of those before.

A token may leave at an exit, by a rule (`jdecouple.inference.rules`), as in CALM (arXiv
2207.07061): the blocks above do not read it. What they need to know of it for tokens to come they
take from its state at the exit, which stands for what each of them would have got: attention layers
keep keys and values of it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jdecouple._errors import require_int, require_number
from jdecouple.data.tokenizer import BOUNDARY, Tokenizer
from jdecouple.inference.rules import Rule, leave, score
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


class Continuation(str):
    """A text that follows on another.

    Attributes:
        exits: number of the exit that told each of its tokens, that of its block, int [tokens].
    """

    exits: np.ndarray


class Stop(NamedTuple):
    """An exit, and what is between it and the one below.

    Attributes:
        units: the units of the blocks between them.
        front: those in front of the head.
        head: tells the next token.
    """

    units: list[Stepping]
    front: list[Stepping]
    head: Any


class Progress(NamedTuple):
    """How far a row of tokens is.

    Attributes:
        tokens: int32 [context + 1].
        exits: numbers of the stops that told them, int32 [context + 1].
        place: of the token that is read next.
        known: what the units of every stop know, and those in front of its head.
        ended: whether the document has ended.
    """

    tokens: jax.Array
    exits: jax.Array
    place: jax.Array
    known: Any
    ended: jax.Array


class Generator:
    """Blocks and the heads of exits, in evaluation mode, as what tells the next token.

    Args:
        blocks: those up to the last exit.
        heads: of every block; None of one that is no exit, or at which no token leaves.
        context: most tokens of a row.
        rule: when a token leaves at an exit before the last one; with it there are several.

    Raises:
        ValueError: a block takes no single tokens, or the rule is one for other exits.
    """

    def __init__(
        self,
        blocks: Sequence[nnx.Module],
        heads: Sequence[Any],
        context: int,
        rule: Rule | None = None,
    ):
        stops: list[tuple] = []
        units: list[Any] = []
        for block, head in zip(blocks, heads, strict=True):
            units += _units(block)
            if head is not None:
                front = getattr(head, "front", None)
                fronts = [] if front is None else _units(front)
                stops.append((units, fronts, head if front is None else head.head))
                units = []
        self._context = context
        self._rule = rule and rule.for_exits(len(stops))
        self._graph, self._state = nnx.split(stops)

    def __call__(
        self, tokens: np.ndarray, count: int, sampling: Sampling
    ) -> tuple[np.ndarray, np.ndarray]:
        """At most `count` tokens that follow on `tokens`, int [n], until the document ends.

        What is seen is at most `context` tokens: when a row is full, a new one begins with the
        last half of it. All blocks read what a row begins with.

        Returns:
            The tokens, and the number of the exit that told each, from 0.
        """
        require_int(1, max_tokens=count)
        found, exits = np.zeros(0, np.int32), np.zeros(0, np.int32)
        seen = tokens[-self._context :]
        placement = StageDevices.on(tuple(jnp.zeros(()).devices()))
        chosen = dataclasses.replace(sampling, seed=0)  # which is compiled for all seeds
        kind, bounds = None, np.zeros((0, 2), np.float32)
        if self._rule is not None:
            kind = self._rule.name, self._rule.patience
            pairs = self._rule.thresholds, self._rule.temperatures
            bounds = np.array(pairs, np.float32).T
        run = _compiled(self._graph, self._context, chosen, kind, placement)
        while len(found) < count:
            row = np.zeros(self._context + 1, np.int32)
            row[: len(seen)] = seen
            wanted = min(self._context + 1, len(seen) + count - len(found))
            sizes = np.array([len(seen), wanted, len(found), sampling.seed], np.uint32)
            row, told, end = jax.device_get(run(self._state, row, sizes, bounds))
            new = slice(len(seen), end)
            found, exits = np.concatenate([found, row[new]]), np.concatenate([exits, told[new]])
            if end > len(seen) and found[-1] == BOUNDARY:
                return found[:-1], exits[:-1]
            seen = row[:end][-max(1, self._context // 2) :]
        return found, exits


def continued(
    generator: Generator,
    pieces: Tokenizer,
    prompt: str,
    exits: Sequence[int],
    count: int,
    sampling: Sampling,
) -> Continuation:
    """At most `count` tokens that follow on a prompt; `exits` are those of the generator."""
    tokens = np.concatenate([[BOUNDARY], pieces.encode(prompt)]).astype(np.int32)
    found, stops = generator(tokens, count, sampling)
    text = Continuation(pieces.decode(found))
    text.exits = np.array(exits)[stops]
    return text


@functools.lru_cache(maxsize=8)
def _compiled(
    graph: Any,
    context: int,
    sampling: Sampling,
    rule: tuple[str, int] | None,
    placement: StageDevices,
) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
    """Fills a row: of weights, tokens, how many are there, are wanted, were made before, bounds.

    `rule` is a name and the patience; the bounds are threshold and temperature of every exit.
    """

    def fill(
        state: Any, row: jax.Array, sizes: jax.Array, bounds: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        stops = [Stop(*parts) for parts in nnx.merge(graph, state)]
        given, wanted, made, seed = sizes
        key = jax.random.key(seed)

        def goes_on(now: Progress) -> jax.Array:
            return (now.place + 1 < wanted) & ~now.ended

        def read(now: Progress) -> Progress:
            following = now.place + 1
            is_new = following >= given
            leaves = rule and functools.partial(_leaves, *rule, bounds, is_new)
            known, exit, logits = _passed(stops, now, leaves)
            own = jax.random.fold_in(key, made + following - given)
            token = jnp.where(is_new, sampling.choose(logits, own), now.tokens[following])
            return Progress(
                now.tokens.at[following].set(token),
                now.exits.at[following].set(exit),
                following,
                known,
                is_new & (token == BOUNDARY),
            )

        known = [
            tuple(_begun(part, context) for part in (stop.units, stop.front)) for stop in stops
        ]
        start = Progress(
            row, jnp.zeros_like(row), jnp.zeros((), jnp.int32), known, jnp.zeros((), bool)
        )
        end = jax.lax.while_loop(goes_on, read, start)
        return end.tokens, end.exits, end.place + 1

    return jit(fill, placement)


def _passed(
    stops: Sequence[Stop], now: Progress, leaves: Callable | None
) -> tuple[list[Any], jax.Array, jax.Array]:
    """What all know behind a token; the number of the exit that tells the next, and its logits.

    `leaves` tells whether it leaves, of the number of an exit, its logits, and what it told last.
    """
    h, known = now.tokens[now.place][None], []
    left, exit = jnp.zeros((), bool), jnp.zeros((), jnp.int32)
    logits: Any = None
    memory = None
    for number, (stop, before) in enumerate(zip(stops, now.known, strict=True)):
        read = functools.partial(_read, stop, now.place)
        if number == 0:
            h, after, logits = read(h, before, logits)
        else:
            past = functools.partial(_past, stop, now.place)
            h, after, logits = jax.lax.cond(left, past, read, h, before, logits)
        known.append(after)
        if leaves is not None and number + 1 < len(stops):
            now_leaves, memory = leaves(number, logits, memory)
            left = left | now_leaves
            exit = exit + ~left
    return known, exit, logits[0]


def _read(
    stop: Stop, place: jax.Array, h: jax.Array, known: tuple, _: Any
) -> tuple[jax.Array, tuple, jax.Array]:
    """Reads a token: states at the exit, what all know then, and logits `[1, tokens]`."""
    h, own = _advanced(stop.units, h, known[0], place)
    x, fronts = _advanced(stop.front, h, known[1], place)
    return h, (own, fronts), stop.head.logits(x[:, None])[:, 0]


def _past(
    stop: Stop, place: jax.Array, h: jax.Array, known: tuple, logits: jax.Array
) -> tuple[jax.Array, tuple, jax.Array]:
    """Lets a token by that has left with these states and logits."""
    parts = zip((stop.units, stop.front), known, strict=True)
    return h, tuple(_skipped(units, h, each, place) for units, each in parts), logits


def _advanced(
    units: Sequence[Stepping], h: jax.Array, known: Sequence[Any], place: jax.Array
) -> tuple[jax.Array, list[Any]]:
    behind = []
    for unit, before in zip(units, known, strict=True):
        h, after = unit.advance(h, before, place)
        behind.append(after)
    return h, behind


def _skipped(
    units: Sequence[Any], h: jax.Array, known: Sequence[Any], place: jax.Array
) -> list[Any]:
    """What units know behind a token that they do not read, from its states below them."""
    return [
        unit.skip(h, before, place) if hasattr(unit, "skip") else unit.advance(h, before, place)[1]
        for unit, before in zip(units, known, strict=True)
    ]


def _leaves(
    name: str,
    patience: int,
    bounds: jax.Array,
    may: jax.Array,
    number: int,
    logits: jax.Array,
    memory: tuple[jax.Array, jax.Array] | None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Whether a token leaves at an exit, if it may; and what the next one is told of it."""
    threshold, temperature = bounds[number]
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32)) / temperature
    previous, streak = memory or (None, jnp.zeros(1, jnp.int32))
    leaves, streak = leave(score(name, wide, previous), threshold, streak, patience)
    return leaves[0] & may, (wide, streak)


def _units(block: Any) -> list[Any]:
    """The units of a block; ValueError for one that takes no single tokens."""
    units = [*getattr(block, "layers", (block,))]
    for unit in units:
        if not (hasattr(unit, "begin") and hasattr(unit, "advance")):
            raise ValueError(
                f"{type(unit).__name__} takes no single tokens: a block with the methods begin "
                "and advance is needed to generate"
            )
    return units


def _begun(units: Sequence[Any], context: int) -> list[Any]:
    """What units know before the first token, in the dtypes of their weights."""
    found = []
    for unit in units:
        dtypes = jnp.result_type(*jax.tree.leaves(nnx.state(unit, nnx.Param)))
        found.append(unit.begin(1, context, dtypes))
    return found
