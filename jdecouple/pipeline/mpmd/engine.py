"""The MPMD engine: compiled calls of every stage, dispatched without waiting."""

import collections
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdecouple.methods.routes import Carry, StageState, with_whole_norm
from jdecouple.methods.routes.stage import NORM
from jdecouple.pipeline.batch import PlacedBatch
from jdecouple.pipeline.mesh import jit
from jdecouple.pipeline.mpmd.executor import Executor
from jdecouple.pipeline.mpmd.multi_step import MultiStep
from jdecouple.pipeline.stage_views import StageViews
from jdecouple.pipeline.state import or_nan
from jdecouple.pipeline.step_metrics import JoinedMetrics, StepMetrics
from jdecouple.pipeline.transfer import crosses, transfer
from jdecouple.schedules import Call, Kind


class MpmdEngine:
    """Runs one batch by an `Executor` and several by a `MultiStep`; see `Engine`."""

    name = "mpmd"

    def __init__(self, executor: Executor, max_in_flight: int):
        self.schedule = executor.schedule
        self.placements = executor.placements
        self.calls = executor.calls
        self.fuse = executor.fuse
        self.max_in_flight = max_in_flight
        self._sums_late = executor.schedule.sums_late
        self._executor, self._layout = executor, executor.layout
        self._several = MultiStep(executor)
        self._stacked = jit(_stacked, self.placements[0])
        self._with_whole = jit(with_whole_norm, self.placements[0])
        one_process = all(placement.fully_addressable for placement in self.placements)
        self._norm_names = [stage.norm_names for stage in executor.stages]
        self._delays = [
            [self.schedule.delay(k, kind) for kind in (Kind.FORWARD, Kind.BACKWARD)]
            for k in range(len(executor.stages))
        ]
        self._has_norms = executor.stages[0].gradient_norms and one_process
        self._crossings = [
            k for k, pair in enumerate(itertools.pairwise(self.placements)) if crosses(*pair)
        ]
        self._in_flight: collections.deque[list[jax.Array]] = collections.deque()

    def load(self, states: Iterable[StageState | None]) -> StageViews:
        """Puts the states of this process's stages on their devices, and joins small arrays."""
        return self._layout.load(states)

    def put(
        self, batches: Sequence[Sequence[Carry] | PlacedBatch], count: int | None = None
    ) -> PlacedBatch:
        """Uploads batches to the first stage; several are stacked on the host, if they are there.

        A list of one batch is not stacked: it runs as a single batch does.
        """
        given = [batch.parts if isinstance(batch, PlacedBatch) else batch for batch in batches]
        if not self.placements[0].addressable:
            return PlacedBatch((None,) * len(given[0]), count)
        if len(given) == 1:
            return PlacedBatch(tuple(map(self.placements[0].place, given[0])), count)
        return PlacedBatch(tuple(map(self._several.stack, zip(*given, strict=True))), count)

    def run(
        self,
        states: Sequence[StageState | None],
        batch: PlacedBatch,
        step: int,
        since: int = 0,
        end: int | None = None,
    ) -> tuple[StageViews, StepMetrics]:
        """Dispatches one batch or several, and returns at once unless too many are in flight."""
        while len(self._in_flight) >= self.max_in_flight:
            jax.block_until_ready(self._in_flight.popleft())
        count = batch.count or 1
        arrays = self._arrays(states)
        if count > 1:
            arrays, stage_metrics = self._several.run(arrays, batch.parts, step, count)
        else:
            arrays, stage_metrics = self._executor.run(arrays, batch.parts, step, end)
        self._in_flight.append(jax.tree.leaves(stage_metrics) + self._credits(stage_metrics, count))
        parts: list[Any] = []
        for k, joined in enumerate(stage_metrics):
            if joined is None:
                continue
            joined = self._stacked(joined) if batch.count == 1 else joined
            parts.append(joined)
            if step - max(self._delays[k]) >= since:
                continue
            metrics = dict(StepMetrics([joined]))
            norms = {name: metrics.pop(name) for name in self._norm_names[k]}
            for delay, values in zip(self._delays[k], (metrics, norms), strict=True):
                exists = step - delay + np.arange(count) >= since
                parts.append(or_nan(exists[0] if batch.count is None else exists, values))
        merged = StepMetrics(parts)
        if self._sums_late and not self.placements[-1].addressable:
            merged = merged.without("loss")  # of a batch that is still on its way
        return self._views(arrays), self._whole(merged) if self._has_norms else merged

    def measure(
        self, states: Sequence[StageState | None], batch: PlacedBatch, step: int
    ) -> tuple[StageViews, list[tuple[Call, float]]]:
        """As `run` of one batch, but waits for every call before the next, and times it."""
        arrays, seconds = self._executor.measure(self._arrays(states), batch.parts, step)
        return self._views(arrays), seconds

    def measure_memory(
        self, states: Sequence[StageState | None], batch: PlacedBatch, step: int
    ) -> tuple[StageViews, dict[jax.Device, int]]:
        """As `run` of one batch, but waits for every call, and gives the most bytes of a device."""
        arrays, most = self._executor.measure_memory(self._arrays(states), batch.parts, step)
        return self._views(arrays), most

    def wait(self, states: Any) -> None:
        """Blocks until all that was dispatched has run."""
        jax.block_until_ready((states, list(self._in_flight)))
        self._in_flight.clear()

    def _arrays(self, states: Sequence[StageState | None]) -> tuple:
        """States as the calls take them; those that lie otherwise are used up too.

        A caller has put them together, or another trainer has them.
        """
        if not isinstance(states, StageViews) or states.layout is not self._layout:
            given, states = states, self.load(states)
            for leaf in jax.tree.leaves(given):
                if isinstance(leaf, jax.Array):
                    leaf.delete()
        return states.arrays

    def _views(self, arrays: tuple) -> StageViews:
        return StageViews(self._layout, arrays)

    def _whole(self, metrics: StepMetrics) -> StepMetrics:
        """Metrics with the norm of the whole gradient, which the stages know their parts of."""
        norms = {n: value for n, value in metrics.items() if n.endswith(NORM)}
        with jax.debug_nans(False):  # of a part that does not exist, it is nan
            moved = jax.device_put(norms, self.placements[0].replicated)
            return StepMetrics([self._with_whole(moved), metrics])

    def _credits(self, stage_metrics: Sequence[Any], count: int) -> list[jax.Array]:
        """Losses that the processes above return once they have trained on a batch.

        A local stage gets nothing back from the stages above it. Without these it would run ahead
        of a slower process without bound.
        """
        if not self._crossings or not self._executor.route.local:
            return []
        placements = self.placements
        if count > 1:
            placements = tuple(placement.stacked for placement in placements)
        shape = jax.ShapeDtypeStruct((count,) if count > 1 else (), np.float32)
        received = []
        for k in self._crossings:
            metrics, (below, above) = stage_metrics[k + 1], placements[k : k + 2]
            received.append(transfer(metrics and metrics.single["loss"], shape, above, below))
        return [loss for loss in received if loss is not None]


def _stacked(metrics: JoinedMetrics) -> JoinedMetrics:
    """Metrics of one batch as arrays [1]."""
    return jax.tree.map(lambda value: jnp.expand_dims(value, 0), metrics)
