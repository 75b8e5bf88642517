"""Consecutive batches in groups, for a trainer that takes several at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, TypeVar

Read = TypeVar("Read")


def group_sizes(first: int, last: int, most: int, *multiples: int) -> Iterator[int]:
    """Yields how many steps each group takes from step `first` to step `last`.

    Args:
        first: steps done before the first group.
        last: steps done after the last group.
        most: steps that a group may take.
        *multiples: a group ends, perhaps early, at every multiple of any of these.
    """
    while first < last:
        ends = [(first // multiple + 1) * multiple for multiple in multiples]
        end = min(last, first + most, *ends)
        yield end - first
        first = end


class Groups(Generic[Read]):
    """Iterates over lists of consecutive batches.

    Args:
        iterator: where batches come from; its `get_state()` and `close()`, if any, are passed on.
        sizes: how many batches each list holds; the lists end with it.
    """

    def __init__(self, iterator: Iterator[Read], sizes: Iterator[int]):
        self._iterator, self._sizes = iterator, sizes

    def __iter__(self) -> Groups[Read]:
        return self

    def __next__(self) -> list[Read]:
        return [next(self._iterator) for _ in range(next(self._sizes))]

    def __getattr__(self, name: str) -> Any:
        if name in ("get_state", "close"):
            return getattr(self._iterator, name)
        raise AttributeError(name)
