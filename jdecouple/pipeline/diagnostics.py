"""What is read from measurements, and measurements that change nothing in a training."""

import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jdecouple._errors import require_int
from jdecouple.methods import Method
from jdecouple.methods.routes import Carry, Delayed, Stage, loss_scale
from jdecouple.methods.routes.stage import floating
from jdecouple.methods.routes.synchronous import linearize, pull_back
from jdecouple.pipeline.memory import num_bytes
from jdecouple.pipeline.mesh import StageDevices, jit
from jdecouple.pipeline.state import State, or_nan
from jdecouple.pipeline.wire import coded
from jdecouple.schedules import Call, Costs, Kind


class Measured(Protocol):
    """What is asked of a `jdecouple.Trainer` to measure it."""

    stages: tuple[Stage, ...]

    def measure(self, state: State, batch: Any) -> tuple[State, list[tuple[Call, float]]]:
        """Trains on one batch; gives every call with its seconds."""


def measured_costs(
    trainer: Measured, state: State, batches: Iterable[Any], repeats: int
) -> tuple[State, Costs]:
    """Trains on a batch that compiles and on `repeats` more; see `Trainer.measured_costs`."""
    require_int(1, repeats=repeats)
    measured = []
    for batch in itertools.islice(itertools.cycle(batches), repeats + 1):
        state, seconds = trainer.measure(state, batch)
        measured.append(seconds)
    if not measured:
        raise ValueError("batches is empty: at least one batch is needed")
    return state, call_costs(itertools.chain(*measured[1:]), trainer.stages)


def call_costs(timed_calls: Iterable[tuple[Call, float]], stages: Sequence[Stage]) -> Costs:
    """Costs for the simulator: the median seconds of every call, the bytes of the carries."""
    seconds: defaultdict[tuple[int, tuple[Kind, ...]], list[float]] = defaultdict(list)
    for call, time in timed_calls:
        seconds[call.stage, call.kinds].append(time)
    return Costs(
        calls={key: statistics.median(times) for key, times in seconds.items()},
        **message_sizes(stages),
    )


def message_sizes(stages: Sequence[Stage]) -> dict[str, Any]:
    """The part of `Costs` that tells bytes: of a microbatch's carries and errors, and of ties."""

    def sizes(shapes: Sequence[Any]) -> list[int]:
        return [
            num_bytes(coded(each, stage.wire))
            for each, stage in zip(shapes, stages[1:], strict=True)
        ]

    return {
        "message_bytes": sizes([stage.carry for stage in stages[1:]]),
        "error_bytes": sizes([floating(stage.carry["x"]) for stage in stages[1:]]),
        "ties": tuple(_tie_sizes(stages).items()),
    }


def _tie_sizes(stages: Sequence[Stage]) -> dict[tuple[int, ...], int]:
    """Bytes of what stages share, by all that share it; the first steps it."""
    owners = {unit.index: (stage.index, unit) for stage in stages for unit in stage.units}
    sizes: dict[tuple[int, ...], int] = {}
    for tie in stages[0].ties:
        users = tuple(dict.fromkeys(owners[block][0] for block, _ in tie.uses))
        block, name = tie.uses[0]
        shapes, _ = jax.eval_shape(owners[block][1].initial)
        if len(users) > 1:
            sizes[users] = sizes.get(users, 0) + num_bytes(shapes[name])
    return sizes


def measured_memory(trainer: Any, state: State, batch: Any) -> tuple[State, dict[jax.Device, int]]:
    """Trains like `Trainer.step`, one call after another; gives the bytes of each device.

    They are the most that was held at a time: the state, the batch, what waits for another call,
    and what a call needs while it runs by XLA's own count. Unlike `Device.memory_stats` they do not
    depend on what the process did before, and CPU devices have them too. What else `step` holds
    are batches that are on their way while stages work at the same time.

    Args:
        trainer: a `jdecouple.Trainer`.
        state: its state; donated.
        batch: what `Trainer.step` takes.

    Returns:
        The new state, and bytes by device.

    Raises:
        ValueError: some stages are in other processes.
    """
    return trainer._measured(trainer._engine.measure_memory, state, batch)


class Trained(Protocol):
    """What is read of a `jdecouple.Trainer`."""

    method: Method
    stages: tuple[Stage, ...]
    placements: tuple[StageDevices, ...]


class SufficientDirection:
    """How well the gradients of Features Replay agree with those of backpropagation.

    For every stage k but the last, on the batch that it replays next: g is the gradient that it
    will use, from its kept input and a late error, and g* the gradient of backpropagation through
    all stages with their current weights. The sufficient direction constant of the stage is
    <g*, g> / |g*|^2 (arXiv 1807.04511, assumption 1), and the cosine of the two stands beside it.

    A call costs K - 1 forwards and backwards of the whole net, on the devices of the first stage.

    Args:
        trainer: one whose route replays and whose stages this process runs.

    Raises:
        ValueError: another route, or stages in other processes.
    """

    def __init__(self, trainer: Trained):
        route = trainer.method.route
        if not (isinstance(route, Delayed) and route.replay and route.forward_pass == "locked"):
            raise ValueError(
                f"the sufficient direction of method {trainer.method.name} is not defined: "
                "its stages keep no inputs to replay, as those of fr do"
            )
        if not all(placement.fully_addressable for placement in trainer.placements):
            raise ValueError("the sufficient direction needs all stages in one process")
        self._stages = trainer.stages
        self._route = route
        placement = trainer.placements[0]
        self._sharding = placement.replicated
        self._measure = jit(self._directions, placement)

    def __call__(self, state: State) -> dict[str, jax.Array]:
        """Measures one state.

        Args:
            state: state of the trainer; not changed.

        Returns:
            "stage_{k}/sufficient_direction" and "stage_{k}/cosine" as futures; nan while the
            stage has nothing to replay, none where nothing is late.
        """
        stages = tuple(state.stages)
        if "queues" not in stages[0]:
            return {}
        measured = self._measure(jax.device_put(stages, self._sharding), state.step)
        directions: dict[str, jax.Array] = {}
        for k, values in enumerate(measured):
            exists = self._waiting(k, state.step) >= state.since
            directions |= values if exists else or_nan(False, values)
        return directions

    def _waiting(self, k: int, step: Any) -> Any:
        """Number of the batch that stage `k` replays next."""
        return step - (len(self._stages) - 1 - k)

    def _directions(self, states: tuple, step: jax.Array) -> list[dict[str, jax.Array]]:
        """Of every stage but the last; zeros where nothing waits."""
        directions = []
        for k, stage in enumerate(self._stages[:-1]):
            batch = self._waiting(k, step)
            step_id = jnp.stack([batch, jnp.zeros_like(batch)])
            queues = states[k]["queues"]
            used, _ = self._route.backward(
                stage, states[k], queues["residuals"][0], queues["errors"][0], step_id
            )
            true = self._backpropagate(states, k, states[0]["queues"]["residuals"][k], step_id)
            product, length = _dot(true, used), _dot(true, true)
            exists = batch >= states[k]["since"]
            values = {
                "sufficient_direction": product / length,
                "cosine": product / jnp.sqrt(length * _dot(used, used)),
            }
            directions.append(
                {f"stage_{k}/{name}": jnp.where(exists, x, 0) for name, x in values.items()}
            )
        return directions

    def _backpropagate(self, states: tuple, index: int, carry: Carry, step_id: jax.Array) -> Any:
        """Gradient of one stage by backpropagation through all."""
        linearizations = []
        for stage, state in zip(self._stages, states, strict=True):
            _, _, linearized, carry = linearize(stage, state, carry, step_id)
            linearizations.append(linearized)
        error = None
        factor = loss_scale.factor_of(states[-1])
        pairs = [*zip(self._stages, linearizations, strict=True)]
        for stage, linearized in reversed(pairs[index:]):
            gradients, error = pull_back(stage, linearized, error, factor)
        return gradients


def _dot(first: Any, second: Any) -> jax.Array:
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, first, second)), jnp.zeros(()))
