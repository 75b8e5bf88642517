"""One stage of a local method by itself: whatever brings its carries, and takes those it gives."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jdecouple.methods.routes import Carry, Route, Stage
from jdecouple.pipeline import state as states
from jdecouple.pipeline.mesh import StageDevices
from jdecouple.pipeline.mpmd.executor import Executor
from jdecouple.pipeline.replicas import on_replicas
from jdecouple.pipeline.state import State
from jdecouple.pipeline.step_metrics import JoinedMetrics
from jdecouple.schedules import Schedule


class OneStage:
    """A stage without the others: its states have None in their places.

    What it computes is what it computes among them, bit for bit, as its calls are the same.

    Args:
        index: which of the stages.
        stages: all of them.
        placement: devices of this one.
        route: a local one.
        schedule: one in which no batch waits.
    """

    name = "mpmd"

    def __init__(
        self,
        index: int,
        stages: Sequence[Stage],
        placement: StageDevices,
        route: Route,
        schedule: Schedule,
    ):
        self.index, self.schedule = index, schedule
        own = dataclasses.replace(
            stages[index], optimizer=on_replicas(stages[index].optimizer, placement, True)
        )
        self.stages = (*stages[:index], own, *stages[index + 1 :])
        absent = dataclasses.replace(placement, addressable=False, fully_addressable=False)
        self.placements = tuple(placement if stage is own else absent for stage in self.stages)
        self._executor = Executor(self.stages, self.placements, route, schedule, fuse=False)
        self.load = self._executor.layout.load
        self._states = states.OwnStates(self.stages, self, route)
        self._received = jax.tree.structure([own.carry] * own.num_microbatches)

    @property
    def is_last(self) -> bool:
        """Whether no stage is above."""
        return self.stages[self.index].is_last

    def init(self) -> State:
        """Its initial state, at step 0."""
        return self._states.load(0, lambda k: self.stages[k].initial())

    def template(self) -> dict[str, Any]:
        """Shapes of the arrays of its state by their names in a checkpoint."""
        shapes = (x if k == self.index else None for k, x in enumerate(self._states.shapes))
        return states.to_arrays(self.stages, State(0, tuple(shapes)))

    def to_arrays(self, state: State) -> dict[str, Any]:
        """The arrays of its state by their names in a checkpoint."""
        return states.to_arrays(self.stages, state)

    def from_arrays(self, step: int, arrays: Mapping[str, Any]) -> State:
        """The state of a step from its arrays."""
        shapes = self._states.shapes
        return self._states.load(
            step, lambda k: states.from_arrays(self.stages[k], shapes[k], arrays)
        )

    def step(
        self, state: State, carries: Sequence[Carry], number: int
    ) -> tuple[State, list[jax.Array], JoinedMetrics]:
        """Trains on batch `number`, of which there is one carry a microbatch.

        Returns the new state, which is one step behind the latest batch so far; the message for the
        stage above, [] from the last; and the metrics. All are futures, and the state is donated.
        """
        views = self._states.take(state)
        arrays, above, metrics = self._executor.run_stage(self.index, views.arrays, carries, number)
        views = dataclasses.replace(views, arrays=arrays)
        new = self._states.make(max(state.step, number + 1), views)
        if self.is_last:
            return new, [], metrics
        names = self.stages[self.index + 1].carry
        return new, jax.tree.leaves([{name: x[name] for name in names} for x in above]), metrics

    def receive(self, message: Sequence[np.ndarray]) -> list[Carry]:
        """The carries of a message from the stage below, on the devices of this one."""
        carries = jax.tree.unflatten(self._received, message)
        return [self.placements[self.index].place(carry) for carry in carries]

    def warm_up(self) -> None:
        """Compiles, so that the first batch takes no longer than others."""
        stage = self.stages[self.index]
        nothing = self._states.load(0, lambda k: states.zeros(self._states.shapes[k]))
        carries = [states.zeros(stage.carry)] * stage.num_microbatches
        jax.block_until_ready(self.step(nothing, self.receive(jax.tree.leaves(carries)), 0)[1:])
