"""The SPMD engine: a pipeline of equal blocks as one compiled program for several batches."""

import collections
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jdecouple.methods.routes import Carry, Route, StageState
from jdecouple.pipeline.batch import PlacedBatch
from jdecouple.pipeline.memory import Meter
from jdecouple.pipeline.spmd.program import BATCHES, Program
from jdecouple.pipeline.spmd.sharded_state import Layout
from jdecouple.pipeline.stage_views import StageViews
from jdecouple.pipeline.state import place_states
from jdecouple.pipeline.step_metrics import StepMetrics
from jdecouple.schedules import Schedule


class SpmdEngine:
    """Trains on one batch or several in a call; see `Engine`. Two calls may always be in flight."""

    name = "spmd"

    def __init__(
        self, layout: Layout, route: Route, schedule: Schedule, fuse: bool, max_in_flight: int
    ):
        self.schedule = schedule
        self.placements = layout.placements
        self.calls = tuple(schedule.calls())
        self.fuse = fuse
        self.max_in_flight = max_in_flight
        self.program = Program(layout, route)
        self._layout = layout
        self._in_flight: collections.deque[tuple[int, jax.Array]] = collections.deque()
        self._zeros: dict[tuple, jax.Array] = {}

    def load(self, states: Iterable[StageState | None]) -> StageViews:
        """Puts the states of all stages on their devices, and stacks them there."""
        return self._layout.stack(place_states(self._layout.stages, self.placements, states))

    def put(
        self, batches: Sequence[Sequence[Carry] | PlacedBatch], count: int | None = None
    ) -> PlacedBatch:
        """Uploads batches to the first device group at once; the others hold zeros.

        The parts are carries [device groups x T, M, batch, ...]: one, or one for each batch where
        some are on the devices already.
        """
        host = [batch for batch in batches if not isinstance(batch, PlacedBatch)]
        if len(host) == len(batches):
            return PlacedBatch((self._upload(host),), count)
        parts: list[Carry | None] = []
        for batch in batches:
            parts += batch.parts if isinstance(batch, PlacedBatch) else [self._upload([batch])]
        return PlacedBatch(tuple(parts), count)

    def run(
        self,
        states: StageViews,
        batch: PlacedBatch,
        step: int,
        since: int = 0,
        end: int | None = None,
    ) -> tuple[StageViews, StepMetrics]:
        """Dispatches one call, and returns at once unless too many batches are in flight."""
        del since, end  # no batch is left in a queue
        count = batch.count or 1
        while len(self._in_flight) > 1 and (
            count + sum(size for size, _ in self._in_flight) > self.max_in_flight
        ):
            jax.block_until_ready(self._in_flight.popleft()[1])
        arrays, table = self.program.call(states.arrays, batch.parts, np.int32(step))
        metrics = self.program.metrics(table.addressable_shards[0].data, batch.count is None)
        self._in_flight.append((count, metrics))
        return StageViews(self._layout, arrays), StepMetrics([metrics])

    def measure(self, states: Any, batch: PlacedBatch, step: int) -> NoReturn:
        """Refuses to time stages that are compiled into one program."""
        raise ValueError("engine 'spmd' has no calls of single stages: measuring needs 'mpmd'")

    def measure_memory(
        self, states: StageViews, batch: PlacedBatch, step: int
    ) -> tuple[StageViews, dict[jax.Device, int]]:
        """As `run` of one batch; waits, and gives the most bytes of each device."""
        meter = Meter(self.placements, (states.arrays, batch.parts))
        call = meter.watch(self.program.call, *self.placements)
        arrays, _ = call(states.arrays, batch.parts, np.int32(step))
        return StageViews(self._layout, arrays), meter.most

    def wait(self, states: Any) -> None:
        """Blocks until all that was dispatched has run."""
        jax.block_until_ready((states, [metrics for _, metrics in self._in_flight]))
        self._in_flight.clear()

    def _upload(self, batches: Sequence[Sequence[Carry]]) -> Carry:
        """One carry [device groups x T, M, batch, ...] of all microbatches of T batches."""
        parts = [part for batch in batches for part in batch]
        return jax.tree.map(lambda *leaves: self._upload_leaf(leaves, len(batches)), *parts)

    def _upload_leaf(self, leaves: Sequence[Any], count: int) -> jax.Array:
        on_host = all(isinstance(leaf, np.ndarray) for leaf in leaves)
        stacked = np.stack(leaves) if on_host else jnp.stack(leaves)
        stacked = stacked.reshape(count, -1, *stacked.shape[1:])
        mesh, placement = self._layout.mesh, self.placements[0]
        target = NamedSharding(placement.batched.mesh, PartitionSpec(None, *BATCHES[1:]))
        first = jax.device_put(stacked, target)
        pieces = {shard.device: shard.data for shard in first.addressable_shards}
        piece = pieces[placement.devices[0]]
        for device in mesh.devices[1:].flat:
            key = device, piece.shape, piece.dtype
            if key not in self._zeros:
                zeros = np.zeros(piece.shape, piece.dtype)
                self._zeros[key] = jax.device_put(zeros, device)
            pieces[device] = self._zeros[key]
        return jax.make_array_from_single_device_arrays(
            (len(mesh.devices) * count, *first.shape[1:]),
            NamedSharding(mesh, BATCHES),
            [pieces[device] for device in mesh.devices.flat],
        )
