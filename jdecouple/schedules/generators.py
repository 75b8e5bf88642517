"""Generators of schedules: each is a short loop with its grid drawn above it."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from jdecouple._errors import choices, require_int
from jdecouple.schedules.schedule import Action, Kind, Schedule, joins, split

_F, _B, _S = Kind.FORWARD, Kind.BACKWARD, Kind.STEP


def local(num_stages: int, num_microbatches: int) -> Iterator[Action]:
    """Wavefront without errors: a stage trains as soon as its input is there.

    K = 2, M = 2 (the next batch enters stage 0 while stage 1 still works on this one)::

        stage 0 | F0 B0 F1 B1 S1 .
        stage 1 | .  F0 B0 F1 B1 S1
    """
    last = num_microbatches - 1
    for tick in range(num_stages + num_microbatches - 1):
        for stage in range(num_stages):
            microbatch = tick - stage
            if 0 <= microbatch <= last:
                yield Action(stage, _F, microbatch)
                yield Action(stage, _B, microbatch)
                if microbatch == last:
                    yield Action(stage, _S, microbatch)


def sequential(num_stages: int, num_microbatches: int) -> Iterator[Action]:
    """One microbatch at a time, up and down again; every stage steps after its last backward.

    K = 2, M = 2::

        stage 0 | F0 .  .  B0 F1 .  .  B1 S1
        stage 1 | .  F0 B0 .  .  F1 B1 S1 .
    """
    last = num_microbatches - 1
    for microbatch in range(num_microbatches):
        for stage in range(num_stages):
            yield Action(stage, _F, microbatch)
        for stage in reversed(range(num_stages)):
            yield Action(stage, _B, microbatch)
            if microbatch == last:
                yield Action(stage, _S, microbatch)


def gpipe(num_stages: int, num_microbatches: int) -> Iterator[Action]:
    """All forwards, then all backwards, the newest microbatch first (GPipe, arXiv 1811.06965).

    K = 3, M = 3::

        stage 0 | F0 F1 F2 .  .  .  .  B2 B1 B0 S2
        stage 1 | .  F0 F1 F2 .  .  B2 B1 B0 S2 .
        stage 2 | .  .  F0 F1 F2 B2 B1 B0 S2 .  .
    """
    parts = range(num_microbatches)
    orders = [_actions([k], _F, parts) + _actions([k], _B, parts[::-1]) for k in range(num_stages)]
    return _wavefront(orders, num_stages, num_microbatches)


def one_forward_one_backward(num_stages: int, num_microbatches: int) -> Iterator[Action]:
    """A forward and a backward in turns once a stage is full (PipeDream-Flush, arXiv 2006.09503).

    Takes as long as gpipe, but stage k never holds more than K - k microbatches. K = 3, M = 3::

        stage 0 | F0 F1 F2 .  .  B0 .  B1 .  B2 S2
        stage 1 | .  F0 F1 .  B0 F2 B1 .  B2 S2 .
        stage 2 | .  .  F0 B0 F1 B1 F2 B2 S2 .  .
    """
    parts = range(num_microbatches)
    orders = [
        _in_turns(_actions([k], _F, parts), _actions([k], _B, parts), warm_up=num_stages - 1 - k)
        for k in range(num_stages)
    ]
    return _wavefront(orders, num_stages, num_microbatches)


def interleaved(num_stages: int, num_microbatches: int, chunks: int) -> Iterator[Action]:
    """1f1b with V chunks of blocks a device (Megatron-LM, arXiv 2104.04473, section 2.2).

    Stage s lives on device group s % P of P = K / V. A device group takes its stages in turns, P
    microbatches at a time. The last P also take what is left over, because fewer than P stall the
    pipeline. The bubble is then P - 1 forwards and backwards of one stage for every M of at least
    P. K = 4, V = 2, M = 2; stages 0 and 2 share a device group, and so do stages 1 and 3::

        stage 0 | F0 F1 .  .  .  .  .  .  B0 B1 S1 .
        stage 1 | .  F0 F1 .  .  .  .  B0 B1 S1 .  .
        stage 2 | .  .  F0 F1 .  B0 .  B1 .  .  .  S1
        stage 3 | .  .  .  F0 B0 F1 B1 .  .  .  S1 .
    """
    if chunks == 1:
        return one_forward_one_backward(num_stages, num_microbatches)
    size = num_stages // chunks
    *starts, last = range(0, max(1, num_microbatches - size + 1), size)
    turns = [*(range(start, start + size) for start in starts), range(last, num_microbatches)]
    orders = []
    for device_group in range(size):
        stages = range(device_group, num_stages, size)
        forwards = [action for parts in turns for action in _actions(stages, _F, parts)]
        backwards = [action for parts in turns for action in _actions(stages[::-1], _B, parts)]
        warm_up = 2 * (size - 1 - device_group) + (chunks - 1) * len(turns[-1])
        orders.append(_in_turns(forwards, backwards, warm_up))
    return _wavefront(orders, num_stages, num_microbatches)


def _actions(stages: Iterable[int], kind: Kind, microbatches: Sequence[int]) -> list[Action]:
    return [Action(stage, kind, microbatch) for stage in stages for microbatch in microbatches]


def _in_turns(forwards: list[Action], backwards: list[Action], warm_up: int) -> list[Action]:
    """Some forwards, then one forward and one backward in turns, then the other backwards."""
    turns = max(0, len(forwards) - warm_up)
    pairs = zip(forwards[warm_up:], backwards[:turns], strict=True)
    return [*forwards[:warm_up], *itertools.chain(*pairs), *backwards[turns:]]


def _wavefront(
    orders: Sequence[list[Action]], num_stages: int, num_microbatches: int
) -> Iterator[Action]:
    """Merges what each device group does, and the steps that end it, into the order of dispatch.

    Every action takes one tick, and a call is dispatched in the tick in which it begins, the first
    device group first. What sends nothing joins what follows; the rest sends as soon as it ends.
    """
    silent = (num_stages - 1, _F), (0, _B)
    inputs = Schedule("", num_stages, num_microbatches, ()).inputs
    queues = []
    for device_group, order in enumerate(orders):
        stages = range(device_group, num_stages, len(orders))
        actions = order + _actions(stages, _S, [num_microbatches - 1])
        queues.append(deque(split(actions, lambda a, b: a[:2] in silent and joins(a, b))))
    done: dict[Action, int] = {}
    free = [0] * len(orders)
    for tick in range(sum(map(len, orders)) + num_stages):
        for device_group, calls in enumerate(queues):
            if not calls or free[device_group] > tick:
                continue
            if all(done.get(action, tick) < tick for action in inputs(calls[0][0])):
                call = calls.popleft()
                done |= {action: tick + late for late, action in enumerate(call)}
                free[device_group] = tick + len(call)
                yield from call


def delayed(num_stages: int, num_microbatches: int) -> Iterator[Action]:
    """Activations and errors take an iteration from stage to stage (FDG, ADL).

    Every stage trains on an old batch, steps, and forwards a newer one, all at the same time.
    K = 3; -n is the batch that entered n iterations ago::

        stage 0 | B-4 S-4 F0
        stage 1 | B-3 S-3 F-1
        stage 2 | F-2 B-2 S-2
    """
    last = num_stages - 1
    for stage in range(last):
        old = stage - 2 * last
        yield Action(stage, _B, old)
        yield Action(stage, _S, old)
        yield Action(stage, _F, -stage)
    for kind in (_F, _B, _S):
        yield Action(last, kind, -last)


def delayed_locked(num_stages: int, num_microbatches: int) -> Iterator[Action]:
    """The newest batch goes up in order, then errors go down one stage an iteration (DDG, FR).

    K = 3; the backwards of an iteration do not wait for one another::

        stage 0 | F0  B-2 S-2 .   .
        stage 1 | .   F0  B-1 S-1 .
        stage 2 | .   .   F0  B0  S0
    """
    last = num_stages - 1
    for stage in range(num_stages):
        yield Action(stage, _F, 0)
    for stage in reversed(range(num_stages)):
        yield Action(stage, _B, stage - last)
        yield Action(stage, _S, stage - last)


class _Generator(NamedTuple):
    actions: Callable[..., Iterator[Action]]
    local: bool = False
    delayed: bool = False
    takes_chunks: bool = False


_GENERATORS = {
    "local": _Generator(local, local=True),
    "sequential": _Generator(sequential),
    "gpipe": _Generator(gpipe),
    "1f1b": _Generator(one_forward_one_backward),
    "interleaved_1f1b": _Generator(interleaved, takes_chunks=True),
    "delayed": _Generator(delayed, delayed=True),
    "delayed_locked": _Generator(delayed_locked, delayed=True),
}


def names() -> tuple[str, ...]:
    """Names that `build` takes."""
    return tuple(_GENERATORS)


def build(
    name: str, num_stages: int, num_microbatches: int = 1, *, chunks: int | None = None
) -> Schedule:
    """Builds and validates the schedule of one global batch.

    >>> print(build("1f1b", num_stages=2, num_microbatches=3))
    stage 0 | F0 F1 .  B0 F2 B1 .  B2 S2
    stage 1 | .  F0 B0 F1 B1 F2 B2 S2 .

    Args:
        name: one of `names()`.
        num_stages: K, at least 1, over all devices.
        num_microbatches: M, at least 1.
        chunks: V, stages that share a device in interleaved_1f1b: 2 by default where K is even and
            above 2. All other schedules take 1.

    Raises:
        ValueError: unknown name, a count below 1, microbatches in a delayed schedule, or chunks
            that do not divide the stages or that the schedule does not take.
    """
    if name not in _GENERATORS:
        raise ValueError(f"unknown schedule {name!r}: {choices(name, _GENERATORS)}")
    actions, is_local, is_delayed, takes_chunks = _GENERATORS[name]
    if chunks is None:
        chunks = 2 if takes_chunks and num_stages > 2 and num_stages % 2 == 0 else 1
    require_int(1, num_stages=num_stages, num_microbatches=num_microbatches, chunks=chunks)
    if is_delayed and num_microbatches > 1:
        raise ValueError(
            f"num_microbatches is {num_microbatches}: schedule {name} takes 1, because consecutive "
            "batches already fill its stages"
        )
    if chunks > 1 and not takes_chunks:
        raise ValueError(f"chunks is {chunks}: schedule {name} takes 1, a stage a device")
    if num_stages % chunks:
        raise ValueError(f"num_stages is {num_stages}: a multiple of chunks={chunks} is needed")
    counts = num_stages, num_microbatches
    table = tuple(actions(*counts, chunks) if takes_chunks else actions(*counts))
    size = num_stages // chunks
    placement = tuple(stage % size for stage in range(num_stages))  # round, so neighbours differ
    return Schedule(name, *counts, table, is_local, is_delayed, placement).validate()
