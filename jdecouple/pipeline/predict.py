"""The evaluation forward, a compiled call for every block, and what its exits answer."""

import collections
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdecouple.methods.routes import Carry, Stage, Unit, averaged
from jdecouple.methods.routes.stage import Transform, transformed
from jdecouple.pipeline.batch import as_inputs, check_like, each_batch
from jdecouple.pipeline.build import abstract
from jdecouple.pipeline.distributed import gather_rows
from jdecouple.pipeline.engine import Engine
from jdecouple.pipeline.legs import Leg, Prepare, Shapes, build_legs, trace_legs
from jdecouple.pipeline.mesh import StageDevices
from jdecouple.pipeline.transfer import transfer

States = Sequence[Any]
"""Of every stage its "params" and "stats", one entry a unit; None for those of other processes.

Where it has averages of them, "ema", these count.
"""


class Exit(NamedTuple):
    """What an exit answers to a batch.

    Attributes:
        block: index of its block; of an answer that has come down, of the last block.
        placement: where it lies.
        logits: `[batch, classes]`.
        labels: "label" and "weight" `[batch]`.
    """

    block: int
    placement: StageDevices
    logits: jax.Array
    labels: Carry


class Answer(NamedTuple):
    """What all exits of this process answer to a batch, whose first `size` rows are examples."""

    size: int
    exits: list[Exit]


class _AtTop(NamedTuple):
    """A batch that has passed all blocks and has yet to come down, with its labels."""

    size: int
    target: Any
    labels: Carry | None
    shapes: Shapes | None


class Predictor:
    """Takes batches up through all blocks, on the devices of their stages, without waiting.

    Every block is one compiled call with its head, which equal blocks on the same devices share. So
    the logits are the same to the last bit whatever the number of stages is, as long as batches and
    replicas are as large. Heads may be `Descending`: then the answer comes down from the last
    block, and the batches go up while earlier ones still come down.

    Attributes:
        placements: devices of each stage.
        legs: the units by their devices.
        descends: whether the answer comes down from the last block.
        example: shapes of a batch, if they are known.
        max_in_flight: batches that may be dispatched and unfinished.
        replicas: of which the number of rows is a multiple.
        one_process: whether this process runs all stages.
    """

    def __init__(
        self,
        units: Sequence[Sequence[Unit]],
        placements: Sequence[StageDevices] | None = None,
        *,
        transform: Transform | None = None,
        seed: int = 0,
        example: Mapping[str, Any] | None = None,
        max_in_flight: int | None = None,
    ):
        """Prepares the calls; compiles at the first batch.

        Args:
            units: blocks with their heads, stage by stage.
            placements: devices of each stage; by default all on JAX's default device.
            transform: `(carry, keys, train) -> carry` in the first block's call.
            seed: root of the transform's keys.
            example: shapes of a batch with its labels, which every batch then has to be like.
            max_in_flight: batches that may be unfinished; by default two for each stage.
        """
        if placements is None:
            placements = [StageDevices.on(tuple(jnp.zeros(()).devices()))] * len(units)
        self.placements = tuple(placements)
        self.example = None if example is None else abstract(dict(example))
        self.max_in_flight = max_in_flight or 2 * len(units)
        self.replicas = math.lcm(*(len(placement.devices) for placement in self.placements))
        self.one_process = all(placement.fully_addressable for placement in self.placements)
        self.descends = units[-1][-1].descends
        self._prepare: Prepare | None = None
        if transform is not None:
            self._prepare = functools.partial(_transformed, transform, seed)
        self._units = tuple(map(tuple, units))
        self._shapes: dict[int, Shapes] = {}  # by the size of a batch

    @classmethod
    def of(cls, stages: Sequence[Stage], engine: Engine, example: Mapping[str, Any]) -> "Predictor":
        """The predictor of stages that an engine trains."""
        return cls(
            [stage.units for stage in stages],
            engine.placements,
            transform=stages[0].transform,
            seed=stages[0].seed,
            example=example,
            max_in_flight=engine.max_in_flight,
        )

    @functools.cached_property
    def exits(self) -> tuple[int, ...]:
        """Index of the block of every exit.

        Raises:
            ValueError: neither an example nor a batch was given yet.
        """
        if self.example is None and not self._shapes:
            raise ValueError("the exits are not known before the first batch: give an example")
        return tuple(self.shapes(self.example).logits)

    def place(self, states: States) -> tuple:
        """Puts "params" and "stats" of every stage on its devices; a copy."""
        kept = [averaged(state) for state in states]
        return tuple(
            placement.place(state, jax.tree.map(lambda _, p=placement: p.replicated, state))
            for placement, state in zip(self.placements, kept, strict=True)
        )

    def predict(
        self, states: States, data: Iterable[Mapping] | Mapping, *, size: int = 1
    ) -> np.ndarray:
        """Logits of all exits; see `jdecouple.Trainer.predict`.

        Batches are padded to the largest so far, and to `size` rows at least.
        """
        rows: dict[int, list[np.ndarray]] = collections.defaultdict(list)
        held: dict[int, list[np.ndarray]] = collections.defaultdict(list)
        in_flight: collections.deque[Answer] = collections.deque()
        count = 0

        def read(answer: Answer) -> None:
            for exit in answer.exits:
                values, own = _on_host(exit.logits)
                rows[exit.block].append(values[: answer.size])
                held[exit.block].append(own[: answer.size])

        for answer in self.forward(states, self.inputs(data), size):
            count += answer.size
            for exit in answer.exits:
                exit.logits.copy_to_host_async()
            in_flight.append(answer)
            if len(in_flight) > self.max_in_flight:
                read(in_flight.popleft())
        if not count:
            raise ValueError("the data to predict holds no examples")
        for answer in in_flight:
            read(answer)
        whole = {block: np.concatenate(parts) for block, parts in rows.items()}
        if not self.one_process:
            for block, shape in self.shapes(self.example).logits.items():
                nothing = np.zeros((count, *shape.shape[1:]), _host_dtype(shape.dtype))
                own = np.concatenate(held[block]) if block in whole else np.zeros(count, bool)
                whole[block] = gather_rows(whole.get(block, nothing), own)
        return np.stack([whole[block] for block in sorted(whole)])

    def forward(self, states: States, batches: Iterable[Carry], size: int = 1) -> Iterator[Answer]:
        """Dispatches batches of arrays with "label", each when it is asked for.

        Every batch is padded with its last row, to the largest so far, and to `size` rows at least.
        """
        states = tuple(state and averaged(state) for state in states)
        # As many batches rise as there are calls there and back. Between processes they go one by
        # one: JAX's sockets (0.10) may come to a stop where arrays cross in both directions.
        depth = 2 * len(self.legs) if self.one_process and len(self.legs) > 1 else 1
        at_top: collections.deque[_AtTop] = collections.deque()
        first = self.placements[0]
        for batch in batches:
            count = len(batch["label"])
            size = max(size, -(-count // self.replicas) * self.replicas)
            padded = _pad(batch, size)
            shapes = None if self.one_process else self.shapes(padded)
            placed = first.place(padded) if first.addressable else None
            carry, exits = self._ascend(states, placed, shapes)
            if not self.descends:
                yield Answer(count, exits)
                continue
            target = carry and carry["x"]
            if self.legs[-1].placement.addressable:
                target = self._down(self.legs[-1], states, target)
            at_top.append(_AtTop(count, target, placed and _labels(placed), shapes))
            if len(at_top) == depth:
                yield self._descend(states, at_top.popleft())
        while at_top:
            yield self._descend(states, at_top.popleft())

    def shapes(self, batch: Mapping[str, Any] | None) -> Shapes:
        """What a batch of this one's size looks like on its way; None is of any size."""
        if batch is None:
            return next(iter(self._shapes.values()))
        size = batch["label"].shape[0]
        if size not in self._shapes:
            weight = jax.ShapeDtypeStruct((size,), jnp.float32)
            carry = {**abstract(dict(batch)), "weight": weight}
            self._shapes[size] = trace_legs(self.legs, carry, self._prepare)
        return self._shapes[size]

    @functools.cached_property
    def legs(self) -> tuple[Leg, ...]:
        """The units by their devices."""
        return build_legs(self._units, self.placements, self._prepare)

    def inputs(self, data: Iterable[Mapping] | Mapping) -> Iterator[Carry]:
        """The batches of data as arrays like the example, with zeros as labels."""
        for given in each_batch(data):
            batch = as_inputs(given, self.example)
            if self.example is not None:
                check_like(batch, self.example, any_size=True)
            yield batch

    def _ascend(
        self, states: States, carry: Carry | None, shapes: Shapes | None
    ) -> tuple[Carry | None, list[Exit]]:
        """Calls every block; the carry behind the last, and what the exits answer."""
        exits: list[Exit] = []
        for number, leg in enumerate(self.legs):
            if number:
                received = shapes and shapes.carries[number]
                before = self.legs[number - 1].placement
                carry = transfer(carry, received, before, leg.placement, named=True)
            if carry is None or not leg.placement.addressable:
                continue
            for unit, call, (stage, slot) in zip(leg.units, leg.up, leg.slots, strict=True):
                state = states[stage]
                changed, logits = call(state["params"][slot], state["stats"][slot], carry)
                carry = {**carry, **changed}
                if logits is not None:
                    exits.append(Exit(unit.index, leg.placement, logits, _labels(carry)))
        return carry, exits

    def _descend(self, states: States, batch: _AtTop) -> Answer:
        """Brings the answer of a batch down from the last leg, which it has passed."""
        target, legs = batch.target, self.legs
        for number in reversed(range(len(legs))):
            if number + 1 < len(legs):
                received = batch.shapes and batch.shapes.targets[number]
                above, here = legs[number + 1].placement, legs[number].placement
                target = transfer(target, received, above, here, named=True)
                if here.addressable:
                    target = self._down(legs[number], states, target)
            if batch.shapes is not None:
                jax.block_until_ready(target)
        if batch.labels is None:
            return Answer(batch.size, [])
        last = self._units[-1][-1].index
        return Answer(batch.size, [Exit(last, self.placements[0], target, batch.labels)])

    def _down(self, leg: Leg, states: States, target: Any) -> Any:
        for call, (stage, slot) in zip(reversed(leg.down), reversed(leg.slots), strict=True):
            if call is not None:
                target = call(states[stage]["params"][slot], states[stage]["stats"][slot], target)
        return target


def _transformed(transform: Transform, seed: int, carry: Carry) -> Carry:
    """Applies the transform as training's first stage does, but for evaluation."""
    return transformed(transform, seed, carry, jnp.zeros(2, jnp.int32), False)


def _pad(batch: Mapping, size: int) -> Carry:
    """Repeats the last example up to `size`, with weight 0."""
    count, numbers = len(batch["label"]), np.arange(size)
    padded = dict(batch)
    if count < size:
        indices = np.minimum(numbers, count - 1)
        padded = jax.tree.map(lambda leaf: np.asarray(leaf)[indices], padded)
    return {**padded, "weight": (numbers < count).astype(np.float32)}


def _labels(carry: Carry) -> Carry:
    return {name: carry[name] for name in ("label", "weight")}


def _on_host(array: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Rows of an array, and which of them this process holds."""
    held = np.zeros(len(array), bool)
    if array.is_fully_addressable:
        return widened(np.asarray(array)), ~held
    rows = np.zeros(array.shape, _host_dtype(array.dtype))
    for shard in array.addressable_shards:
        rows[shard.index], held[shard.index[:1]] = widened(np.asarray(shard.data)), True
    return rows, held


def widened(array: np.ndarray) -> np.ndarray:
    """Logits in float32, or wider where they are."""
    return array.astype(_host_dtype(array.dtype), copy=False)


def _host_dtype(dtype: Any) -> np.dtype:
    return np.dtype(jnp.promote_types(dtype, jnp.float32))
