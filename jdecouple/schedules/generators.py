"""Generators of schedules: each is a short loop with its grid drawn above it."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from jdecouple._errors import choices, require_int
from jdecouple.schedules.schedule import Action, Kind, Schedule
from jdecouple.schedules.wavefront import wavefront
from jdecouple.schedules.zero_bubble import dualpipe_v, v_placement, zb_h1, zbv

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


def interleaved_local(num_stages: int, num_microbatches: int, chunks: int) -> Iterator[Action]:
    """As local, but a carry takes an iteration from stage to stage: several share a device.

    Stage s lives on device group s % P of P = K / V. Without the delay a device group, which runs
    calls in the order of dispatch, would wait for its own later stages. With it no stage waits for
    another in its iteration, which takes as long as the stages of the busiest group, whatever each
    costs. Every stage trains on the same batches in the same order as by local. K = 4, V = 2; -n is
    the batch that entered n iterations ago::

        stage 0 | F0  B0  S0  .   .   .
        stage 1 | F-1 B-1 S-1 .   .   .
        stage 2 | .   .   .   F-2 B-2 S-2
        stage 3 | .   .   .   F-3 B-3 S-3
    """
    for stage in range(num_stages):
        for kind in (_F, _B, _S):
            yield Action(stage, kind, -stage)


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
    return wavefront(orders, range(num_stages), num_microbatches)


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
    return wavefront(orders, range(num_stages), num_microbatches)


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
    return wavefront(orders, _round(num_stages, chunks), num_microbatches)


def _round(num_stages: int, chunks: int) -> tuple[int, ...]:
    """Device groups of stages that go round, so that neighbours differ."""
    return tuple(stage % (num_stages // chunks) for stage in range(num_stages))


def _actions(stages: Iterable[int], kind: Kind, microbatches: Sequence[int]) -> list[Action]:
    return [Action(stage, kind, microbatch) for stage in stages for microbatch in microbatches]


def _in_turns(forwards: list[Action], backwards: list[Action], warm_up: int) -> list[Action]:
    """Some forwards, then one forward and one backward in turns, then the other backwards."""
    turns = max(0, len(forwards) - warm_up)
    pairs = zip(forwards[warm_up:], backwards[:turns], strict=True)
    return [*forwards[:warm_up], *itertools.chain(*pairs), *backwards[turns:]]


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


def delayed_forward(num_stages: int, num_microbatches: int) -> Iterator[Action]:
    """As delayed, but a stage forwards before it goes back and steps (DSP, PETRA).

    So forward and backward of an iteration are by the same weights. K = 3::

        stage 0 | F0  B-4 S-4
        stage 1 | F-1 B-3 S-3
        stage 2 | F-2 B-2 S-2
    """
    last = num_stages - 1
    for stage in range(num_stages):
        old = stage - 2 * last
        yield Action(stage, _F, -stage)
        yield Action(stage, _B, old)
        yield Action(stage, _S, old)


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


def delayed_split(num_stages: int, num_microbatches: int) -> Iterator[Action]:
    """As delayed, but an error leaves before the weight gradient.

    Where a message takes L seconds, an iteration takes max(f + b + w, f + b + w / 2 + L) instead of
    f + b + w + L. K = 3::

        stage 0 | B-4 W-4 S-4 F0
        stage 1 | B-3 W-3 S-3 F-1
        stage 2 | F-2 B-2 W-2 S-2
    """
    return _with_weights(delayed(num_stages, num_microbatches))


def delayed_forward_split(num_stages: int, num_microbatches: int) -> Iterator[Action]:
    """As delayed_forward, but an error leaves before the weight gradient.

    K = 3::

        stage 0 | F0  B-4 W-4 S-4
        stage 1 | F-1 B-3 W-3 S-3
        stage 2 | F-2 B-2 W-2 S-2
    """
    return _with_weights(delayed_forward(num_stages, num_microbatches))


def delayed_locked_split(num_stages: int, num_microbatches: int) -> Iterator[Action]:
    """As delayed_locked, but an error leaves before the weight gradient.

    K iterations take K (f + b) + w + 2 (K - 1) L, where that is more than the stages' work: by
    (K - 1) w less than those of delayed_locked. K = 3::

        stage 0 | F0  B-2 W-2 S-2 .   .
        stage 1 | .   F0  B-1 W-1 S-1 .
        stage 2 | .   .   F0  B0  W0  S0
    """
    return _with_weights(delayed_locked(num_stages, num_microbatches))


def _with_weights(actions: Iterable[Action]) -> Iterator[Action]:
    for action in actions:
        yield action
        if action.kind is _B:
            yield action._replace(kind=Kind.WEIGHT)


class _Generator(NamedTuple):
    actions: Callable[..., Iterator[Action]]
    local: bool = False
    delayed: bool = False
    takes_chunks: bool = False
    v_shaped: bool = False


_GENERATORS = {
    "local": _Generator(local, local=True),
    "interleaved": _Generator(interleaved_local, local=True, delayed=True, takes_chunks=True),
    "sequential": _Generator(sequential),
    "gpipe": _Generator(gpipe),
    "1f1b": _Generator(one_forward_one_backward),
    "interleaved_1f1b": _Generator(interleaved, takes_chunks=True),
    "zb_h1": _Generator(zb_h1),
    "zbv": _Generator(zbv, v_shaped=True),
    "dualpipe_v": _Generator(dualpipe_v, v_shaped=True),
    "delayed": _Generator(delayed, delayed=True),
    "delayed_forward": _Generator(delayed_forward, delayed=True),
    "delayed_locked": _Generator(delayed_locked, delayed=True),
    "delayed_split": _Generator(delayed_split, delayed=True),
    "delayed_forward_split": _Generator(delayed_forward_split, delayed=True),
    "delayed_locked_split": _Generator(delayed_locked_split, delayed=True),
}


def names(num_stages: int | None = None, num_microbatches: int = 1) -> tuple[str, ...]:
    """Names that `build` takes, for so many stages where they are given, and microbatches."""
    odd = num_stages is not None and num_stages > 1 and num_stages % 2 == 1
    several = num_microbatches > 1
    return tuple(
        name
        for name, row in _GENERATORS.items()
        if not (odd and row.v_shaped) and not (several and row.delayed)
    )


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
        chunks: V, stages that share a device in interleaved_1f1b and interleaved: 2 by default
            where K is even and above 2. zbv and dualpipe_v have 2, all other schedules 1.

    Raises:
        ValueError: unknown name, a count below 1, microbatches in a delayed schedule, or chunks
            that do not divide the stages or that the schedule does not take.
    """
    if name not in _GENERATORS:
        raise ValueError(f"unknown schedule {name!r}: {choices(name, _GENERATORS)}")
    row = _GENERATORS[name]
    require_int(1, num_stages=num_stages, num_microbatches=num_microbatches)
    own = 2 if row.v_shaped and num_stages > 1 else 1
    if chunks is None:
        chunks = 2 if row.takes_chunks and num_stages > 2 and num_stages % 2 == 0 else own
    require_int(1, chunks=chunks)
    if row.delayed and num_microbatches > 1:
        raise ValueError(
            f"num_microbatches is {num_microbatches}: schedule {name} takes 1, because consecutive "
            "batches already fill its stages"
        )
    if chunks != own and not row.takes_chunks:
        raise ValueError(f"chunks is {chunks}: schedule {name} takes {own}, the stages of a device")
    if num_stages % chunks:
        needed = f"schedule {name} takes an even number" if row.v_shaped else ""
        needed = needed or f"a multiple of chunks={chunks} is needed"
        raise ValueError(f"num_stages is {num_stages}: {needed}")
    counts = num_stages, num_microbatches
    table = tuple(row.actions(*counts, chunks) if row.takes_chunks else row.actions(*counts))
    placement = v_placement(num_stages) if row.v_shaped else _round(num_stages, chunks)
    return Schedule(name, *counts, table, row.local, row.delayed, placement).validate()
