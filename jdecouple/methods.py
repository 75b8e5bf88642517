"""The table of methods: an objective and a route each."""

import dataclasses
from typing import Any

from jdecouple.objectives import (
    CrossEntropy,
    InformationRegularization,
    Objective,
    SupervisedContrastive,
)
from jdecouple.routes import Local, Route, Synchronous


@dataclasses.dataclass(frozen=True)
class Method:
    """A published way of training: what each block minimises, and how error reaches it.

    Attributes:
        name: its row in the table.
        objective: what each block minimises.
        route: how error reaches a block.
        init: initial weights of the heads, "flax" or "torch".
    """

    name: str
    objective: Objective
    route: Route
    init: str = "flax"

    def __post_init__(self) -> None:
        if self.init not in ("flax", "torch"):
            raise ValueError(f"init is {self.init!r}: allowed are flax, torch")


# name: objective, route, source
_METHODS: dict[str, tuple[type, type, str]] = {
    "bp": (CrossEntropy, Synchronous, "end-to-end backpropagation"),
    "deinforeg": (InformationRegularization, Local, "arXiv:2506.18193"),
    "scpl": (SupervisedContrastive, Local, "arXiv:2602.00062"),
}


def names() -> tuple[str, ...]:
    """Names that `get` takes."""
    return tuple(_METHODS)


def _row(name: str) -> tuple[type, type, str]:
    if name not in _METHODS:
        raise ValueError(f"unknown method {name!r}: allowed are {', '.join(_METHODS)}")
    return _METHODS[name]


def source(name: str) -> str:
    """Where a method was published."""
    return _row(name)[2]


def arguments(name: str) -> dict[str, Any]:
    """Arguments of a method with their defaults: the objective's, the route's, `init`.

    Raises:
        ValueError: unknown method.
    """
    objective, route, _ = _row(name)
    fields = [*_fields(objective), *_fields(route)]
    return {**{field.name: field.default for field in fields}, "init": Method.init}


def get(name: str, *, init: str = "flax", **arguments: Any) -> Method:
    """Builds a method.

    Args:
        name: one of `names()`.
        init: initial weights of the heads, "flax" or "torch".
        **arguments: arguments of its objective and its route, see `arguments(name)`.

    Raises:
        ValueError: an unknown method, or an argument out of range.
        TypeError: an argument that the method does not have.
    """
    objective, route, _ = _row(name)
    parts = []
    for part in (objective, route):
        accepted = {field.name for field in _fields(part)}
        parts.append(part(**{key: arguments.pop(key) for key in accepted & arguments.keys()}))
    if arguments:
        allowed = [field.name for part in (objective, route) for field in _fields(part)]
        raise TypeError(
            f"method {name} takes no argument {sorted(arguments)[0]!r}: "
            f"allowed are {', '.join([*allowed, 'init'])}"
        )
    return Method(name, parts[0], parts[1], init)


def _fields(part: type) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(part) if field.init]
