"""Local modules: which units of a net, its blocks as built, stand together behind one head.

A cut is one of

- "units": every unit is a module;
- K, a whole number: the first of the net's named splits with K parts; without one 1 makes a single
  module, and the number of units as many;
- "name:K", or "name" alone where that split has one K: a split of `Model.splits`;
- indices of the units at which modules begin, the first 0, such as `(0, 3, 7)`.

Numbers and indices may be given as text, as a command line does.
"""

import ast
import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

from flax import nnx

from jdecouple._errors import choices, did_you_mean
from jdecouple.models.channels import handed, handed_entries, read_entries
from jdecouple.models.materialized import materialize

Cut = int | str | Sequence[int]
Splits = Mapping[str, Mapping[int, tuple[int, ...]]]


def module_starts(cut: Cut, splits: Splits, count: int) -> tuple[int, ...]:
    """Indices of the units at which the modules of a cut begin, the first 0.

    >>> splits = {"even": {2: (3,), 3: (2, 4)}, "late": {2: (5,)}}
    >>> [module_starts(cut, splits, 6) for cut in (2, "even:3", "late", "(0, 1)")]
    [(0, 3), (0, 2, 4), (0, 5), (0, 1)]

    Args:
        cut: see this module.
        splits: as of `Model`.
        count: number of units.

    Raises:
        ValueError: there is no such cut.
    """
    cut = parsed(cut)
    if isinstance(cut, str):
        return (0, *_named(cut, splits, count))
    if isinstance(cut, Integral) and not isinstance(cut, bool):
        return (0, *_published(int(cut), splits, count))
    if not isinstance(cut, Sequence):
        raise ValueError(
            f"cut is {cut!r}: 'units', a number of modules, a split such as 'name:4', or unit "
            "indices such as (0, 3, 7) are needed"
        )
    whole = all(isinstance(start, Integral) and not isinstance(start, bool) for start in cut)
    if not whole or [*cut[:1]] != [0] or any(a >= b for a, b in itertools.pairwise((*cut, count))):
        raise ValueError(
            f"cut is {cut!r}: modules begin at increasing unit indices, the first 0, the last "
            f"{count - 1} at most"
        )
    return tuple(map(int, cut))


def parsed(cut: Any) -> Any:
    """A cut that is given as text as what the text says; a name, and all else, as it is.

    >>> parsed("(0,3)"), parsed("4"), parsed("dgl:4")
    ((0, 3), 4, 'dgl:4')
    """
    if isinstance(cut, str):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return ast.literal_eval(cut)
    return cut


def _named(cut: str, splits: Splits, count: int) -> tuple[int, ...]:
    if cut == "units":
        return tuple(range(1, count))
    name, colon, _ = cut.partition(":")
    if name not in splits:
        names = ("units", *splits)
        raise ValueError(
            f"cut is {cut!r}: allowed are {', '.join(names)}, a number of modules, and unit "
            f"indices such as (0, 3, 7){did_you_mean(name, names)}"
        )
    parts = {f"{name}:{k}": starts for k, starts in splits[name].items()}
    if not colon and len(parts) == 1:
        return next(iter(parts.values()))
    if cut not in parts:
        raise ValueError(f"cut is {cut!r}: {choices(cut, parts)}")
    return parts[cut]


def _published(k: int, splits: Splits, count: int) -> tuple[int, ...]:
    known = [*splits.values(), {1: (), count: tuple(range(1, count))}]
    for cuts in known:
        if k in cuts:
            return cuts[k]
    numbers = ", ".join(map(str, sorted({k for cuts in known for k in cuts})))
    raise ValueError(
        f"cut is {k}: cuts into {numbers} modules are known; unit indices such as (0, 3, 7) make "
        "others"
    )


def regrouped(splits: Splits, starts: Sequence[int]) -> Splits:
    """Splits by units as splits by the modules that begin at `starts`, but for those in a module.

    >>> regrouped({"even": {2: (3,), 3: (2, 4)}}, (0, 2, 4))
    {'even': {3: (1, 2)}}
    """
    kept = {
        name: {
            k: tuple(map(starts.index, units)) for k, units in cuts.items() if {*units} <= {*starts}
        }
        for name, cuts in splits.items()
    }
    return {name: cuts for name, cuts in kept.items() if cuts}


class Chain(nnx.Sequential):
    """Consecutive units as one block, which reads and hands on by name what its units do.

    What one of them hands on to a later one stays inside. It is no embedding block
    (`is_embedding`), even where its first unit is: it does more. Unlike `nnx.Sequential` it hands
    on what a unit returns as it is, a dict too.
    """

    def __init__(self, *units: nnx.Module):
        super().__init__(*units)
        read: dict[str, None] = {}
        written: dict[str, None] = {}
        for unit in units:
            read |= dict.fromkeys(name for name in read_entries(unit) if name not in written)
            written |= dict.fromkeys(handed_entries(unit))
        self.inputs, self.outputs = tuple(read), tuple(written)

    def __call__(self, x: Any, **entries: Any) -> Any:  # type: ignore[override]
        """Applies the units in turn, each to what the one before returned."""
        for number, unit in enumerate(self.layers):
            x = materialize(x) if number else x
            output = unit(x, **{name: entries[name] for name in read_entries(unit)})
            x, more = handed(unit, output)
            entries |= more
        return (x, {name: entries[name] for name in self.outputs}) if self.outputs else x

    def inverse(self, y: Any) -> Any:
        """The input of the output of units that all have an inverse, and pass nothing by name."""
        for unit in reversed(self.layers):
            y = unit.inverse(y)
        return y


def first_embedding(block: Any) -> nnx.Module | None:
    """The module that embeds a block's input: the block, or its first unit; None of others."""
    first: Any = block.layers[0] if isinstance(block, Chain) else block
    return first if getattr(first, "is_embedding", False) else None


def cuttable(builder: Callable[..., Any]) -> Callable[..., Any]:
    """A builder of models with the keyword `cut`, by default "units"; see this module.

    One that has an argument `cut` of its own stays as it is.
    """
    signature = inspect.signature(builder)
    parameters = [*signature.parameters.values()]
    if "cut" in signature.parameters:
        return builder

    @functools.wraps(builder)
    def build(*args: Any, cut: Cut = "units", **kwargs: Any) -> Any:
        model = builder(*args, **kwargs)
        if not hasattr(model, "cut"):
            kind = type(model).__name__
            raise TypeError(f"the model's builder returns one of type {kind}: a Model is needed")
        return model if isinstance(cut, str) and cut == "units" else model.cut(cut)

    further = [each for each in parameters if each.kind is each.VAR_KEYWORD]
    own = inspect.Parameter("cut", inspect.Parameter.KEYWORD_ONLY, default="units", annotation=Cut)
    before = parameters[: len(parameters) - len(further)]
    build.__signature__ = signature.replace(parameters=[*before, own, *further])  # type: ignore[attr-defined]
    return build
