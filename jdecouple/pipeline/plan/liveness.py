"""Bytes that the operations of a call need at a time."""

import functools
import heapq
import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from jdecouple.pipeline.plan.graph import Graph, Op

_SMALL = 1024  # bytes of an array that is not worth a look


class Step(NamedTuple):
    """What runs at once: an operation with all that is computed where it reads it.

    Attributes:
        inputs: values in memory that it reads.
        outputs: values that it puts there.
        inner: bytes that it needs beside both.
        shares: inputs whose memory a result may take over.
        whole: whether the operation is none that goes element by element.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    inner: int
    shares: tuple[int, ...]
    whole: bool


def temporaries(graph: Graph) -> int:
    """Bytes beside arguments and results."""
    given = {*graph.inputs, *graph.results}
    sizes = [0 if number in given else size for number, size in enumerate(graph.sizes)]
    steps = fused(graph)
    return min(peak([steps[n] for n in order], sizes) for order in _orders(steps, graph))


def needed(graph: Graph, reused: Mapping[int, int]) -> int:
    """Bytes beside the arguments, in the best of some orders of the operations.

    `reused` says of results, by their place, in the memory of which argument they lie.
    """
    graph, steps = with_copies(graph, fused(graph), reused)
    given = set(graph.inputs)
    slots, size = [], 0
    for place, value in enumerate(graph.outputs):
        if value is None:
            continue
        if place in reused:
            slots.append(Slot(value, graph.inputs[reused[place]]))
            continue
        size += graph.sizes[value]
        if value not in given:
            slots.append(Slot(value, value))
    slots.sort(key=lambda slot: graph.sizes[slot.result])
    return size + _beside(_best_order(steps, graph), graph, slots)


def _best_order(steps: Sequence[Step], graph: Graph) -> list[Step]:
    """The steps in that of some orders in which the least is held at a time."""
    sizes = list(graph.sizes)
    for value in graph.inputs:
        sizes[value] = 0
    orders = [[steps[n] for n in order] for order in _orders(steps, graph)]
    return min(orders, key=lambda order: peak(order, sizes, graph.results))


class Slot(NamedTuple):
    """Memory of a result, which may be that of an argument until both are needed."""

    result: int
    argument: int


def _beside(steps: Sequence[Step], graph: Graph, slots: Sequence[Slot]) -> int:
    """Bytes beside arguments and results, whose memory others use as long as it is free."""
    sizes = list(graph.sizes)
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for number, step in enumerate(steps):
        for value in (*step.inputs, *step.outputs):
            first.setdefault(value, number)
            last[value] = number
    taken: list[tuple[int, list[tuple[int, int]]]] = []
    for result, argument in slots:
        spans = [(first.get(result, 0), len(steps))]
        if argument != result:
            spans.append((-1, last.get(argument, -1)))
        taken.append((sizes[result], spans))
    for value in (*graph.inputs, *graph.results):
        sizes[value] = 0
    for value in sorted((v for v in first if sizes[v] >= _SMALL), key=lambda v: -sizes[v]):
        start, end = first[value], last[value]
        for size, spans in taken:
            if size >= sizes[value] and all(b < start or end < a for a, b in spans):
                spans.append((start, end))
                sizes[value] = 0
                break
    return peak(steps, sizes)


def _orders(steps: Sequence[Step], graph: Graph) -> list[list[int]]:
    return [list(range(len(steps))), late(steps), greedy(steps, graph)]


def with_copies(
    graph: Graph, steps: list[Step], reused: Mapping[int, int]
) -> tuple[Graph, list[Step]]:
    """Copies of arguments whose memory a result takes while other steps may still read them.

    XLA copies unless what a step depends on says that it is the last to read.
    """
    made = {value: number for number, step in enumerate(steps) for value in step.outputs}
    readers: dict[int, list[int]] = defaultdict(list)
    for number, step in enumerate(steps):
        for value in step.inputs:
            readers[value].append(number)
    copies: dict[int, int] = {}
    sizes, ranks = list(graph.sizes), list(graph.ranks)
    for place, argument in reused.items():
        value, result = graph.inputs[argument], graph.outputs[place]
        if result not in made or sizes[value] < _SMALL:
            continue
        last = made[result]
        others = set(readers[value]) - {last}
        in_place = last not in readers[value] or value in steps[last].shares
        if others - _before(steps, made, last) or not in_place:
            copies[value] = len(sizes)
            sizes.append(sizes[value])
            ranks.append(ranks[value])
    if not copies:
        return graph, steps
    begin = [Step((value,), (copy,), 0, (), False) for value, copy in copies.items()]
    changed = [
        step._replace(
            inputs=tuple(copies.get(v, v) for v in step.inputs),
            shares=tuple(copies.get(v, v) for v in step.shares),
        )
        for step in steps
    ]
    return graph._replace(sizes=sizes, ranks=ranks), begin + changed


def _before(steps: Sequence[Step], made: Mapping[int, int], number: int) -> set[int]:
    """Steps that one depends on."""
    found: set[int] = set()
    stack = [number]
    while stack:
        for value in steps[stack.pop()].inputs:
            below = made.get(value)
            if below is not None and below not in found:
                found.add(below)
                stack.append(below)
    return found


def fused(graph: Graph) -> list[Step]:
    """The operations, of which those are joined that need no array in between."""
    made = {value: op for op in graph.ops for value in op.outputs}
    users: dict[int, list[Op]] = defaultdict(list)
    for op in graph.ops:
        for value in set(op.inputs):
            users[value].append(op)
    results = set(graph.results)

    def inline(value: int) -> bool:
        return value in made and made[value].kind in ("each", "dear", "move")

    def reads(op: Op) -> bool:
        return op.kind == "whole" or (op.kind == "reduce" and op.reads)

    held = set()
    for op in graph.ops:
        for value in op.outputs:
            again = op.kind == "dear" and len(users[value]) > 1
            if not inline(value) or value in results or again or any(map(reads, users[value])):
                held.add(value)

    def spread(value: int) -> bool:
        return value in made and made[value].name in ("broadcast_in_dim", "iota")

    def unary(value: int) -> bool:
        op, rank = made[value], graph.ranks[value]
        large = {v for v in op.inputs if graph.ranks[v] >= rank and not spread(v)}
        return op.kind != "dear" and len(large) <= 1

    @functools.cache
    def leaves(value: int, top: bool) -> frozenset[tuple[int, bool]]:
        """Values in memory that one is computed from, and whether element by element."""
        if value not in made or not inline(value):
            return frozenset({(value, True)})
        if value in held and not top and not unary(value):
            return frozenset({(value, True)})
        op = made[value]
        each = op.kind != "move"
        return frozenset(
            (leaf, same and each) for v in op.inputs for leaf, same in leaves(v, False)
        )

    steps = []
    for op in graph.ops:
        if op.kind in ("whole", "reduce"):
            read = set(op.inputs)
            if not reads(op):
                read = {leaf for v in op.inputs for leaf, _ in leaves(v, False)}
            steps.append(Step(tuple(sorted(read)), op.outputs, op.inner, (), True))
            continue
        for value in op.outputs:
            if value in held:
                pairs = leaves(value, True)
                moved = {leaf for leaf, same in pairs if not same}
                size = graph.sizes[value]
                read = {leaf for leaf, _ in pairs}
                shares = [v for v in read - moved if graph.sizes[v] == size]
                steps.append(Step(tuple(sorted(read)), (value,), 0, tuple(shares), False))
    return steps


def peak(steps: Sequence[Step], sizes: Sequence[int], kept: Iterable[int] = ()) -> int:
    """Most bytes that values hold when steps run one after another."""
    last = {}
    for number, step in enumerate(steps):
        for value in (*step.inputs, *step.outputs):
            last[value] = number
    last |= dict.fromkeys(kept, len(steps))
    held = most = 0
    for number, step in enumerate(steps):
        dying = [v for v in step.inputs if last[v] == number]
        new = sum(sizes[value] for value in step.outputs)
        reused = max((sizes[v] for v in step.shares if v in dying and sizes[v] == new), default=0)
        most = max(most, held + new + step.inner - reused)
        held += new
        gone = dying + [v for v in step.outputs if last[v] == number]
        held -= sum(sizes[value] for value in set(gone))
    return most


def late(steps: Sequence[Step]) -> list[int]:
    """The order of the program, but what goes element by element comes where it is first read."""
    made = {value: number for number, step in enumerate(steps) for value in step.outputs}
    done = [False] * len(steps)
    order: list[int] = []

    def visit(number: int) -> None:
        stack = [(number, False)]
        while stack:
            number, ready = stack.pop()
            if done[number]:
                continue
            if ready:
                done[number] = True
                order.append(number)
                continue
            stack.append((number, True))
            stack += [(made[v], False) for v in reversed(steps[number].inputs) if v in made]

    for number, step in enumerate(steps):
        if step.whole:
            visit(number)
    for number in range(len(steps)):
        visit(number)
    return order


def greedy(steps: Sequence[Step], graph: Graph) -> list[int]:
    """An order in which that step comes next that leaves the fewest bytes; of equals the newest."""
    sizes, kept = graph.sizes, set(graph.inputs)
    made = {value: number for number, step in enumerate(steps) for value in step.outputs}
    users: dict[int, list[int]] = defaultdict(list)
    for number, step in enumerate(steps):
        for value in step.inputs:
            users[value].append(number)
    left = {value: len(users[value]) for value in range(len(sizes))}
    for value in graph.results:
        left[value] += 1
    missing = [sum(v in made for v in step.inputs) for step in steps]
    ready: list[tuple] = []
    entered: dict[int, int] = {}
    clock = itertools.count(1)

    def push(number: int) -> None:
        step = steps[number]
        freed = sum(sizes[v] for v in step.inputs if left[v] == 1 and v not in kept)
        defined = sum(sizes[v] for v in step.outputs)
        fanout = sum(len(users[v]) for v in step.outputs)
        key = (0, 0) if defined <= 8 else (1, defined - freed, -fanout)
        entered[number] = next(clock)
        heapq.heappush(ready, (*key, -entered[number], number))

    for number in range(len(steps)):
        if not missing[number]:
            push(number)
    order: list[int] = []
    done = [False] * len(steps)
    while ready:
        *_, entry, number = heapq.heappop(ready)
        if done[number] or entered[number] != -entry:
            continue
        done[number] = True
        order.append(number)
        for value in steps[number].outputs:
            for user in users[value]:
                missing[user] -= 1
                if not missing[user]:
                    push(user)
        for value in steps[number].inputs:
            left[value] -= 1
            if left[value] == 1 and value not in kept:
                for user in users[value]:
                    if not done[user] and not missing[user]:
                        push(user)
    return order
