"""Consecutive blocks on the same devices, and the compiled calls of their evaluation forward."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from jdecouple.methods.routes import Carry, Unit
from jdecouple.pipeline.mesh import StageDevices, jit

Prepare = Callable[[Carry], Carry]
"""What is done to a batch before the first block."""


class Shapes(NamedTuple):
    """What a batch of one size looks like on its way.

    Attributes:
        carries: shapes of the carry that every leg receives.
        targets: shapes of what every leg receives from above, if anything comes down.
        logits: shapes of what every exit answers, by its block.
    """

    carries: list[Any]
    targets: list[Any]
    logits: dict[int, Any]


class Leg(NamedTuple):
    """Consecutive units on the same devices: between legs the carry is sent.

    Attributes:
        placement: their devices.
        units: a block and its head each.
        slots: where each unit's state is: its stage, and its number there.
        up: the compiled evaluation forward of each.
        down: that of the way down, of the units that an answer comes down through.
    """

    placement: StageDevices
    units: tuple[Unit, ...]
    slots: tuple[tuple[int, int], ...]
    up: tuple[Callable, ...]
    down: tuple[Callable | None, ...]


def build_legs(
    units: Sequence[Sequence[Unit]], placements: Sequence[StageDevices], prepare: Prepare | None
) -> tuple[Leg, ...]:
    """The legs of units that are given stage by stage; compiles nothing yet.

    Units that are the same program share their calls where they share their devices. `prepare` is
    a part of the first unit's call.
    """

    @functools.cache
    def up(program: Unit, placement: StageDevices, prepares: bool) -> Callable:
        def call(params, stats, carry):
            prepared = prepare(carry) if prepare and prepares else carry
            features, logits = program.evaluate(params, stats, prepared)
            changed = {k: leaf for k, leaf in prepared.items() if leaf is not carry.get(k)}
            return placement.constrain(({**changed, "x": features}, logits))

        return jit(call, placement)

    @functools.cache
    def down(program: Unit, placement: StageDevices, turns: bool) -> Callable:
        def call(params, stats, target):
            target = program.turn(params, stats, target) if turns else target
            return placement.constrain(program.descend(params, stats, target))

        return jit(call, placement)

    programs: list[Unit] = []  # one of each
    last, legs = units[-1][-1], []
    for _, group in itertools.groupby(range(len(units)), key=lambda k: placements[k].devices):
        stages = list(group)
        placement = placements[stages[0]]
        slots = tuple((k, i) for k in stages for i in range(len(units[k])))
        own = tuple(units[k][i] for k, i in slots)
        ups: list[Callable] = []
        downs: list[Callable | None] = []
        for unit, slot in zip(own, slots, strict=True):
            program = next(filter(unit.same_program, programs), unit)
            if program is unit:
                programs.append(unit)
            ups.append(up(program, placement, prepare is not None and slot == (0, 0)))
            comes_down = last.descends and unit.descends
            downs.append(down(program, placement, unit is last) if comes_down else None)
        legs.append(Leg(placement, own, slots, tuple(ups), tuple(downs)))
    return tuple(legs)


def trace_legs(legs: Sequence[Leg], carry: Carry, prepare: Prepare | None) -> Shapes:
    """Shapes by abstract evaluation, from those of a batch with its weights."""
    shapes = Shapes([], [], {})
    for number, leg in enumerate(legs):
        shapes.carries.append(carry)
        if prepare and not number:
            carry = jax.eval_shape(prepare, carry)
        for unit in leg.units:
            state = jax.eval_shape(unit.initial)
            features, logits = jax.eval_shape(unit.evaluate, *state, carry)
            carry = {**carry, "x": features}
            if logits is not None:
                shapes.logits[unit.index] = logits
    last = legs[-1].units[-1]
    if last.descends:
        target = jax.eval_shape(last.turn, *jax.eval_shape(last.initial), carry["x"])
        for leg in reversed(legs):
            shapes.targets.insert(0, target)
            for unit in filter(lambda unit: unit.descends, reversed(leg.units)):
                target = jax.eval_shape(unit.descend, *jax.eval_shape(unit.initial), target)
        shapes.logits[last.index] = target
    return shapes
