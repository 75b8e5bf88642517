"""Bytes that training holds on each device."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from jdecouple.pipeline.mesh import StageDevices, require_one_process


class Meter:
    """Watches compiled calls, one after another.

    A call holds what is alive when it begins, its results, and what it needs in between by XLA's
    own count. Arrays that were there before and are not among those of the training do not count.

    Attributes:
        most: bytes of each device when it held most.

    Args:
        placements: devices of every stage.
        given: the arrays of the training: states and batch.

    Raises:
        ValueError: some stages are in other processes.
    """

    def __init__(self, placements: Sequence[StageDevices], given: Any):
        require_one_process(placements)
        self.most = dict.fromkeys(_devices(placements), 0)
        own = _buffers(jax.tree.leaves(given)).keys()
        self._arrays = jax.live_arrays()  # keeps them: what is new has other addresses
        self._others = _buffers(self._arrays).keys() - own

    def watch(self, function: Any, *placements: StageDevices) -> Callable:
        """The jitted function as one that is weighed, and waited for, when it is called."""

        def call(*arguments: Any) -> Any:
            jax.block_until_ready(arguments)
            own = function.lower(*arguments).compile().memory_analysis()
            more = own.temp_size_in_bytes + own.output_size_in_bytes - own.alias_size_in_bytes
            held: Counter[jax.Device] = Counter()
            for (device, address), size in _buffers(jax.live_arrays()).items():
                held[device] += size if (device, address) not in self._others else 0
            for device in _devices(placements):
                self.most[device] = max(self.most[device], held[device] + more)
            return jax.block_until_ready(function(*arguments))

        return call


def num_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, given as they are or as shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _devices(placements: Iterable[StageDevices]) -> set[jax.Device]:
    return {device for placement in placements for device in placement.devices}


def _buffers(arrays: Iterable[jax.Array]) -> dict[tuple[jax.Device, int], int]:
    """Bytes by device and address, as arrays may share their memory; none of the host's."""
    return {
        (shard.device, shard.data.unsafe_buffer_pointer()): shard.data.nbytes
        for array in arrays
        if not array.is_deleted()
        for shard in array.addressable_shards
        if array.sharding.memory_kind in (None, shard.device.default_memory().kind)
    }
