"""Which devices a stage owns."""

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from numbers import Integral
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jdecouple._errors import require_int
from jdecouple.schedules import Schedule


@dataclasses.dataclass(frozen=True)
class StageMesh:
    """The `stage` x `data` mesh: a group of devices for every stage.

    Unlike `jax.sharding.Mesh` it may name a device in several groups, because more stages than
    devices is legal, and its groups may differ in size, because early blocks may need more replicas
    than late ones.

    Attributes:
        device_groups: devices of every stage, one a replica.
    """

    device_groups: tuple[tuple[Any, ...], ...]

    @property
    def shape(self) -> dict[str, int]:
        """Number of stages, and the number of parts that a batch must divide into."""
        return {
            "stage": len(self.device_groups),
            "data": math.lcm(*map(len, self.device_groups)),
        }


@dataclasses.dataclass(frozen=True)
class DescribedDevice:
    """A device that need not be there, to design a training for; `id` tells it from others."""

    id: int

    @property
    def process_index(self) -> int:
        """It counts as one of this process."""
        return jax.process_index()

    def __repr__(self) -> str:
        return f"described device {self.id}"


def described(count: int) -> tuple[DescribedDevice, ...]:
    """So many devices for `make_mesh(..., devices=...)`, and that for `design.make_design`."""
    return tuple(map(DescribedDevice, range(count)))


def make_mesh(
    stages: int = 1,
    data: int = 1,
    *,
    replicas: Sequence[int] | None = None,
    devices: Sequence[Any] | None = None,
) -> StageMesh:
    """Lays devices out as `stages` groups of `data` replicas.

    With fewer devices than stages x data, neighbouring stages share a group; the numbers that
    training yields are the same.

    Args:
        stages: K, at least 1.
        data: D, devices that hold a replica of each stage; at least 1.
        replicas: replicas of each stage, where they differ; instead of `stages` and `data`.
        devices: devices to use; by default all, of all processes, in JAX's order.

    Raises:
        ValueError: a size that is no whole number of at least 1, fewer than `data` devices, or
            fewer than the sum of `replicas`.

    >>> mesh = make_mesh(stages=3, data=1, devices=jax.devices()[:1])
    >>> mesh.shape, len(set(mesh.device_groups))
    ({'stage': 3, 'data': 1}, 1)
    """
    available = list(jax.devices() if devices is None else devices)
    if replicas is not None:
        return _uneven(tuple(replicas), available)
    require_int(1, **{"mesh axis stages": stages, "mesh axis data": data})
    if data > len(available):
        raise ValueError(
            f"mesh axis data is {data}, but only {len(available)} device(s) are present"
        )
    count = min(stages, len(available) // data)
    groups = [tuple(available[k * data : (k + 1) * data]) for k in range(count)]
    return StageMesh(assign_devices(groups, stages))


def _uneven(replicas: tuple[int, ...], available: Sequence[Any]) -> StageMesh:
    integral = all(isinstance(n, Integral) and not isinstance(n, bool) for n in replicas)
    if not replicas or not integral or min(replicas) < 1:
        raise ValueError(
            f"replicas are {replicas}: a whole number of at least 1 is needed for every stage"
        )
    if sum(replicas) > len(available):
        raise ValueError(
            f"replicas {replicas} need {sum(replicas)} devices, but only {len(available)} are "
            "present"
        )
    ends = list(itertools.accumulate(replicas))
    return StageMesh(tuple(tuple(available[a:b]) for a, b in itertools.pairwise((0, *ends))))


def assign_devices(device_groups: Sequence[tuple], num_stages: int) -> tuple[tuple, ...]:
    """Gives `num_stages` stages their device groups, in order, as evenly as possible."""
    count = len(device_groups)
    return tuple(device_groups[stage * count // num_stages] for stage in range(num_stages))


def device_groups(table: Schedule, mesh: StageMesh) -> tuple[tuple[Any, ...], ...]:
    """Devices of every stage of a schedule, on a mesh of any size.

    Interleaved stages of a local method go round the mesh, whatever their number: what waits in
    their queues does not depend on it.
    """
    if table.sums_late:
        size = len(mesh.device_groups)
        return tuple(mesh.device_groups[k % size] for k in range(table.num_stages))
    own = assign_devices(mesh.device_groups, table.num_device_groups)
    return tuple(own[table.device_group(k)] for k in range(table.num_stages))


def placed(table: Schedule, mesh: StageMesh) -> Schedule:
    """The schedule with the device groups that its stages have on a mesh."""
    groups = device_groups(table, mesh)
    numbers = {devices: number for number, devices in enumerate(dict.fromkeys(groups))}
    return dataclasses.replace(table, placement=tuple(numbers[devices] for devices in groups))


def as_stage_mesh(mesh: Any) -> StageMesh:
    """Accepts a `StageMesh` or a `jax.sharding.Mesh` with the axes `stage` and `data`."""
    if isinstance(mesh, StageMesh):
        return mesh
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh is a {type(mesh).__name__}: jdecouple.make_mesh(...) gives one")
    if sorted(mesh.axis_names) not in (["data", "stage"], ["stage"]):
        raise ValueError(f"mesh axes are {mesh.axis_names}: 'stage' and 'data' are needed")
    devices = mesh.devices
    if mesh.axis_names == ("data", "stage"):
        devices = devices.T
    return StageMesh(tuple(tuple(group) for group in devices.reshape(devices.shape[0], -1)))


@dataclasses.dataclass(frozen=True)
class StageDevices:
    """The devices of one stage, and how arrays lie on them.

    Attributes:
        devices: one a replica.
        batched: sharding of arrays [batch, ...].
        replicated: sharding of weights and scalars.
        addressable: whether this process runs the stage.
        fully_addressable: whether no other process takes part.
        axis: of a carry's arrays the one that counts examples; before it, batches are stacked.
        shard_optimizer: whether every replica holds a part of the optimiser's state alone.
    """

    devices: tuple[jax.Device, ...]
    batched: NamedSharding
    replicated: NamedSharding
    addressable: bool
    fully_addressable: bool
    axis: int = 0
    shard_optimizer: bool = False

    @classmethod
    def on(cls, devices: tuple[jax.Device, ...], shard_optimizer: bool = False) -> "StageDevices":
        """StageDevices of a device group."""
        mesh = Mesh(np.array(devices), ("data",))
        here = [device.process_index == jax.process_index() for device in devices]
        return cls(
            devices,
            NamedSharding(mesh, PartitionSpec("data")),
            NamedSharding(mesh, PartitionSpec()),
            addressable=any(here),
            fully_addressable=all(here),
            shard_optimizer=shard_optimizer and len(devices) > 1,
        )

    @property
    def stacked(self) -> "StageDevices":
        """The same devices for carries of several batches, [T, batch, ...] and [T]."""
        batched = NamedSharding(self.batched.mesh, PartitionSpec(None, "data"))
        return dataclasses.replace(self, batched=batched, axis=1)

    @cached_property
    def processes(self) -> frozenset[int]:
        """Indices of the processes that run the stage."""
        return frozenset(device.process_index for device in self.devices)

    def sharding(self, leaf: Any) -> NamedSharding:
        """Sharding of a carry's leaf: [batch, ...] over `data`, scalars everywhere."""
        return self.batched if np.ndim(leaf) > self.axis else self.replicated

    def local_indices(self, size: int) -> np.ndarray:
        """Positions in arrays [size, ...] over `data` that lie on devices of this process."""
        parts = self.batched.addressable_devices_indices_map((size,)).values()
        return np.unique(np.concatenate([np.arange(0), *(np.arange(size)[part] for part in parts)]))

    def queue_sharding(self, leaf: Any, size: int) -> NamedSharding:
        """Sharding of a leaf of a queue; `size` examples in a microbatch."""
        batched = leaf.ndim and leaf.shape[0] % size == 0
        return self.batched if batched else self.replicated

    def update_spec(self, leaf: Any) -> PartitionSpec:
        """How a gradient, or a leaf of the optimiser's state, lies on the replicas."""
        return replica_spec(leaf, len(self.devices) if self.shard_optimizer else 1)

    def on_mesh(self, spec: PartitionSpec) -> NamedSharding:
        """A sharding on the devices."""
        return NamedSharding(self.batched.mesh, spec)

    def update_shardings(self, tree: Any) -> Any:
        """Shardings of gradients, or of (parts of) the optimiser's state."""
        return jax.tree.map(lambda leaf: self.on_mesh(self.update_spec(leaf)), tree)

    def state_shardings(self, state: dict[str, Any], size: int) -> dict[str, Any]:
        """Shardings of (parts of) the state of a stage.

        Over `data` are what is of examples and, where it is sharded, the optimiser's state.
        """

        def shardings(part: str, tree: Any) -> Any:
            if part in ("opt", "tied"):
                return self.update_shardings(tree)
            of_examples = part in ("queues", "feedback")
            return jax.tree.map(
                lambda leaf: self.queue_sharding(leaf, size) if of_examples else self.replicated,
                tree,
            )

        return {part: shardings(part, tree) for part, tree in state.items()}

    def constrain(self, carry: Any) -> Any:
        """Tells the compiler how a carry lies; for traced arrays."""
        return jax.lax.with_sharding_constraint(carry, jax.tree.map(self.sharding, carry))

    def constrain_queue(self, tree: Any, size: int) -> Any:
        """As `constrain`, for what is queued."""
        shardings = jax.tree.map(lambda leaf: self.queue_sharding(leaf, size), tree)
        return jax.lax.with_sharding_constraint(tree, shardings)

    def place(self, tree: Any, shardings: Any = None) -> Any:
        """Uploads a tree of host or device arrays: a carry, or with `shardings` a state.

        A state never shares memory with its source, because training donates it.
        """
        own = shardings is not None

        def put(leaf: Any, target: NamedSharding) -> jax.Array:
            if own and len(self.devices) > 1 and isinstance(leaf, jax.Array):
                leaf = np.array(leaf)  # may_alias holds for single devices alone
            if self.fully_addressable:
                return jax.device_put(leaf, target, may_alias=False if own else None)
            value = np.asarray(leaf)
            return jax.make_array_from_callback(value.shape, target, lambda index: value[index])

        return jax.tree.map(put, tree, shardings if own else jax.tree.map(self.sharding, tree))


def replica_spec(leaf: Any, replicas: int) -> PartitionSpec:
    """Cuts the first axis of an array that divides into so many parts over `data`, if one does.

    Whole numbers stay whole: they are counts and keys.

    >>> tuple(replica_spec(np.zeros((3, 4, 2)), 2)), tuple(replica_spec(np.zeros(3), 2))
    ((None, 'data'), ())
    >>> tuple(replica_spec(np.zeros(2, np.uint32), 2))
    ()
    """
    if replicas == 1 or not jax.numpy.issubdtype(leaf.dtype, np.inexact):
        return PartitionSpec()
    axes = [axis for axis, size in enumerate(leaf.shape) if size and size % replicas == 0]
    return PartitionSpec(*(None,) * axes[0], "data") if axes else PartitionSpec()


def require_one_process(placements: Sequence[StageDevices]) -> None:
    """Raises ValueError, for a measurement, where another process runs a stage."""
    if not all(placement.fully_addressable for placement in placements):
        raise ValueError("measuring needs all stages in one process")


# XLA's library for CPUs keeps single products. By default it also takes over convolutions, on one
# thread, and the gradient of a filter as a convolution with a window as large as the image. What
# is fused to a product or a sum may be wrong in jaxlib 0.10.1 and 0.10.2 (jax issue 39103: the last
# row of some arrays) and end the process in 0.10.0 to 0.11.0 (39257, 40412).
# The order of operations that needs the least memory takes no more time (bench/RESULTS.md).
_CPU = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
}
# Between processes one sum of all gradients would wait for the last of them, and the update for
# all. One by one they are on their way while the backward goes on, in as many messages.
_CPU_PROCESSES = {**_CPU, "xla_disable_hlo_passes": "cpu-all-reduce-combiner"}
# Lets several GPUs sum some gradients while they compute others. XLA has it off, NVIDIA's images on
# (docs.nvidia.com/jax-toolbox/environment-variables); a program of one GPU has no use for it.
_GPUS = {"xla_gpu_enable_latency_hiding_scheduler": "True"}
_OPTIONS = {
    ("cpu", "device"): _CPU,
    ("cpu", "devices"): _CPU,
    ("cpu", "processes"): _CPU_PROCESSES,
    ("gpu", "devices"): _GPUS,
    ("gpu", "processes"): _GPUS,
}
"""By the platform, and by what a program spans."""


def jit(function: Callable, placement: StageDevices, **options: Any) -> Any:
    """`jax.jit` for calls on the devices of a stage: all that the package runs goes through it."""
    return jax.jit(function, compiler_options=compiler_options(placement), **options)


def compiler_options(placement: StageDevices) -> dict[str, Any] | None:
    """`compiler_options` of `jax.jit` for calls on the devices of a stage, or None."""
    several = len(placement.devices) > 1
    span = "processes" if len(placement.processes) > 1 else "devices" if several else "device"
    return _known(placement.devices[0].platform, span)


@functools.cache
def _known(platform: str, span: str) -> dict[str, Any] | None:
    """The options that XLA_FLAGS does not set; None if there are none, or XLA refuses one."""
    given = os.environ.get("XLA_FLAGS", "")
    table = _OPTIONS.get((platform, span), {})
    options = {name: value for name, value in table.items() if name not in given}
    if not options:
        return None
    try:
        with jax.default_device(jax.local_devices(backend=platform)[0]):
            jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return None
    return options
