"""Early exit of every example by itself: those that stay go on together, in full batches."""

import collections
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np

from jdecouple._errors import require_int, require_type
from jdecouple.inference.rules import Rule
from jdecouple.inference.segments import Passed, Rows, Segments
from jdecouple.methods.routes import Carry
from jdecouple.pipeline.predict import Predictor, States, widened

_NOBODY = -1  # in place of an example, where a batch has more rows than examples


class EarlyAnswers(NamedTuple):
    """What examples are answered, in the order given.

    Attributes:
        logits: `[n, classes]`, of the exit that each example left at.
        exits: which of the exits that was, `[n]`, from 0.
    """

    logits: np.ndarray
    exits: np.ndarray


class AdaptivePredictor:
    """Predicts with as many blocks as each example needs, by a rule.

    The examples that a rule keeps are gathered on the device, joined with those of later batches,
    and go on as soon as they fill a batch. So blocks run on full batches, until the data end.
    Batches have one of a few sizes, and nothing is compiled once all are (`warm_up`). All that the
    host waits for is who leaves, some batches behind what it has dispatched.

    The states are not copied: nothing must train on while they are in use.

    >>> import jax.numpy as jnp, jdecouple as jd
    >>> from flax import nnx
    >>> model = jd.models.mlp(3, input_size=4, hidden=8, depth=3, rngs=nnx.Rngs(0))
    >>> batch = {"x": np.eye(4, dtype=np.float32), "label": np.arange(4) % 3}
    >>> method = jd.methods.get("early_exit")
    >>> trainer = jd.Trainer(model, method, jd.optim.sgd(0.1), example=batch)
    >>> states, rule = trainer.init().stages, Rule("confidence", (0.0, 0.9, 0.9))
    >>> early = AdaptivePredictor(trainer.predictor, states, rule, batch_size=4)
    >>> logits, exits = early.predict({"x": batch["x"]})
    >>> logits.shape, exits
    ((4, 3), array([0, 0, 0, 0]))

    Attributes:
        rule: the rule, with a threshold and a temperature for every exit.
        sizes: numbers of rows that a batch may have, from the largest. The small ones are for what
            is left where the data end.
    """

    def __init__(self, predictor: Predictor, states: States, rule: Rule, batch_size: int = 256):
        """Chooses where examples may leave; compiles at the first batch or in `warm_up`.

        Args:
            predictor: what runs the blocks, such as `trainer.predictor`.
            states: "params" and "stats" of every stage, such as `state.stages`.
            rule: when an example leaves.
            batch_size: rows of a full batch; rounded up to a multiple of the replicas.

        Raises:
            TypeError: the rule or the predictor is none.
            ValueError: heads without exits of their own, a rule for another number of exits, a
                batch size that is no whole number, or stages in other processes.
        """
        require_type(Predictor, predictor=predictor)
        require_type(Rule, rule=rule)
        require_int(1, batch_size=batch_size)
        if not predictor.one_process:
            raise ValueError("some stages are in other processes: early exit needs them in one")
        require_exits(predictor)
        self.rule = rule.for_exits(len(predictor.exits))
        parts = [-(-batch_size // part) for part in (1, 4, 16)]
        rounded = {-(-part // predictor.replicas) * predictor.replicas for part in parts}
        self.sizes = tuple(sorted(rounded, reverse=True))
        self._predictor = predictor
        self._segments = Segments(predictor, tuple(states), self.rule)

    def predict(self, data: Iterable[Mapping] | Mapping) -> EarlyAnswers:
        """Answers all examples.

        Args:
            data: batches {"x": [batch, ...]} of any size, or one; labels are not looked at.

        Raises:
            TypeError, ValueError: what `Trainer.predict` refuses.
        """
        depth = 1 + len(self._predictor.legs)
        return _Passage(self._segments, self.sizes, depth).run(self._predictor.inputs(data))

    def warm_up(self) -> None:
        """Compiles all that `predict` may need, by batches of zeros of every size.

        Raises:
            ValueError: the predictor has no example to tell the shapes.
        """
        example, segments = self._predictor.example, self._segments
        if example is None:
            raise ValueError("the predictor has no example: it needs one to be warmed up")
        full = self.sizes[0]
        rows: dict[int, Rows] = {}
        for size in self.sizes:
            zeros = jax.tree.map(
                lambda leaf, n=size: np.zeros((n, *leaf.shape[1:]), leaf.dtype), example
            )
            rows[size] = segments.enter(zeros)
        for number in range(len(segments.stops)):
            passed = {size: segments.run(number, rows[size]) for size in self.sizes}
            jax.block_until_ready([passed[size].logits for size in self.sizes])
            rows = {size: passed[size].rows for size in self.sizes}
            if number + 1 < len(segments.stops):
                for size, smaller in itertools.combinations(self.sizes, 2):
                    segments.take(number, rows[size], np.zeros(smaller, np.int32))
                for size in self.sizes:
                    segments.join(number, rows[full], rows[size], np.zeros(full, np.int32))


class _Part(NamedTuple):
    """Examples that wait before a segment: which they are, and which rows of a batch."""

    rows: Rows
    chosen: np.ndarray
    ids: np.ndarray


class _Asked(NamedTuple):
    """A batch that was sent through a segment, and which example each row is."""

    segment: int
    passed: Passed
    ids: np.ndarray


class _Passage:
    """All data on their way through the segments."""

    def __init__(self, segments: Segments, sizes: tuple[int, ...], depth: int):
        self._segments, self._sizes, self._depth = segments, sizes, depth
        self._waiting: list[_Part | None] = [None] * len(segments.stops)
        self._asked: collections.deque[_Asked] = collections.deque()
        self._answers: list[tuple[int, np.ndarray, np.ndarray]] = []

    def run(self, batches: Iterable[Carry]) -> EarlyAnswers:
        """Sends everybody through; `batches` are arrays with "label"."""
        count = 0
        for batch in _rebatched(batches, self._sizes[0]):
            number = len(batch["label"])
            rows = _filled(np.arange(number), self._size(number))
            ids = _filled(count + np.arange(number), len(rows), _NOBODY)
            padded = batch if len(rows) == number else jax.tree.map(lambda x, i=rows: x[i], batch)
            self._send(0, self._segments.enter(padded), ids)
            count += number
            self._settle(self._depth)
        if not count:
            raise ValueError("the data to predict holds no examples")
        for segment in range(1, len(self._waiting)):
            self._settle(0)
            self._send_rest(segment)
        self._settle(0)
        first = self._answers[0][2]
        logits, exits = np.empty((count, first.shape[1]), first.dtype), np.empty(count, int)
        for stop, ids, values in self._answers:
            logits[ids], exits[ids] = values, stop
        return EarlyAnswers(logits, exits)

    def _send(self, segment: int, rows: Rows, ids: np.ndarray) -> None:
        passed = self._segments.run(segment, rows)
        for array in (passed.leaves, passed.logits):
            if array is not None:
                array.copy_to_host_async()
        self._asked.append(_Asked(segment, passed, ids))

    def _settle(self, unread: int) -> None:
        """Reads who leaves behind all but so many of the batches that were sent, oldest first.

        Those that stay wait for the next segment, or are sent there.
        """
        while len(self._asked) > unread:
            segment, passed, ids = self._asked.popleft()
            alive = ids != _NOBODY
            gone = alive if passed.leaves is None else alive & np.asarray(passed.leaves)
            values = widened(np.asarray(passed.logits)[gone])
            self._answers.append((self._segments.stops[segment], ids[gone], values))
            chosen = np.flatnonzero(alive & ~gone)
            if len(chosen):
                self._wait(segment + 1, _Part(passed.rows, chosen, ids[chosen]))

    def _wait(self, segment: int, part: _Part) -> None:
        """Lets some wait, and sends a batch if they fill it."""
        full, earlier = self._sizes[0], self._waiting[segment]
        if earlier is None:  # they stay where they are, until others come
            whole = len(part.ids) == full
            self._waiting[segment] = None if whole else part
            if whole:
                self._send(segment, part.rows, part.ids)
            return
        room = full - len(earlier.ids)
        chosen = np.concatenate([earlier.chosen, full + part.chosen[:room]])
        ids = np.concatenate([earlier.ids, part.ids[:room]])
        rows = self._segments.join(segment - 1, earlier.rows, part.rows, _filled(chosen, full))
        if len(ids) < full:
            self._waiting[segment] = _Part(rows, np.arange(len(ids)), ids)
            return
        left = _Part(part.rows, part.chosen[room:], part.ids[room:])
        self._waiting[segment] = left if len(left.ids) else None
        self._send(segment, rows, ids)

    def _send_rest(self, segment: int) -> None:
        """Sends those that wait, in the smallest batch that holds them."""
        part, self._waiting[segment] = self._waiting[segment], None
        if part is None:
            return
        size, held = self._size(len(part.ids)), len(part.rows.carry["label"])
        if size < held:
            rows = self._segments.take(segment - 1, part.rows, _filled(part.chosen, size))
            self._send(segment, rows, _filled(part.ids, size, _NOBODY))
            return
        ids = np.full(held, _NOBODY)
        ids[part.chosen] = part.ids
        self._send(segment, part.rows, ids)

    def _size(self, count: int) -> int:
        return min(size for size in self._sizes if size >= count)


def require_exits(predictor: Predictor) -> None:
    """Raises ValueError where no example can leave early, whatever the rule."""
    if predictor.descends:
        raise ValueError(
            "the answer comes down from the last block: early exit needs exits on the way up"
        )
    if len(predictor.exits) < 2:
        raise ValueError(f"the net has {len(predictor.exits)} exit: early exit needs 2 or more")


def _filled(numbers: np.ndarray, size: int, value: int | None = None) -> np.ndarray:
    """Whole numbers `[size]`: those given, and the last of them, or the value, behind them."""
    filled = np.full(size, numbers[-1] if value is None else value, np.int32)
    filled[: len(numbers)] = numbers
    return filled


def _rebatched(batches: Iterable[Carry], size: int) -> Iterator[Carry]:
    """The same examples in batches of one size on the host; what is left comes last."""
    kept: Carry | None = None
    for batch in batches:
        batch = jax.tree.map(np.asarray, batch)
        if kept is not None:
            batch = jax.tree.map(lambda *leaves: np.concatenate(leaves), kept, batch)
        count = len(batch["label"])
        for start in range(0, count - size + 1, size):
            yield jax.tree.map(lambda leaf, i=start: leaf[i : i + size], batch)
        rest = count % size
        kept = jax.tree.map(lambda leaf, n=rest: leaf[-n:], batch) if rest else None
    if kept is not None:
        yield kept
