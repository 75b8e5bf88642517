"""The program of the SPMD engine: what every device group runs under `jax.shard_map`.

`jax.lax.scan` goes over ticks. In each a device group takes one carry, or is idle while the
pipeline fills and drains, and `jax.lax.ppermute` sends the next carry on. The data axis is left to
the compiler, which cuts the same functions over it as it does in the calls of single stages.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jdecouple.methods.routes import Carry, Metrics, Route, loss_scale, repeated, with_whole_norm
from jdecouple.pipeline.mesh import jit
from jdecouple.pipeline.spmd.device_group import DeviceGroup, Slots
from jdecouple.pipeline.spmd.sharded_state import Arrays, Layout
from jdecouple.pipeline.state import metric_names
from jdecouple.pipeline.step_metrics import JoinedMetrics

STAGE = PartitionSpec("stage")
BATCHES = PartitionSpec("stage", None, "data")  # [device groups x T, M, batch, ...]


class Program:
    """T batches through all device groups; begins and ends with an empty pipeline.

    Device groups whose blocks are of the same classes share one traced function, a pattern. A group
    chooses its own by its index, so the ends cost nothing elsewhere. The route is local or
    synchronous.
    """

    def __init__(self, layout: Layout, route: Route):
        self._layout = layout
        self._route = route
        self._groups = len(layout.device_groups)
        self._has_replicas = layout.mesh.shape["data"] > 1
        self._stage = layout.stages[0]
        self._patterns: list[DeviceGroup] = []
        self._pattern_of: list[int] = []  # of every device group
        self._shifts: list[int] = []  # blocks between the group and the first of its pattern
        self._find_patterns()

    @cached_property
    def call(self) -> Callable:
        """Compiled: (arrays, carries of batches, number of the first) -> (arrays, table).

        The arrays are donated. The table [device groups x T, width] holds a line of metrics for
        every batch in every device group, and lies on every device.
        """
        train = self._local if self._route.local else self._synchronous

        def spmd(arrays: Arrays, batches: tuple[Carry, ...], step: jax.Array) -> tuple:
            batch = batches[0]
            if len(batches) > 1:
                batch = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *batches)
            # Scalars are stacked as [1], and optimisers may branch on them.
            blocks = jax.tree.map(_reshape, arrays, self._layout.slot_shapes)
            blocks, table = train(blocks, self._constrain(batch, None, None, "data"), step)
            return jax.tree.map(_reshape, blocks, arrays), table

        sharded = jax.shard_map(
            spmd,
            mesh=self._layout.mesh,
            in_specs=(STAGE, STAGE, PartitionSpec()),
            out_specs=STAGE,
            axis_names={"stage"} if self._has_replicas else {"stage", "data"},
            check_vma=False,
        )
        replicated = NamedSharding(self._layout.mesh, PartitionSpec())
        shardings = self._layout.shardings, replicated
        return jit(sharded, self._layout.placements[0], donate_argnums=0, out_shardings=shardings)

    @cached_property
    def metrics(self) -> Callable:
        """Compiled: (table on one device, whether of one batch) -> metrics, [n] or [T, n].

        A call of its own, because the other would return every metric on every device.
        """

        def metrics(table: jax.Array, single: bool) -> JoinedMetrics:
            table = table.reshape(self._groups, -1, self._width)
            found = {
                name: table[group, 0, column] if single else table[group, :, column]
                for name, (group, column) in self._columns.items()
            }
            return JoinedMetrics.of(with_whole_norm(found))

        return jit(metrics, self._layout.placements[0], static_argnums=1)

    # --- The routes -------------------------------------------------------------------------------

    def _local(self, arrays: Arrays, batches: Carry, step: jax.Array) -> tuple[Arrays, jax.Array]:
        """Every tick trains every device group on a batch of its own.

        Returns the new arrays, and a line of metrics for every batch: [T, width].
        """
        group = jax.lax.axis_index("stage")
        count, parts = batches["label"].shape[:2]
        nothing = self._empty_carry(parts)

        def train(pattern: DeviceGroup) -> Callable:
            def call(arrays: Arrays, received: Carry, number: jax.Array) -> tuple:
                if pattern.is_first:
                    received = jax.tree.map(lambda leaf: leaf[number], batches)
                arrays, carry, metrics = pattern.train(arrays, received, step + number)
                return arrays, nothing if pattern.is_last else carry, self._line(pattern, metrics)

            return call

        def idle(arrays: Arrays, received: Carry, number: jax.Array) -> tuple:
            return arrays, nothing, jnp.zeros(self._width, jnp.float32)

        branches, own = self._choose(group, train)

        def tick(loop: tuple, time: jax.Array) -> tuple[tuple, Any]:
            arrays, received = loop
            number = time - group
            exists = (number >= 0) & (number < count)
            arrays, carry, line = jax.lax.switch(
                jnp.where(exists, own, len(branches)), [*branches, idle], arrays, received, number
            )
            carry = self._send(self._constrain(carry, None, "data"))
            return (self._constrain_state(arrays), carry), line

        times = jnp.arange(count + self._groups - 1, dtype=jnp.int32)
        (arrays, _), lines = jax.lax.scan(tick, (arrays, nothing), times)
        return arrays, jax.lax.dynamic_slice_in_dim(lines, group, count)

    def _synchronous(
        self, arrays: Arrays, batches: Carry, step: jax.Array
    ) -> tuple[Arrays, jax.Array]:
        """Batch after batch: the microbatches go up, their errors down, then all groups step."""
        group = jax.lax.axis_index("stage")
        steps, own = self._choose(group, lambda pattern: pattern.step)
        norms, _ = self._choose(group, lambda pattern: pattern.squared_norm)
        factors, _ = self._choose(group, lambda pattern: pattern.loss_factor)
        lines, _ = self._choose(
            group, lambda pattern: lambda grads: self._line(pattern, pattern.norms(grads))
        )

        def train(arrays: Arrays, numbered: tuple) -> tuple:
            number, carries = numbered
            parts = carries["label"].shape[0]
            factor = jax.lax.switch(own, factors, arrays)
            gradients, (stats, line) = jax.grad(self._loss, has_aux=True)(
                arrays["params"], arrays["stats"], carries, number, group, factor
            )
            gradients = self._constrain(loss_scale.unscaled(gradients, factor))
            line = line / parts
            if self._stage.gradient_norms:
                line = line + jax.lax.switch(own, lines, gradients)
            squared = None
            if self._stage.needs_norm:
                squared = jax.lax.psum(jax.lax.switch(own, norms, gradients), "stage")
                values = {
                    "gradient_norm": jnp.sqrt(squared),
                    "loss_scale": factor,
                    "skipped": ~jnp.isfinite(squared),
                }
                shared = [jnp.asarray(values[name], line.dtype) for name in self._shared]
                line = jnp.concatenate([line[: -len(shared)], jnp.stack(shared)])
            arrays = jax.lax.switch(own, steps, {**arrays, "stats": stats}, gradients, squared)
            return self._constrain_state(arrays), line

        count = batches["label"].shape[0]
        numbers = step + jnp.arange(count, dtype=jnp.int32)
        return jax.lax.scan(train, arrays, (numbers, batches))

    def _loss(
        self,
        params: Slots,
        stats: Slots,
        carries: Carry,
        number: jax.Array,
        group: jax.Array,
        factor: jax.Array | None,
    ) -> tuple[jax.Array, tuple]:
        """Losses of a device group over all microbatches; moved statistics and sums of metrics.

        The losses are multiplied by `factor`, if there is one.
        Differentiated on every device group at once: the transpose of `ppermute` sends errors down.
        """
        parts = carries["label"].shape[0]
        nothing = self._empty_carry()
        scalar = jax.dtypes.canonicalize_dtype(jnp.float64)

        def forward(pattern: DeviceGroup) -> Callable:
            def call(params: Slots, stats: Slots, received: Carry, part: jax.Array) -> tuple:
                if pattern.is_first:
                    received = jax.tree.map(lambda leaf: leaf[part], carries)
                stats, carry, loss, metrics = pattern.forward(
                    params, stats, received, jnp.stack([number, part])
                )
                line = self._line(pattern, metrics)
                return stats, nothing if pattern.is_last else carry, loss, line

            return call

        def idle(params: Slots, stats: Slots, received: Carry, part: jax.Array) -> tuple:
            return stats, nothing, jnp.zeros((), scalar), jnp.zeros(self._width, jnp.float32)

        branches, own = self._choose(group, forward)

        def one(params: Slots, stats: Slots, received: Carry, part: jax.Array) -> tuple:
            exists = (part >= 0) & (part < parts)
            index = jnp.where(exists, own, len(branches))
            return jax.lax.switch(index, [*branches, idle], params, stats, received, part)

        # Without remat this keeps what would be kept anyhow; but the weights once, instead of a
        # copy for every tick.
        one = repeated(one, self._layout.stages[0].remat, prevent_cse=False)

        def tick(loop: tuple, time: jax.Array) -> tuple:
            stats, received, total, sums = loop
            stats, carry, loss, line = one(params, stats, received, time - group)
            carry = self._send(self._constrain(carry, "data"))
            return (self._constrain(stats), carry, total + loss, sums + line), None

        times = jnp.arange(parts + self._groups - 1, dtype=jnp.int32)
        loop = stats, nothing, jnp.zeros((), scalar), jnp.zeros(self._width, jnp.float32)
        (stats, _, total, sums), _ = jax.lax.scan(tick, loop, times)
        return total if factor is None else total * factor, (stats, sums)

    # --- What they share --------------------------------------------------------------------------

    def _choose(
        self, group: jax.Array, function: Callable[[DeviceGroup], Callable]
    ) -> tuple[list[Callable], jax.Array]:
        """A function for every pattern, and the index of this device group's."""
        shift = jnp.asarray(self._shifts, jnp.uint32)[group] if any(self._shifts) else 0
        # A pattern of one group needs no shift that is known at run time alone.
        branches = [
            function(pattern.shifted(shift) if self._pattern_of.count(number) > 1 else pattern)
            for number, pattern in enumerate(self._patterns)
        ]
        return branches, jnp.asarray(self._pattern_of, jnp.int32)[group]

    def _send(self, carry: Carry) -> Carry:
        """Sends a carry to the next device group."""
        return jax.lax.ppermute(carry, "stage", [(k, k + 1) for k in range(self._groups - 1)])

    def _constrain(self, tree: Any, *spec: str | None) -> Any:
        """Tells the compiler how to cut a tree over the data axis; scalars are not cut."""
        if not self._has_replicas:
            return tree

        def constrain(leaf: jax.Array) -> jax.Array:
            axes = spec if leaf.ndim >= len(spec) else ()
            return jax.lax.with_sharding_constraint(leaf, PartitionSpec(*axes))

        return jax.tree.map(constrain, tree)

    def _constrain_state(self, arrays: Arrays) -> Arrays:
        """Tells the compiler how the state of a device group lies on its replicas."""
        if not self._has_replicas:
            return arrays
        return jax.tree.map(jax.lax.with_sharding_constraint, arrays, self._layout.specs)

    def _empty_carry(self, *stacked: int) -> Carry:
        """Zeros in the shapes of a carry between device groups; {} where there is one group."""
        if self._groups == 1:
            return {}
        received = self._layout.stages[self._layout.device_groups[1][0]].carry
        shapes = {**received, "loss": jax.ShapeDtypeStruct((), jnp.float32)}
        return jax.tree.map(lambda leaf: jnp.zeros((*stacked, *leaf.shape), leaf.dtype), shapes)

    # --- Metrics ----------------------------------------------------------------------------------

    def _line(self, pattern: DeviceGroup, metrics: Metrics) -> jax.Array:
        """Metrics of a device group as a line of the table; 0 for those that are not there."""
        values = [metrics.get(name, jnp.float32(0)) for name in pattern.names]
        # A padding, as `.at[].set` crashes the compiler of jaxlib 0.11 inside `shard_map`.
        return jnp.pad(jnp.stack(values), (0, self._width - len(values)))

    @cached_property
    def _columns(self) -> dict[str, tuple[int, int]]:
        """Device group and column of every metric; sums over blocks are those of the last group."""
        columns = {}
        for group, (pattern, shift) in enumerate(zip(self._pattern_of, self._shifts, strict=True)):
            for column, name in enumerate(self._patterns[pattern].names):
                block, slash, term = name.partition("/")
                if slash:
                    block = f"block_{int(block.removeprefix('block_')) + shift}"
                columns[block + slash + term] = group, column
            for number, name in enumerate(reversed(self._shared), 1):
                columns[name] = group, self._width - number
        return columns

    @cached_property
    def _shared(self) -> tuple[str, ...]:
        """Names of metrics that all groups have alike, in the last columns."""
        if self._route.local:
            return ()
        clips = self._stage.clip_norm is not None
        scales = self._stage.scaling is not None
        return ("gradient_norm",) * clips + ("loss_scale", "skipped") * scales

    @property
    def _width(self) -> int:
        return max(len(pattern.names) for pattern in self._patterns) + len(self._shared)

    # --- Which device groups are alike ------------------------------------------------------------

    def _find_patterns(self) -> None:
        layout, last = self._layout, self._groups - 1
        known: dict[tuple, tuple[int, int]] = {}
        for group, members in enumerate(layout.device_groups):
            stages = tuple(layout.stages[k] for k in members)
            start = stages[0].units[0].index
            key = (
                group == 0,  # batches enter here
                group == last and not self._route.local,  # errors begin here
                tuple(
                    (stage.remat, *(layout.block_classes[unit.index] for unit in stage.units))
                    for stage in stages
                ),
            )
            if key not in known:
                known[key] = len(self._patterns), start
                slots = tuple(layout.owner[k][1] for k in members)
                ends = group == 0, group == last
                names = {name for stage in stages for name in metric_names(stage, self._route)}
                self._patterns.append(
                    DeviceGroup(stages, slots, self._route, *ends, tuple(sorted(names)))
                )
            pattern, first = known[key]
            self._pattern_of.append(pattern)
            self._shifts.append(start - first)


def _reshape(array: jax.Array, like: Any) -> jax.Array:
    return array.reshape(like.shape)
