"""Options of methods, models and optimizers: what a configuration may set, by their owner."""

import contextlib
import inspect
import types
import typing
from typing import Any

from jdecouple import methods, models, optim
from jdecouple.methods.table import Method, spec

# Sections of a configuration, and the registry in which their key `name` chooses the owner.
OWNERS = {"method": methods, "model": models, "optimizer": optim}
# Arguments of builders that the run itself fills in.
_FILLED = {"num_classes", "image_size", "channels", "input_size", "param_dtype", "rngs"}
_FILLED |= {"vocabulary_size", "max_length", "embeddings", "learning_rate"}
_TYPES = {bool, int, float, str, tuple}


def is_imported(section: str, name: Any) -> bool:
    """Whether a section chooses by "module:function", as that of the optimizer may."""
    return section == "optimizer" and isinstance(name, str) and ":" in name


def options(section: str, name: str) -> dict[str, tuple[type, Any]]:
    """Types and defaults of what a section may set for a method, model or optimizer.

    The type is the annotation's, or the default's where that names none or several; `object`, any,
    where neither is one that a configuration holds.

    >>> options("optimizer", "sgd")["momentum"]
    (<class 'float'>, 0.0)

    Raises:
        ValueError: there is none of that name.
    """
    if section == "method":
        owners: tuple[Any, ...] = (spec(name).route, spec(name).objective, Method)
        arguments = methods.arguments(name)
    else:
        builder = OWNERS[section].get(name)
        owners = (builder,)
        parameters = inspect.signature(builder).parameters.values()
        arguments = {
            p.name: p.default
            for p in parameters
            if p.name not in _FILLED and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        }
    hints: dict[str, Any] = {}
    for owner in owners:
        with contextlib.suppress(NameError, TypeError):  # a name for type checkers; no annotations
            hints |= typing.get_type_hints(owner)
    return {key: (_type(hints.get(key), value), value) for key, value in arguments.items()}


def _type(annotation: Any, value: Any) -> type:
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    members = typing.get_args(annotation) if union else (annotation,)
    named = {typing.get_origin(member) or member for member in members} & _TYPES
    if len(named) == 1:
        return named.pop()
    return type(value) if type(value) in _TYPES else object
