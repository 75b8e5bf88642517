"""Optimisers of other modules, by "module:function"."""

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import optax

from jdecouple._errors import first_line, require_type
from jdecouple.optim.schedules import LearningRate


def imported(name: str) -> Callable[..., optax.GradientTransformation]:
    """The function of a module, as one whose learning rate is called so."""
    module, _, attribute = name.partition(":")
    with _about(name):
        function = getattr(importlib.import_module(module), attribute)
        parameters = list(inspect.signature(function).parameters.values())
        if not parameters:
            raise TypeError(f"{attribute} takes no learning rate")
    by_name = any(parameter.name == "learning_rate" for parameter in parameters)

    @functools.wraps(function)
    def build(learning_rate: LearningRate, **options: Any) -> optax.GradientTransformation:
        with _about(name):
            if by_name:
                made = function(learning_rate=learning_rate, **options)
            else:
                made = function(learning_rate, **options)
            require_type(optax.GradientTransformation, **{f"what {attribute} returns": made})
        return made

    if not by_name:
        parameters[0] = parameters[0].replace(name="learning_rate")
    vars(build)["__signature__"] = inspect.Signature(parameters)
    return build


@contextlib.contextmanager
def _about(name: str) -> Iterator[None]:
    """Turns whatever a function of others raises into a ValueError of one line."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"name is {name!r}, which does not work: {first_line(error)}") from error
