"""Steps of optimisers whose state is cut over the replicas of a stage (ZeRO-1, 1910.02054)."""

from typing import Any

import jax
import optax
from jax.sharding import PartitionSpec

from jdecouple.pipeline.mesh import StageDevices


def on_replicas(
    optimizer: optax.GradientTransformation, placement: StageDevices, named: bool
) -> optax.GradientTransformation:
    """The optimiser as one of which every replica does its part; itself where nothing is cut.

    A replica takes its part of the gradients, moves its part of the state, and has its part of the
    updates, which are then brought together. Norms of whole arrays stay what they are. `named` says
    whether the mesh of the placement is that of the program; else it is the program's own.
    """
    if not placement.shard_optimizer:
        return optimizer

    def lay(tree: Any, whole: bool = False) -> Any:
        def constrain(leaf: jax.Array) -> jax.Array:
            spec = PartitionSpec() if whole else placement.update_spec(leaf)
            return jax.lax.with_sharding_constraint(
                leaf, placement.on_mesh(spec) if named else spec
            )

        return jax.tree.map(constrain, tree)

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        # Whole on both sides, so that nothing but the step is cut.
        gradients, params = lay((gradients, params), whole=True)
        updates, state = optimizer.update(lay(gradients), state, params)
        return lay(updates, whole=True), lay(state)

    return optax.GradientTransformation(optimizer.init, update)
