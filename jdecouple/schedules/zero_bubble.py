"""Schedules that fill the bubble with weight gradients: a table of phases for each device."""

from collections import Counter, deque
from collections.abc import Iterator, Sequence

from jdecouple.schedules.schedule import Action, Kind
from jdecouple.schedules.wavefront import wavefront

Phases = list[tuple[int, str]]
"""How often a device does which actions in turn.

"F0" is a forward of its lowest stage and "B1" a backward of the one above; each of them takes its
next microbatch. "W" is the weight gradient that waits longest.
"""


def zb_h1(num_stages: int, num_microbatches: int) -> Iterator[Action]:
    """1f1b with every weight gradient as late as its memory allows (ZB-H1, arXiv 2401.10241).

    Stage k waits k microbatches with its weight gradients, so that errors come down sooner and
    none waits at the end. The bubble is (K - 1) (f + b - w) where M is at least K, a third of that
    of 1f1b where all are equal; a stage holds at most K microbatches. K = 3, M = 4::

        stage 0 | F0 F1 F2 .  .  B0 W0 F3 B1 W1 B2 W2 B3 W3 S3
        stage 1 | .  F0 F1 .  B0 F2 B1 W0 F3 B2 W1 B3 W2 W3 S3
        stage 2 | .  .  F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3 S3
    """
    orders = []
    for k in range(num_stages):
        phases = [(num_stages - k, "F0"), (k, "B0 F0"), (num_microbatches, "B0 W F0")]
        orders.append(_order([k], num_microbatches, phases))
    return wavefront(orders, range(num_stages), num_microbatches)


def zbv(num_stages: int, num_microbatches: int) -> Iterator[Action]:
    """No bubble where f = b = w: a V of two stages a device (ZB-V, arXiv 2401.10241).

    Device d of P = K / 2 has stages d and K - 1 - d, so that a microbatch turns on the last device
    and ends on the first, and holds at most K of both. Consecutive batches of M of at least K
    follow one another without a gap. K = 4, M = 4::

        stage 0 | F0 F1 F2 .  .  .  .  .  .  F3 B0 W0 .  .  .  B1 W1 .  .  .  B2 W2 B3 W3 S3 .  .
        stage 1 | .  F0 .  F1 .  .  .  F2 B0 W0 .  .  .  F3 B1 W1 .  .  .  B2 .  B3 W2 .  W3 S3 .
        stage 2 | .  .  F0 .  F1 B0 W0 .  .  .  F2 B1 W1 .  .  .  F3 B2 W2 .  B3 .  .  W3 .  .  S3
        stage 3 | .  .  .  F0 B0 W0 F1 B1 W1 .  .  .  F2 B2 W2 .  .  F3 B3 W3 .  .  .  .  .  S3 .
    """
    if num_stages == 1:
        return zb_h1(num_stages, num_microbatches)
    size, most = num_stages // 2, max(num_stages, num_microbatches)
    orders = []
    for d in range(size):
        full = most - 2 * size + d + 1  # turns in which forwards of both stages are left
        phases = [
            (2 * (size - d) - 1, "F0"),
            (d, "F1 F0"),
            (size - d, "F1 B1 W"),
            (full, "F0 B0 W F1 B1 W"),
            (size - d - 1, "B0 W F1 B1 W"),
            (d, "B0 B1"),
            (size - d, "B0 W"),
        ]
        orders.append(_order([d, num_stages - 1 - d], num_microbatches, phases))
    return wavefront(orders, v_placement(num_stages), num_microbatches)


def dualpipe_v(num_stages: int, num_microbatches: int) -> Iterator[Action]:
    """Half of DualPipe: a V in which forwards and backwards alternate (arXiv 2412.19437).

    The stages lie as in zbv. Whole backwards alternate with forwards; those at the ends are split.
    With f = b = w the bubble is P - 1 of them on P = K / 2 devices, each of which holds at most
    K + 1 microbatches of its stages. DeepSeek's (P - 1) (f + 2 b - w) is twice that: there a
    forward and a backward are one, and what they send leaves when both end. K = 4, M = 4::

        stage 0 | F0 F1 F2 .  .  .  .  F3 .  .  .  B0 W0 .  .  .  B1 W1 .  .  B2 W2 .  B3 W3 S3 .
        stage 1 | .  F0 .  F1 .  F2 .  .  .  B0 W0 F3 .  .  .  B1 W1 .  .  B2 W2 .  B3 .  W3 S3 .
        stage 2 | .  .  F0 .  F1 .  B0 W0 F2 .  .  .  B1 W1 F3 .  .  B2 W2 .  .  B3 .  W3 .  .  S3
        stage 3 | .  .  .  F0 B0 W0 F1 .  B1 W1 F2 .  .  B2 W2 F3 .  .  B3 W3 .  .  .  .  .  .  S3
    """
    if num_stages == 1:
        return zb_h1(num_stages, num_microbatches)
    size, most = num_stages // 2, max(num_stages, num_microbatches)
    orders = []
    for d in range(size):
        whole, late = divmod(d + 1, 2)
        phases = [
            (2 * (size - d - 1), "F0"),
            (d + 1, "F0 F1"),
            (size - d - 1, "B1 W F1"),
            (most - 2 * size + d + 1, "F0 B1 W F1 B0 W"),
            (size - d - 1, "B1 W F1 B0 W"),
            (whole, "B1 W B0 W"),
            (late, "B1 W B0"),
            (whole, "B1 B0"),
            (size - d - 1, "W B0"),
        ]
        orders.append(_order([d, num_stages - 1 - d], num_microbatches, phases))
    return wavefront(orders, v_placement(num_stages), num_microbatches)


def v_placement(num_stages: int) -> tuple[int, ...]:
    """Down and up again: stages d and K - 1 - d share device group d."""
    return tuple(min(stage, num_stages - 1 - stage) for stage in range(num_stages))


def _order(stages: Sequence[int], num_microbatches: int, phases: Phases) -> list[Action]:
    """What a device with these stages does; microbatches from M on are left out."""
    order: list[Action] = []
    waiting: deque[Action] = deque()
    counts: Counter[str] = Counter()
    for count, turn in phases:
        for word in turn.split() * count:
            if word == "W":
                order += [waiting.popleft()] if waiting else []
                continue
            kind, stage, microbatch = Kind(word[0]), stages[int(word[1])], counts[word]
            counts[word] += 1
            if microbatch < num_microbatches:
                order.append(Action(stage, kind, microbatch))
                if kind is Kind.BACKWARD:
                    waiting.append(Action(stage, Kind.WEIGHT, microbatch))
    return order + list(waiting)
