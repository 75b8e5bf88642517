"""Merges what each device group does into the order in which the host dispatches it."""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence

from jdecouple.schedules.schedule import Action, Kind, Schedule, joins, split


def wavefront(
    orders: Sequence[list[Action]], placement: Sequence[int], num_microbatches: int
) -> Iterator[Action]:
    """Merges what each device group does, and the steps that end it, into the order of dispatch.

    Every action takes one tick, and a call is dispatched in the tick in which it begins, the first
    device group first. What sends nothing joins what follows; the rest sends as soon as it ends.

    Args:
        orders: the actions of each device group without its steps.
        placement: device group of every stage.
        num_microbatches: M.
    """
    num_stages = len(placement)
    silent = {(num_stages - 1, Kind.FORWARD), (0, Kind.BACKWARD)}
    silent |= {(stage, Kind.WEIGHT) for stage in range(num_stages)}
    actions = tuple(itertools.chain(*orders))
    inputs = Schedule("", num_stages, num_microbatches, actions).inputs
    queues = []
    for device_group, order in enumerate(orders):
        own = [stage for stage in range(num_stages) if placement[stage] == device_group]
        steps = [Action(stage, Kind.STEP, num_microbatches - 1) for stage in own]
        queues.append(deque(split(order + steps, lambda a, b: a[:2] in silent and joins(a, b))))
    done: dict[Action, int] = {}
    free = [0] * len(orders)
    for tick in range(len(actions) + num_stages):
        for device_group, calls in enumerate(queues):
            if not calls or free[device_group] > tick:
                continue
            if all(done.get(action, tick) < tick for action in inputs(calls[0][0])):
                call = calls.popleft()
                done |= {action: tick + late for late, action in enumerate(call)}
                free[device_group] = tick + len(call)
                yield from call
