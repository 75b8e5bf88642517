"""What a block reads and hands on by name, beside the activation.

A block may name two things:

- `inputs`: entries that it is called with, `block(x, skip=...)`;
- `outputs`: entries that it hands on: it then returns `(x, {"skip": ...})`.

What an earlier block hands on is a channel: it passes the blocks between, which do not see it, up
to the last that reads it. A name that no earlier block hands on is an entry of the batch.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Alive(NamedTuple):
    """The channels that reach a block and those that go on behind it, by name.

    Attributes:
        before: those that it or a later block reads.
        behind: those that a later block reads.
    """

    before: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()


NO_CHANNELS = Alive()


def alive(blocks: Sequence[Any]) -> list[Alive]:
    """The channels at every block of a net.

    >>> from types import SimpleNamespace as Block
    >>> down, middle, up = Block(outputs=("skip",)), Block(), Block(inputs=("skip", "more"))
    >>> [tuple(each.behind) for each in alive([down, middle, up])]
    [('skip',), ('skip',), ()]
    """
    written: set[str] = set()
    reads: list[set[str]] = []
    for block in blocks:
        reads.append(written.intersection(read_entries(block)))
        written |= {*handed_entries(block)}
    found: list[Alive] = []
    behind: tuple[str, ...] = ()
    for block, read in zip(reversed(blocks), reversed(reads), strict=True):
        before = tuple(sorted({*behind}.difference(handed_entries(block)) | read))
        found.append(Alive(before, behind))
        behind = before
    return found[::-1]


def read_entries(block: Any) -> tuple[str, ...]:
    """Entries beside "x" that a block names in its attribute `inputs`, () without one.

    An attribute of that name that holds no names is the block's own.
    """
    return _names(getattr(block, "inputs", ()))


def handed_entries(block: Any) -> tuple[str, ...]:
    """Entries that a block names in its attribute `outputs`, () without one; as `read_entries`."""
    return _names(getattr(block, "outputs", ()))


def handed(block: Any, output: Any) -> tuple[Any, dict[str, Any]]:
    """What a block returned, as its activation and the entries that it hands on.

    Raises:
        ValueError: it is no pair of both, though the block has `outputs`, or of other names.
    """
    names = handed_entries(block)
    if not names:
        return output, {}
    is_pair = isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], Mapping)
    if not is_pair or {*output[1]} != {*names}:
        given = f"entries {', '.join(map(str, output[1]))}" if is_pair else type(output).__name__
        raise ValueError(f"it returns {given}: its outputs need (x, {{{', '.join(names)}}})")
    return output[0], dict(output[1])


def _names(names: Any) -> tuple[str, ...]:
    names = (names,) if isinstance(names, str) else names
    is_names = isinstance(names, tuple | list) and all(isinstance(name, str) for name in names)
    return tuple(names) if is_names else ()
