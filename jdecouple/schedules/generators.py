"""Generators of schedules: each is a short loop with its grid drawn above it."""

from collections.abc import Callable, Iterator

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


_GENERATORS: dict[str, Callable[[int, int], Iterator[Action]]] = {
    "local": local,
    "sequential": sequential,
}


def names() -> tuple[str, ...]:
    """Names that `build` takes."""
    return tuple(_GENERATORS)


def build(name: str, num_stages: int, num_microbatches: int = 1) -> Schedule:
    """Builds and validates a schedule.

    Args:
        name: one of `names()`.
        num_stages: K, at least 1.
        num_microbatches: M, at least 1.

    Returns:
        The schedule of one global batch.

    Raises:
        ValueError: unknown name, or a count below 1.
    """
    if name not in _GENERATORS:
        raise ValueError(f"unknown schedule {name!r}: allowed are {', '.join(_GENERATORS)}")
    for label, count in (("num_stages", num_stages), ("num_microbatches", num_microbatches)):
        if count < 1:
            raise ValueError(f"{label} is {count}: at least 1 is needed")
    actions = tuple(_GENERATORS[name](num_stages, num_microbatches))
    return Schedule(name, num_stages, num_microbatches, actions, local=name == "local").validate()
