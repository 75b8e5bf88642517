"""The program of the SPMD engine: what every row of the mesh runs under `jax.shard_map`.

`jax.lax.scan` goes over ticks. In each a row takes one carry, or is idle while the pipeline fills
and drains, and `jax.lax.ppermute` hands the next carry on. The data axis is left to the compiler,
which cuts the same functions over it as it does in the calls of single stages.
"""

import dataclasses
from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jdecouple.methods.routes import Carry, Metrics, Route
from jdecouple.pipeline.mesh import compiler_options
from jdecouple.pipeline.spmd.device_group import Arrays, DeviceGroup
from jdecouple.pipeline.spmd.sharded_state import PARTS, Layout

STAGE = PartitionSpec("stage")
BATCHES = PartitionSpec("stage", None, "data")  # [rows x T, M, batch, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """T batches through all rows; begins and ends with an empty pipeline.

    Rows whose blocks are of the same classes share one traced function, a pattern; a row chooses
    its own by its index, so the ends cost nothing elsewhere.

    Attributes:
        layout: the stages, their rows, and where the state of each block lies.
        route: local or synchronous.
    """

    layout: Layout
    route: Route

    @cached_property
    def call(self) -> Any:
        """Compiled: (arrays, carries of batches, number of the first) -> (arrays, table).

        The arrays are donated. The table [rows x T, width] holds a line of metrics for every batch
        in every row.
        """
        program = self._local if self.route.local else self._synchronous

        def spmd(arrays: Arrays, batches: tuple[Carry, ...], step: jax.Array) -> tuple:
            batch = batches[0]
            if len(batches) > 1:
                batch = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *batches)
            return program(arrays, self._lay(batch, None, None, "data"), step)

        sharded = jax.shard_map(
            spmd,
            mesh=self.layout.mesh,
            in_specs=(STAGE, STAGE, PartitionSpec()),
            out_specs=STAGE,
            axis_names={"stage"} if self._has_replicas else {"stage", "data"},
            check_vma=False,
        )
        return jax.jit(
            sharded,
            donate_argnums=0,
            out_shardings=self.layout.sharding,
            compiler_options=compiler_options(self.layout.placements[0]),
        )

    @cached_property
    def columns(self) -> dict[str, tuple[int, int]]:
        """Row and column of every metric; sums over the blocks are those of the last row."""
        found = {}
        for row, (pattern, shift) in enumerate(zip(self._which, self._shifts, strict=True)):
            for column, name in enumerate(self._names[pattern]):
                block, slash, term = name.partition("/")
                if slash:
                    block = f"block_{int(block.removeprefix('block_')) + shift}"
                found[block + slash + term] = row, column
            if self._clips:
                found["gradient_norm"] = row, self._width - 1
        return found

    # --- The rows, and which of them are alike ----------------------------------------------------

    @cached_property
    def _grouped(self) -> tuple[tuple[DeviceGroup, ...], tuple[int, ...], tuple[int, ...]]:
        layout = self.layout
        known: dict[Any, tuple[int, int]] = {}
        patterns: list[DeviceGroup] = []
        which, shifts = [], []
        last = len(layout.rows) - 1
        for number, row in enumerate(layout.rows):
            stages = tuple(layout.stages[k] for k in row)
            start = stages[0].units[0].index
            key = (
                number == 0,  # batches enter here
                number == last and not self.route.local,  # errors begin here
                tuple(
                    (stage.remat, *(layout.block_classes[unit.index] for unit in stage.units))
                    for stage in stages
                ),
            )
            if key not in known:
                known[key] = len(patterns), start
                patterns.append(
                    DeviceGroup(
                        stages, layout.of_row(number), self.route, number == 0, number == last
                    )
                )
            which.append(known[key][0])
            shifts.append(start - known[key][1])
        return tuple(patterns), tuple(which), tuple(shifts)

    @property
    def _patterns(self) -> tuple[DeviceGroup, ...]:
        """The rows that differ from one another."""
        return self._grouped[0]

    @property
    def _which(self) -> tuple[int, ...]:
        """Of every row, its pattern."""
        return self._grouped[1]

    @property
    def _shifts(self) -> tuple[int, ...]:
        """Of every row, how many blocks it lies above the one that gave its pattern."""
        return self._grouped[2]

    @cached_property
    def _message(self) -> Carry:
        """Shapes of a carry between rows; {} where there is one row."""
        rows = self.layout.rows
        if len(rows) == 1:
            return {}
        received = self.layout.stages[rows[1][0]].carry
        return {**received, "loss": jax.ShapeDtypeStruct((), jnp.float32)}

    @cached_property
    def _names(self) -> tuple[tuple[str, ...], ...]:
        """Names of the metrics of every pattern."""
        found = []
        for row in self._patterns:
            states = [self.layout.shapes[stage.index] for stage in row.stages]
            arrays = row.put({part: ((),) * len(self.layout.param_slots) for part in PARTS}, states)
            metrics = jax.eval_shape(
                lambda *arguments, row=row: row.forward(*arguments)[-1],
                arrays["params"],
                arrays["stats"],
                row.stages[0].carry,
                jax.ShapeDtypeStruct((2,), jnp.int32),
            )
            found.append(tuple(sorted(metrics)))
        return tuple(found)

    @property
    def _clips(self) -> bool:
        return self.layout.stages[0].clip_norm is not None

    @property
    def _width(self) -> int:
        return max(map(len, self._names)) + self._clips

    @property
    def _has_replicas(self) -> bool:
        return self.layout.mesh.shape["data"] > 1

    # --- What the routes share --------------------------------------------------------------------

    def _lay(self, tree: Any, *spec: str | None) -> Any:
        """Constrains how the compiler cuts a tree over the data axis; scalars are not cut."""
        if not self._has_replicas:
            return tree

        def lay(leaf: jax.Array) -> jax.Array:
            axes = spec if leaf.ndim >= len(spec) else ()
            return jax.lax.with_sharding_constraint(leaf, PartitionSpec(*axes))

        return jax.tree.map(lay, tree)

    def _send(self, carry: Carry) -> Carry:
        """Hands a carry to the next row."""
        rows = range(len(self.layout.rows) - 1)
        return jax.lax.ppermute(carry, "stage", [(row, row + 1) for row in rows])

    def _choose(self, row: jax.Array, function: Callable[[DeviceGroup], Callable]) -> tuple:
        """A function for every pattern, and the index of this row's."""
        shift = jnp.asarray(self._shifts, jnp.uint32)[row] if any(self._shifts) else 0
        # A pattern of one row needs no shift that is known at run time alone.
        branches = [
            function(pattern.shifted(shift) if self._which.count(number) > 1 else pattern)
            for number, pattern in enumerate(self._patterns)
        ]
        return branches, jnp.asarray(self._which, jnp.int32)[row]

    def _line(self, metrics: Metrics) -> jax.Array:
        """Metrics of a row as a line of the table."""
        values = [metrics[name] for name in sorted(metrics)]
        return jnp.zeros(self._width, jnp.float32).at[: len(values)].set(jnp.stack(values))

    # --- The routes -------------------------------------------------------------------------------

    def _local(self, arrays: Arrays, batches: Carry, step: jax.Array) -> tuple:
        """Every tick trains every row on a batch of its own."""
        row, rows = jax.lax.axis_index("stage"), len(self.layout.rows)
        count, parts = batches["label"].shape[:2]
        nothing = _zeros(self._message, parts)

        def train(pattern: DeviceGroup) -> Callable:
            def call(arrays: Arrays, received: Carry, number: jax.Array) -> tuple:
                if pattern.is_first:
                    received = jax.tree.map(lambda leaf: leaf[number], batches)
                arrays, carry, metrics = pattern.train(arrays, received, step + number)
                return arrays, nothing if pattern.is_last else carry, self._line(metrics)

            return call

        def idle(arrays: Arrays, received: Carry, number: jax.Array) -> tuple:
            return arrays, nothing, jnp.zeros(self._width, jnp.float32)

        branches, own = self._choose(row, train)

        def tick(loop: tuple, time: jax.Array) -> tuple[tuple, Any]:
            arrays, received = loop
            number = time - row
            exists = (number >= 0) & (number < count)
            arrays, carry, line = jax.lax.switch(
                jnp.where(exists, own, len(branches)), [*branches, idle], arrays, received, number
            )
            carry = self._send(self._lay(carry, None, "data"))
            return (self._lay(arrays), carry), line

        times = jnp.arange(count + rows - 1, dtype=jnp.int32)
        (arrays, _), lines = jax.lax.scan(tick, (arrays, nothing), times)
        return arrays, jax.lax.dynamic_slice_in_dim(lines, row, count)

    def _synchronous(self, arrays: Arrays, batches: Carry, step: jax.Array) -> tuple:
        """Batch after batch: the microbatches go up, their errors down, then all rows step."""
        row = jax.lax.axis_index("stage")

        def update(pattern: DeviceGroup) -> Callable:
            return pattern.step

        def norm(pattern: DeviceGroup) -> Callable:
            return pattern.squared_norm

        steps, own = self._choose(row, update)
        norms, _ = self._choose(row, norm)

        def batch(arrays: Arrays, each: tuple) -> tuple:
            number, carries = each
            parts = carries["label"].shape[0]
            gradients, (stats, line) = jax.grad(self._total, has_aux=True)(
                arrays["params"], arrays["stats"], carries, number, row
            )
            gradients = self._lay(gradients)
            line = line / parts
            squared = None
            if self._clips:
                squared = jax.lax.psum(jax.lax.switch(own, norms, gradients), "stage")
                line = line.at[-1].set(jnp.sqrt(squared).astype(line.dtype))
            arrays = jax.lax.switch(own, steps, {**arrays, "stats": stats}, gradients, squared)
            return self._lay(arrays), line

        count = batches["label"].shape[0]
        numbers = step + jnp.arange(count, dtype=jnp.int32)
        return jax.lax.scan(batch, arrays, (numbers, batches))

    def _total(
        self, params: tuple, stats: tuple, carries: Carry, number: jax.Array, row: jax.Array
    ) -> tuple[jax.Array, tuple]:
        """Losses of a row over all microbatches; moved statistics and sums of metrics.

        Differentiated on every row at once: the transpose of `ppermute` hands errors down.
        """
        rows, parts = len(self.layout.rows), carries["label"].shape[0]
        nothing = _zeros(self._message)
        scalar = jax.dtypes.canonicalize_dtype(jnp.float64)

        def forward(pattern: DeviceGroup) -> Callable:
            def call(params: tuple, stats: tuple, received: Carry, part: jax.Array) -> tuple:
                if pattern.is_first:
                    received = jax.tree.map(lambda leaf: leaf[part], carries)
                stats, carry, loss, metrics = pattern.forward(
                    params, stats, received, jnp.stack([number, part])
                )
                return stats, nothing if pattern.is_last else carry, loss, self._line(metrics)

            return call

        def idle(params: tuple, stats: tuple, received: Carry, part: jax.Array) -> tuple:
            return stats, nothing, jnp.zeros((), scalar), jnp.zeros(self._width, jnp.float32)

        branches, own = self._choose(row, forward)

        def one(params: tuple, stats: tuple, received: Carry, part: jax.Array) -> tuple:
            exists = (part >= 0) & (part < parts)
            index = jnp.where(exists, own, len(branches))
            return jax.lax.switch(index, [*branches, idle], params, stats, received, part)

        # Without remat this keeps what would be kept anyhow; but the weights once, instead of a
        # copy for every tick.
        everything = jax.checkpoint_policies.everything_saveable
        policy = None if self.layout.stages[0].remat else everything
        one = jax.checkpoint(one, policy=policy, prevent_cse=False)

        def tick(loop: tuple, time: jax.Array) -> tuple:
            stats, received, total, sums = loop
            stats, carry, loss, line = one(params, stats, received, time - row)
            carry = self._send(self._lay(carry, "data"))
            return (self._lay(stats), carry, total + loss, sums + line), None

        loop = stats, nothing, jnp.zeros((), scalar), jnp.zeros(self._width, jnp.float32)
        times = jnp.arange(parts + rows - 1, dtype=jnp.int32)
        (stats, _, total, sums), _ = jax.lax.scan(tick, loop, times)
        return total, (stats, sums)


def _zeros(shapes: Carry, *stacked: int) -> Carry:
    return jax.tree.map(lambda leaf: jnp.zeros((*stacked, *leaf.shape), leaf.dtype), shapes)
