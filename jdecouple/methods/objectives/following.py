"""Weights of a head that follow those of units above, and that no gradient moves."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from flax import nnx


class Followed(nnx.Variable):
    """A moving average, in a head, of a parameter of a unit above.

    After every batch it becomes momentum x itself + (1 - momentum) x what the block above had when
    it was trained on that batch: the parameter, or its own average of one of a unit further up.

    Attributes:
        unit: index of the unit, see `jdecouple.models.cuts`.
        path: name of the parameter in it, such as "layers/0/kernel".
        momentum: share of the average that stays.
    """


class Source(NamedTuple):
    """What a `Followed` variable follows.

    Attributes:
        unit: index of the unit.
        path: name of the parameter in it.
        momentum: share of the average that stays.
        name: among the parameters and statistics of the block above, once this is known.
    """

    unit: int
    path: str
    momentum: float
    name: str = ""

    @classmethod
    def of(cls, variable: nnx.Variable) -> "Source | None":
        """That of a variable; None of one that follows nothing."""
        if not isinstance(variable, Followed):
            return None
        return cls(variable.unit, variable.path, variable.momentum)


def follow(copy: nnx.Module, unit: int, momentum: float) -> None:
    """Lets all parameters of a copy of a unit follow those of the unit.

    They become `Followed` variables, in their places; `momentum` is the share that stays.
    """
    paths = {
        id(variable): "/".join(map(str, path))
        for path, variable in nnx.iter_graph(copy)
        if isinstance(variable, nnx.Param)
    }
    made: dict[int, Followed] = {}
    for owner, name, variable in list(_attributes(copy)):
        number = id(variable)
        if number not in made:
            source: dict[str, Any] = {"unit": unit, "path": paths[number], "momentum": momentum}
            made[number] = Followed(variable.get_value(), **source)
        setattr(owner, name, made[number])


def linked(
    follows: Mapping[str, Source], above: Mapping[str, Source], units: Sequence[int], chained: bool
) -> dict[str, Source]:
    """What averages follow in the block above, by its names there.

    Args:
        follows: of a block, by the names of the averages.
        above: the same of the block above.
        units: indices of that block's units.
        chained: whether these are in a list, or the block is its unit.
    """
    averages = {(source.unit, source.path): name for name, source in above.items()}
    found = {}
    for name, source in follows.items():
        if source.unit in units:
            place = f"layers/{source.unit - units[0]}/" if chained else ""
            found[name] = source._replace(name=f"block/{place}{source.path}")
        else:
            found[name] = source._replace(name=averages[source.unit, source.path])
    return found


def _attributes(module: nnx.Module) -> Iterator[tuple[Any, str, nnx.Param]]:
    """Every attribute of a module, or of what is in it, that is a parameter."""
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Variable) or not hasattr(node, "__dict__"):
            continue
        for name, value in vars(node).items():
            if isinstance(value, nnx.Param):
                yield node, name, value
