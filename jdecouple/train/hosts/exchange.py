"""What the processes of a run exchange: the metrics of steps, and the arrays of checkpoints."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jdecouple.methods.routes import with_whole_norm
from jdecouple.train.hosts.group import MultiProcess
from jdecouple.train.hosts.link import Message

_BLOCK = re.compile(r"block_(\d+)/(loss|accuracy)")


def merge_metrics(
    processes: MultiProcess, rows: Sequence[Mapping[str, Any]], *, summed: bool
) -> list[Mapping[str, Any]]:
    """Metrics of steps, of all blocks, on the first process; an empty list on the others.

    All call it, with those of their own blocks, on the host. `summed` says whether the blocks'
    losses are of one batch; else the last stage has their sum.
    """
    if processes.count == 1:
        return list(rows)
    own = [{name: float(value) for name, value in row.items()} for row in rows]
    by_process = (message.value for message in processes.collect(own))
    return [_merged(parts, summed) for parts in zip(*by_process, strict=True)]


def _merged(parts: Sequence[dict[str, float]], summed: bool) -> dict[str, Any]:
    row: dict[str, Any] = {name: value for part in parts for name, value in part.items()}
    blocks = sorted((int(m[1]), m[2], row[m[0]]) for m in map(_BLOCK.fullmatch, row) if m)
    if summed:
        # Added up as the stages do, in their order and precision.
        row["loss"] = sum((np.float32(v) for _, kind, v in blocks if kind == "loss"), np.float32(0))
    if exits := [value for _, kind, value in blocks if kind == "accuracy"]:
        row["accuracy"] = exits[-1]
    return with_whole_norm(row)


def gather(processes: MultiProcess, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Arrays of all processes on the host of the first; nothing on the others.

    All call it, with arrays by name of which they may hold parts.
    """
    if processes.count == 1:
        return {name: np.asarray(value) for name, value in arrays.items()}
    shards = [
        (name, value.shape, shard)
        for name, value in arrays.items()
        for shard in value.addressable_shards
        if shard.replica_id == 0  # of equal parts one is enough
    ]
    specs = [
        (name, shape, [axis.start or 0 for axis in shard.index]) for name, shape, shard in shards
    ]
    parts = jax.device_get([shard.data for _, _, shard in shards])
    gathered: dict[str, np.ndarray] = {}
    for message in processes.collect(specs, parts):
        for (name, shape, starts), part in zip(message.value, message.arrays, strict=True):
            if part.shape == tuple(shape):
                gathered[name] = part
                continue
            target = gathered.setdefault(name, np.empty(shape, part.dtype))
            target[tuple(slice(s, s + n) for s, n in zip(starts, part.shape, strict=True))] = part
    return gathered


def scatter(
    processes: MultiProcess, wanted: Sequence[str], arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Gives every process the arrays that it wants, by name, of those that the first has."""
    if processes.count == 1:
        return dict(arrays)
    requests = processes.collect(list(wanted))
    answers = [[name for name in names if name in arrays] for _, names, _ in requests]
    own = processes.distribute(
        [Message("data", names, [arrays[name] for name in names]) for names in answers]
    )
    return dict(zip(own.value, own.arrays, strict=True))
