"""Options of methods, models and the like: what a configuration may set, by their owner."""

import contextlib
import functools
import inspect
import re
import textwrap
import types
import typing
from typing import Any

from jdecouple import methods, models, optim
from jdecouple.methods.table import Method, spec
from jdecouple.optim import correctors

# Sections of a configuration, and the registry in which their key `name` chooses the owner.
OWNERS = {"method": methods, "model": models, "corrector": correctors, "optimizer": optim}
# Arguments of builders that the run itself fills in.
_FILLED = {"num_classes", "image_size", "channels", "input_size", "param_dtype", "rngs"}
_FILLED |= {"vocabulary_size", "max_length", "embeddings", "context", "learning_rate"}
_FILLED |= {"optimizer", "delay"}
_TYPES = {bool, int, float, str, tuple}


def is_imported(section: str, name: Any) -> bool:
    """Whether a section chooses by "module:function", as that of the optimizer may."""
    return section == "optimizer" and isinstance(name, str) and ":" in name


def options(section: str, name: str) -> dict[str, tuple[type, Any]]:
    """Types and defaults of what a section may set for a method, model, optimizer or corrector.

    The type is the annotation's, or the default's where that names none or several; `object`, any,
    where neither is one that a configuration holds.

    >>> options("optimizer", "sgd")["momentum"]
    (<class 'float'>, 0.0)

    Raises:
        ValueError: there is none of that name.
    """
    arguments = _arguments(section, name)
    hints: dict[str, Any] = {}
    for owner in _owners(section, name):
        with contextlib.suppress(NameError, TypeError):  # a name for type checkers; no annotations
            hints |= typing.get_type_hints(owner)
    return {key: (_type(hints.get(key), value), value) for key, value in arguments.items()}


def meanings(section: str, name: str) -> dict[str, str]:
    """What the options of a method, model and so on are: as its docstrings say.

    >>> meanings("optimizer", "sgd")["momentum"]
    'Decay of the accumulated gradient, in [0, 1).'

    Raises:
        ValueError: there is none of that name.
    """
    owners = [*map(inspect.unwrap, _owners(section, name))]
    texts = [models.__doc__ if section == "model" else "", *(owner.__doc__ for owner in owners)]
    found = functools.reduce(dict.__or__, map(described_arguments, texts))
    return {key: found.get(key, "") for key in _arguments(section, name)}


def described_arguments(documentation: str | None) -> dict[str, str]:
    """What a docstring in Google's style says of its Args or Attributes, each in one line.

    In the text of a package it is the list of what its functions share.

    >>> described_arguments(described_arguments.__doc__)
    {'documentation': "the docstring, with its lines' indentation or without."}

    Args:
        documentation: the docstring, with its lines'
            indentation or without.
    """
    text = inspect.cleandoc(documentation or "")
    items = re.findall(r"^- `(\w+)`: (.*(?:\n  .*)*)", text, re.M)
    for part in re.findall(r"^(?:Args|Attributes):((?:\n(?: .*)?)+)", text, re.M):
        part = textwrap.dedent(part)
        items += re.findall(r"^(\w+)(?: \([^)]*\))?: (.*(?:\n +.*)*)", part, re.M)
    return {name: re.sub(r"[;.]?$", ".", " ".join(said.split()), count=1) for name, said in items}


def _owners(section: str, name: str) -> tuple[Any, ...]:
    """What names and describes the options of a section, the most important last."""
    if section == "method":
        return spec(name).route, spec(name).objective, Method
    return (OWNERS[section].get(name),)


def _arguments(section: str, name: str) -> dict[str, Any]:
    """Options with their defaults."""
    if section == "method":
        return methods.arguments(name)
    parameters = inspect.signature(OWNERS[section].get(name)).parameters.values()
    return {
        p.name: p.default
        for p in parameters
        if p.name not in _FILLED and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }


def _type(annotation: Any, value: Any) -> type:
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    members = typing.get_args(annotation) if union else (annotation,)
    named = {typing.get_origin(member) or member for member in members} & _TYPES
    if len(named) == 1:
        return named.pop()
    return type(value) if type(value) in _TYPES else object
