"""The names that `config.tracking` knows, and what each stands for."""

import importlib
from collections.abc import Callable
from importlib import metadata
from typing import Any, NamedTuple

from jdecouple._errors import choices
from jdecouple.train.errors import ConfigError, shown
from jdecouple.train.tracking.writer import Callback, Start

Factory = Callable[[Start], Callback]


class _BuiltIn(NamedTuple):
    package: str
    module: str
    attribute: str


_BUILT_IN = {
    "tensorboard": _BuiltIn("tensorboardX", "tensorboard", "TensorBoard"),
    "wandb": _BuiltIn("wandb", "weights_and_biases", "WeightsAndBiases"),
}
_REGISTERED: dict[str, Factory] = {}


def register(name: str, factory: Factory) -> None:
    """Adds a writer; `config.tracking` then knows its name.

    A name that was registered before is replaced, so that a notebook's cell may run twice.

    >>> def lines(start):
    ...     return lambda step, split, values: print(start.workdir.name, step, split)
    >>> register("lines", lines)
    >>> names()
    ('tensorboard', 'wandb', 'lines')

    Args:
        name: what it is called.
        factory: gets a `Start` when the run begins; returns a writer, or a function of a step, a
            split and values.

    Raises:
        ValueError: the name is a built-in writer's, or holds a comma.
        TypeError: the factory cannot be called.
    """
    if name in _BUILT_IN:
        raise ValueError(f"tracker {name!r} is built in: register yours under another name")
    if not name or "," in name or name != name.strip():
        raise ValueError(f"tracker name is {name!r}: one without commas and spaces is needed")
    if not callable(factory):
        raise TypeError(f"the factory of tracker {name!r} is {factory!r}: a function is needed")
    _REGISTERED[name] = factory


def names() -> tuple[str, ...]:
    """Names that `config.tracking` may hold."""
    return (*_BUILT_IN, *_REGISTERED)


def chosen(value: Any) -> tuple[str, ...]:
    """The names in a value of `config.tracking`, each once.

    >>> chosen("tensorboard, wandb"), chosen(("wandb",)), chosen(None)
    (('tensorboard', 'wandb'), ('wandb',), ())

    Raises:
        ValueError: something else than names, or one that is not known; the message begins with
            the key.
    """
    given = value.split(",") if isinstance(value, str) else () if value is None else value
    if not isinstance(given, list | tuple) or not all(isinstance(name, str) for name in given):
        raise ValueError(
            f"tracking is {shown(value)}: names such as 'tensorboard,wandb' are needed"
        )
    wanted = tuple(dict.fromkeys(name.strip() for name in given if name.strip()))
    for name in wanted:
        if name not in names():
            raise ValueError(f"tracking is {shown(value)}: {choices(name, names())}")
    return wanted


def is_built_in(name: str) -> bool:
    """Whether a writer comes with the package."""
    return name in _BUILT_IN


def check_installed(value: Any) -> None:
    """Raises ConfigError for a writer in `config.tracking` whose package is missing."""
    for name in filter(is_built_in, chosen(value)):
        package = _BUILT_IN[name].package
        try:
            metadata.distribution(package)
        except metadata.PackageNotFoundError as error:
            raise ConfigError(
                f"config.tracking is {value!r}: {name} needs the package {package}; "
                'pip install "jdecouple[tracking]"'
            ) from error


def factory(name: str) -> Factory:
    """What makes the writer of a name; its package is imported here and not before."""
    if name in _REGISTERED:
        return _REGISTERED[name]
    _, module, attribute = _BUILT_IN[name]
    return getattr(importlib.import_module(f"jdecouple.train.tracking.{module}"), attribute)
