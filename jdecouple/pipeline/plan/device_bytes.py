"""Bytes that a training will hold on each device, from its design: nothing is compiled or made."""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

from jdecouple.pipeline.design import Design
from jdecouple.pipeline.plan.calls import Iteration, Leaf, TracedCall, trace

_KINDS = {"params": "weights", "stats": "statistics", "opt": "optimizer", "ema": "optimizer"}
_KINDS |= {
    "previous": "weights",
    "passes": "queues",
    "loss_scale": "optimizer",
    "tied": "optimizer",
    "queues": "queues",
    "since": "queues",
    "feedback": "queues",
}
_MESSAGES = ("carry", "cotangent")
_GAPS = 1.05  # arrays of several sizes leave gaps between them: 0 to 20 % in what was looked at


@dataclasses.dataclass(frozen=True)
class DeviceBytes:
    """Bytes of every device of a group, when it holds most while calls follow one another.

    Attributes:
        devices: the group, one device a replica; each holds as much.
        stages: indices of the stages that live on it.
        weights: parameters of blocks and heads, in all versions that are kept.
        statistics: what the forward moves, such as those of BatchNorm.
        optimizer: its state, averages of the weights, scales of losses.
        queues: what waits between calls: residuals, carries and errors of delayed routes and of
            microbatches, sums of gradients, and what rounding took from errors.
        messages: the batch, carries and errors that a call takes and gives.
        working: what a call needs while it runs: activations, gradients, metrics.
        ahead: at most so much more while stages work at the same time: batches and carries that
            are on their way, up to `max_in_flight`. Not a part of `total`.
        offloads: whether a stage keeps activations on the host.
    """

    devices: tuple[Any, ...]
    stages: tuple[int, ...]
    weights: int
    statistics: int
    optimizer: int
    queues: int
    messages: int
    working: int
    ahead: int
    offloads: bool = False

    @property
    def total(self) -> int:
        """What `jdecouple.diagnostics.measured_memory` measures."""
        held = self.weights + self.statistics + self.optimizer
        return held + self.queues + self.messages + self.working

    @property
    def least(self) -> int:
        """Lower end of the estimate of `total`: half of what is estimated may not be needed.

        With remat "offload" neither may what waits, which is counted although the host keeps it.
        """
        return self.total - self.working // 2 - (self.queues if self.offloads else 0)

    @property
    def most(self) -> int:
        """Upper end of the estimate of `total`: twice what is estimated.

        Totals of convolutional nets and perceptrons were mostly within 10 % of what compiled calls
        report on CPUs, and up to 25 % off; a transformer needed 30 % of the whole more than was
        planned. What is missed are orders of operations that XLA prefers, and copies.
        """
        return self.total + self.working


def planned_bytes(design: Design, platform: str = "cpu") -> tuple[DeviceBytes, ...]:
    """Bytes of the devices of every group, in the order of the stages.

    Weights, optimiser and what waits are exact. What a call needs while it runs is estimated from
    its operations, see `jdecouple.pipeline.plan.liveness`. A training by engine "spmd" is counted
    as if each stage had calls of its own.

    Args:
        design: of a Trainer (`trainer.design`), or one without arrays and devices.
        platform: "cpu", "gpu" or "tpu", by which some layers compute in another way. The estimate
            follows XLA's compiler for CPUs; for others nothing has been measured.

    >>> import jax
    >>> import jdecouple as jd
    >>> from jdecouple.pipeline.design import make_design
    >>> from jdecouple.pipeline.mesh import described
    >>> design = make_design(
    ...     lambda rngs: jd.models.mlp(10, input_size=64, hidden=512, depth=4, rngs=rngs),
    ...     jd.methods.get("bp"),
    ...     jd.optim.sgd(0.1, momentum=0.9),
    ...     mesh=jd.make_mesh(2, devices=described(2)),
    ...     example={
    ...         "x": jax.ShapeDtypeStruct((32, 64), "float32"),
    ...         "label": jax.ShapeDtypeStruct((32,), "int32"),
    ...     },
    ... )
    >>> first, second = planned_bytes(design)
    >>> first.weights == first.optimizer == 4 * (65 * 512 + 513 * 512)
    True
    """
    groups: dict[tuple, list[int]] = {}
    for stage, devices in enumerate(design.device_groups):
        groups.setdefault(devices, []).append(stage)
    iterations: dict[int, Iteration] = {}
    for devices in groups:
        if len(devices) not in iterations:
            iterations[len(devices)] = trace(design, len(devices), platform)
    return tuple(
        _on_group(design, devices, tuple(stages), iterations[len(devices)])
        for devices, stages in groups.items()
    )


def _on_group(
    design: Design, devices: tuple, stages: tuple[int, ...], iteration: Iteration
) -> DeviceBytes:
    state = dict.fromkeys(("weights", "statistics", "optimizer"), 0)
    waits: dict[int, int] = {}
    for stage in stages:
        for kind, leaves in iteration.states[stage].items():
            if _KINDS[kind] == "queues":
                waits |= {leaf.key: leaf.size for leaf in leaves}
            else:
                state[_KINDS[kind]] += _bytes(leaves)
    batch = _bytes(iteration.parts) if 0 in stages else 0
    batch_keys = {leaf.key for leaf in iteration.parts}
    last = _last_uses(iteration)
    queues: dict[int, int] = dict(waits)
    messages: dict[int, int] = {}
    best = (-1, 0, 0, 0)
    for number, call in enumerate(iteration.calls):
        own = call.stage is None or call.stage in stages
        if own:
            sent = _fresh(call, _MESSAGES)
            kept = _fresh(call, ("residuals", "accumulated"))
            waiting = sum(queues.values()) + kept
            on_way = batch + sum(messages.values()) + sent
            working = round(_GAPS * (call.needed - sent - kept))
            best = max(best, (waiting + on_way + working, waiting, on_way, working))
            _keep(call, queues)
        for name in _MESSAGES:
            step = 1 if name == "carry" else -1
            if call.stage is not None and call.stage + step in stages:
                messages |= {leaf.key: leaf.size for leaf in call.given.get(name, ())}
        for held in (queues, messages):
            for key in [k for k in held if last.get(k, number) <= number and k not in waits]:
                del held[key]
        if own:
            for key in call.donated:
                queues.pop(key, None)
        for key in batch_keys:
            messages.pop(key, None)
    _, waiting, on_way, working = best
    return DeviceBytes(
        devices,
        stages,
        **state,
        queues=waiting,
        messages=on_way,
        working=working,
        ahead=_ahead(design, stages, iteration),
        offloads=any(design.stages[stage].remat == "offload" for stage in stages),
    )


def _keep(call: TracedCall, queues: dict[int, int]) -> None:
    """Adds what a call leaves for later ones; a new state takes the place of the one donated."""
    names = ["residuals", "accumulated"]
    if call.stage is None:
        return
    if not call.donated & {leaf.key for leaf in call.taken.get("state", ())}:
        names.append("state")
    for name in names:
        queues |= {leaf.key: leaf.size for leaf in call.given.get(name, ())}


def _last_uses(iteration: Iteration) -> dict[int, int]:
    last: dict[int, int] = {}
    for number, call in enumerate(iteration.calls):
        for leaf in itertools.chain(*call.taken.values(), *call.given.values()):
            last[leaf.key] = number
    end = len(iteration.calls)
    return last | dict.fromkeys(iteration.left, end)


def _ahead(design: Design, stages: tuple[int, ...], iteration: Iteration) -> int:
    """Bytes of what is on its way for other batches than the one that a stage works on."""
    batches = design.engine.max_in_flight - 1
    size = _bytes(iteration.parts) * batches if 0 in stages else 0
    if design.engine.fuse:
        return size
    crossing = [
        stage
        for stage in range(1, len(design.stages))
        if design.device_groups[stage] != design.device_groups[stage - 1]
    ]
    count = batches if design.method.route.local else 0
    for call in iteration.calls:
        above = (call.stage or 0) + 1
        if above in crossing and {above, call.stage} & set(stages):
            size += count * _bytes(call.given.get("carry", ()))
    return size


def _fresh(call: TracedCall, names: Iterable[str]) -> int:
    """Bytes of what a call makes, but for what lies where donated arrays did."""
    leaves = itertools.chain(*(call.given.get(name, ()) for name in names))
    return sum(leaf.size for leaf in leaves if leaf.key in call.fresh)


def _bytes(leaves: Iterable[Leaf]) -> int:
    return sum(leaf.size for leaf in leaves)
