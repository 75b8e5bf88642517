"""Generators of schedules: each is a short loop with its grid drawn above it."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from jdecouple.schedules.schedule import Action, Kind, Schedule

_F, _B, _S = Kind.FORWARD, Kind.BACKWARD, Kind.STEP


def local(num_stages: int, num_microbatches: int) -> Iterator[Action]:
    """Wavefront without backward messages: a stage trains as soon as its input is there.

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


def delayed(num_stages: int, num_microbatches: int) -> Iterator[Action]:
    """Activations and errors take an iteration from stage to stage (FDG, ADL).

    Every stage trains on an old batch, steps, and forwards a newer one, all at the same time.
    K = 3; -n is the batch that entered n iterations ago::

        stage 0 | B-4 S-4 F0
        stage 1 | B-3 S-3 F-1
        stage 2 | F-2 B-2 S-2
    """
    del num_microbatches
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
    del num_microbatches
    last = num_stages - 1
    for stage in range(num_stages):
        yield Action(stage, _F, 0)
    for stage in reversed(range(num_stages)):
        yield Action(stage, _B, stage - last)
        yield Action(stage, _S, stage - last)


class _Row(NamedTuple):
    generator: Callable[[int, int], Iterator[Action]]
    local: bool = False
    delayed: bool = False


_SCHEDULES: dict[str, _Row] = {
    "local": _Row(local, local=True),
    "sequential": _Row(sequential),
    "delayed": _Row(delayed, delayed=True),
    "delayed_locked": _Row(delayed_locked, delayed=True),
}


def names() -> tuple[str, ...]:
    """Names that `build` takes."""
    return tuple(_SCHEDULES)


def build(name: str, num_stages: int, num_microbatches: int = 1) -> Schedule:
    """Builds and validates a schedule.

    Args:
        name: one of `names()`.
        num_stages: K, at least 1.
        num_microbatches: M, at least 1.

    Returns:
        The schedule of one global batch.

    Raises:
        ValueError: unknown name, a count below 1, or microbatches in a delayed schedule.
    """
    if name not in _SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}: allowed are {', '.join(_SCHEDULES)}")
    for label, count in (("num_stages", num_stages), ("num_microbatches", num_microbatches)):
        if count < 1:
            raise ValueError(f"{label} is {count}: at least 1 is needed")
    generator, is_local, is_delayed = _SCHEDULES[name]
    if is_delayed and num_microbatches > 1:
        raise ValueError(
            f"num_microbatches is {num_microbatches}: schedule {name} takes 1, because consecutive "
            "batches already fill its stages"
        )
    actions = tuple(generator(num_stages, num_microbatches))
    return Schedule(
        name, num_stages, num_microbatches, actions, local=is_local, delayed=is_delayed
    ).validate()
