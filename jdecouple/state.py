"""What training changes, how its arrays are called, and where they lie."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jdecouple.pipeline import Seat
from jdecouple.routes import Message, Stage


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Everything that training changes.

    Attributes:
        step: batches dispatched so far.
        stages: state of every stage ("params", "stats", "opt", and with a delayed method
            "waiting"); None for the stages of other
            processes. `Trainer.step` donates it: keep the returned state, not the old one.
            With engine "spmd" the arrays are stacked, and cut when a stage is asked for.
    """

    step: int
    stages: Any


@dataclasses.dataclass(frozen=True)
class PlacedBatch:
    """A global batch on the devices, one message a microbatch; made by `Trainer.put`."""

    parts: tuple[Message | None, ...]


@dataclasses.dataclass(frozen=True)
class PlacedChunk:
    """Consecutive global batches on the devices; made by `Trainer.put_chunk`.

    Attributes:
        parts: one message a microbatch, [count, batch, ...]; of a single batch as `PlacedBatch`.
        count: how many batches.
    """

    parts: tuple[Message | None, ...]
    count: int


def leaf_names(stage: Stage, values: Any) -> list[str]:
    """Names of the leaves of a stage's state, in the order of its leaves."""
    names = []
    for path, _ in jax.tree_util.tree_leaves_with_path(values):
        kind, *rest = (jax.tree_util.keystr((key,), simple=True) for key in path)
        owner = f"stage_{stage.index}"
        if kind in ("params", "stats", "opt"):
            unit, *rest = rest
            owner = f"block_{stage.units[int(unit)].index}"
        names.append("/".join([owner, kind, *rest]))
    return names


def place(stage: Stage, seat: Seat, values: Any) -> Any:
    """Puts (parts of) the state of a stage on its devices, in memory of its own."""
    size = stage.message["label"].shape[0]
    queues = {key: values[key] for key in values if key == "waiting"}
    others = {key: values[key] for key in values if key != "waiting"}
    return {
        **seat.place(others, own=True, sharding=lambda leaf: seat.replicated),
        **seat.place(queues, own=True, sharding=lambda leaf: seat.waiting(leaf, size)),
    }


def modules(
    stages: Sequence[Stage], state: State
) -> list[tuple[nnx.Module | None, nnx.Module | None]]:
    """Every block and its head as nnx modules; None for those of other processes."""
    pairs: list[tuple[nnx.Module | None, nnx.Module | None]] = []
    for stage, values in zip(stages, state.stages, strict=True):
        for number, unit in enumerate(stage.units):
            if values is None:
                pairs.append((None, None))
                continue
            # Copies, because the next step donates the state's own buffers; bound to no device,
            # because a caller applies blocks of several stages to one input.
            own = values["params"][number], values["stats"][number]
            copy = jax.tree.map(lambda leaf: jnp.asarray(np.array(leaf)), own)
            pairs.append(unit.modules(*copy))
    return pairs
