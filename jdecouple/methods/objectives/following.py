"""Weights of a head that follow those of the block above, and that no gradient moves."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from flax import nnx


class Followed(nnx.Variable):
    """A moving average of a parameter of the block above, in a head.

    After every batch it becomes momentum x itself + (1 - momentum) x the parameter that the block
    above had when it was trained on that batch.

    Attributes:
        source: name of the parameter in that block's first unit, such as "layers/0/kernel".
        momentum: share of the average that stays.
    """


class Source(NamedTuple):
    """What a `Followed` variable follows, and how fast."""

    name: str
    momentum: float

    @classmethod
    def of(cls, variable: nnx.Variable) -> "Source | None":
        """That of a variable; None of one that follows nothing."""
        if not isinstance(variable, Followed):
            return None
        return cls(variable.source, variable.momentum)


def follow(copy: nnx.Module, momentum: float) -> None:
    """Lets all parameters of a copy of the next unit follow those of the unit.

    They become `Followed` variables, in their places; `momentum` is the share that stays.
    """
    names = {
        id(variable): "/".join(map(str, path))
        for path, variable in nnx.iter_graph(copy)
        if isinstance(variable, nnx.Param)
    }
    made: dict[int, Followed] = {}
    for owner, name, variable in list(_attributes(copy)):
        if id(variable) not in made:
            source = names[id(variable)]
            made[id(variable)] = Followed(variable.get_value(), source=source, momentum=momentum)
        setattr(owner, name, made[id(variable)])


def _attributes(module: nnx.Module) -> Iterator[tuple[Any, str, nnx.Param]]:
    """Every attribute of a module, or of what is in it, that is a parameter."""
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Variable) or not hasattr(node, "__dict__"):
            continue
        for name, value in vars(node).items():
            if isinstance(value, nnx.Param):
                yield node, name, value
