"""Measurements of a training that change nothing in it."""

from typing import Any

import jax
import jax.numpy as jnp

from jdecouple.methods.routes import Carry, Delayed
from jdecouple.methods.routes.synchronous import linearize, pull_back
from jdecouple.pipeline.state import State


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

    def __init__(self, trainer: Any):
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
        self._place = trainer.placements[0].replicated
        self._measured = jax.jit(self._measure)

    def __call__(self, state: State) -> dict[str, jax.Array]:
        """Measures one state.

        Args:
            state: state of the trainer; not changed.

        Returns:
            "stage_{k}/sufficient_direction" and "stage_{k}/cosine" as futures; nan while the
            stage has nothing to replay, none where nothing is late.
        """
        if "queues" not in state.stages[0]:
            return {}
        return self._measured(jax.device_put(state.stages, self._place), state.step)

    def _measure(self, states: tuple, step: jax.Array) -> dict[str, jax.Array]:
        found = {}
        for k, stage in enumerate(self._stages[:-1]):
            batch = step - (len(self._stages) - 1 - k)
            step_id = jnp.stack([batch, jnp.zeros_like(batch)])
            waiting = states[k]["queues"]
            used, _ = self._route.backward(
                stage, states[k], waiting["residuals"][0], waiting["errors"][0], step_id
            )
            true = self._true(states, k, states[0]["queues"]["residuals"][k], step_id)
            product, length = _dot(true, used), _dot(true, true)
            exists = batch >= states[k]["since"]
            values = {
                "sufficient_direction": product / length,
                "cosine": product / jnp.sqrt(length * _dot(used, used)),
            }
            for name, value in values.items():
                found[f"stage_{k}/{name}"] = jnp.where(exists, value, jnp.nan)
        return found

    def _true(self, states: tuple, index: int, carry: Carry, step_id: jax.Array) -> Any:
        """Gradient of one stage by backpropagation through all."""
        passed = []
        for stage, state in zip(self._stages, states, strict=True):
            _, _, linearized, carry = linearize(stage, state, carry, step_id)
            passed.append(linearized)
        error = None
        for linearized in reversed(passed[index:]):
            gradients, error = pull_back(linearized, error)
        return gradients


def _dot(first: Any, second: Any) -> jax.Array:
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, first, second)), jnp.zeros(()))
