"""Parameters that several blocks share, as the embedding and the output head of a language model.

Every block that uses one holds a copy, which its forward and its backward take as any other
parameter. No block steps it: at the end of an iteration the gradients of all copies are added, the
stage of the first block that uses it makes one step with the sum, by an optimiser state of its own,
and what comes out goes into all copies.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jdecouple.methods.routes import loss_scale
from jdecouple.methods.routes.stage import Stage, StageState, add
from jdecouple.methods.routes.updates import has_stepped, move_average

Sums = dict[str, jax.Array]
"""Sums of gradients by `Tie.name`; where some may not exist, also their `COUNT`."""
COUNT = "count"
KINDS = ("params", "tied", "ema")
"""Parts of a stage's state that the step of what is shared reads or changes."""


def sums_of(stage: Stage, gradients: Sequence[Any]) -> Sums:
    """What a stage adds to the gradients of shared parameters."""
    sums: Sums = {}
    for unit, own in zip(stage.units, gradients, strict=True):
        for name in sorted(unit.shared):
            tie = stage.tie_of(unit, name)
            sums[tie.name] = add(sums.get(tie.name), own[name])
    return sums


def existing(sums: Sums, exists: jax.Array) -> Sums:
    """The sums if the batch exists, else zeros; with their count."""
    sums = {name: jnp.where(exists, leaf, 0) for name, leaf in sums.items()}
    return {**sums, COUNT: jnp.asarray(exists, jnp.int32)}


def total(received: Sequence[Sums]) -> Sums:
    """The sum over stages, of which each may lack some."""
    whole: Sums = {}
    for sums in received:
        whole |= {name: add(whole.get(name), leaf) for name, leaf in sums.items()}
    return whole


def step(
    stage: Stage, state: StageState, sums: Sums, squared_norm: jax.Array | None
) -> tuple[StageState, dict[str, dict[str, jax.Array]]]:
    """The step of what the units of a stage are the first to use.

    Args:
        stage: the stage.
        state: its `KINDS`.
        sums: those of all stages together.
        squared_norm: of the gradient of all stages, where a step needs it.

    Returns:
        The new state, without what came out; and this by `Tie.name`: "params" and, with averages,
        "ema".
    """
    tied: list[Any] = []
    values: dict[str, dict[str, jax.Array]] = {}
    for number, (unit, opt) in enumerate(zip(stage.units, state["tied"], strict=True)):
        names = stage.owned(unit)
        if not names:
            tied.append(opt)
            continue
        ties = {name: stage.tie_of(unit, name).name for name in names}
        params = state["params"][number]
        old = {name: params[name] for name in names}
        gradients = {name: sums[ties[name]] for name in names}
        new, new_opt = stage.moved(unit, gradients, opt, old, squared_norm)
        goes = []
        if COUNT in sums:
            goes.append(sums[COUNT] > 0)
        if stage.scaling is not None:
            goes.append(loss_scale.all_finite(gradients))
        if stage.scaling == "model" and squared_norm is not None:
            goes.append(jnp.isfinite(squared_norm))
        if goes:
            which = jnp.stack(goes).all()
            new, new_opt = (
                loss_scale.select(which, *pair) for pair in ((new, old), (new_opt, opt))
            )
        tied.append(new_opt)
        found: dict[str, Any] = {"params": new}
        if stage.ema is not None:
            averages = state["ema"][number]["params"]
            average = {name: averages[name] for name in names}
            stepped = has_stepped(opt, new_opt)
            if goes:
                stepped = which & stepped
            found["ema"] = move_average(stage.ema, average, new, stepped)
        for name in names:
            values[ties[name]] = {kind: leaves[name] for kind, leaves in found.items()}
    return {**state, "tied": tuple(tied)}, values


def put(stage: Stage, state: StageState, values: dict[str, dict[str, jax.Array]]) -> StageState:
    """A state (its `KINDS`) with what came out of a step in the copies of a stage."""
    params, averages = list(state["params"]), list(state.get("ema", ()))
    for number, unit in enumerate(stage.units):
        for name in sorted(unit.shared):
            value = values.get(stage.tie_of(unit, name).name)
            if value is None:
                continue
            params[number] = {**params[number], name: value["params"]}
            if averages:
                own = averages[number]
                own = {**own, "params": {**own["params"], name: value["ema"]}}
                averages[number] = own
    new = {**state, "params": tuple(params)}
    return {**new, "ema": tuple(averages)} if averages else new
