"""What the processes of a run exchange: the metrics of steps, and the arrays of checkpoints."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jdecouple.train.hosts.group import SingleProcess
from jdecouple.train.hosts.link import Message

_BLOCK = re.compile(r"block_(\d+)/(loss|accuracy)")


def merged_rows(hosts: SingleProcess, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Metrics of steps, of all blocks.

    Args:
        hosts: the processes.
        rows: metrics of each step, of the blocks of this process, on the host.

    Returns:
        On the first process the metrics of each step; nothing on the others.
    """
    if hosts.count == 1:
        return [dict(row) for row in rows]
    found = hosts.collect([{name: float(value) for name, value in row.items()} for row in rows])
    return [_merged(parts) for parts in zip(*(each.value for each in found), strict=True)]


def _merged(parts: Sequence[dict[str, float]]) -> dict[str, Any]:
    row: dict[str, Any] = {name: value for part in parts for name, value in part.items()}
    blocks = sorted((int(m[1]), m[2], row[m[0]]) for m in map(_BLOCK.fullmatch, row) if m)
    # Added up as the stages do, in their order and precision.
    row["loss"] = sum((np.float32(v) for _, kind, v in blocks if kind == "loss"), np.float32(0))
    if exits := [value for _, kind, value in blocks if kind == "accuracy"]:
        row["accuracy"] = exits[-1]
    return row


def gather(hosts: SingleProcess, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Arrays of all processes on the host of the first; nothing on the others.

    Args:
        hosts: the processes.
        arrays: arrays on devices, of which this process may hold parts, by name.
    """
    if hosts.count == 1:
        return {name: np.asarray(value) for name, value in arrays.items()}
    for value in arrays.values():
        for shard in value.addressable_shards:
            if shard.replica_id == 0:
                shard.data.copy_to_host_async()
    specs, parts = [], []
    for name, value in arrays.items():
        for shard in value.addressable_shards:
            if shard.replica_id == 0:  # of equal parts one is enough
                begins = [each.start or 0 for each in shard.index]
                specs.append((name, value.shape, begins))
                parts.append(np.asarray(shard.data))
    whole: dict[str, np.ndarray] = {}
    for message in hosts.collect(specs, parts):
        for (name, shape, begins), part in zip(message.value, message.arrays, strict=True):
            if part.shape == tuple(shape):
                whole[name] = part
                continue
            target = whole.setdefault(name, np.empty(shape, part.dtype))
            target[tuple(slice(b, b + n) for b, n in zip(begins, part.shape, strict=True))] = part
    return whole


def hand_out(
    hosts: SingleProcess, wanted: Sequence[str], arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Gives every process the arrays that it wants, of those that the first has.

    Args:
        hosts: the processes.
        wanted: names that this process wants.
        arrays: all arrays, on the first process.
    """
    if hosts.count == 1:
        return dict(arrays)
    messages = None
    if asked := hosts.collect(list(wanted)):
        messages = [
            Message("data", each.value, [arrays[name] for name in each.value]) for each in asked
        ]
    own = hosts.distribute(messages)
    return dict(zip(own.value, own.arrays, strict=True))
