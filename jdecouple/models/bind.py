"""Builders with some of their arguments fixed."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from jdecouple.models.base import Model


def bind(builder: Callable[..., Model], name: str, text: str, **fixed: Any) -> Callable[..., Model]:
    """Fix keyword arguments of a builder, which its signature then lists no more."""

    @functools.wraps(builder)
    def bound(*args: Any, **kwargs: Any) -> Model:
        return builder(*args, **kwargs, **fixed)

    signature = inspect.signature(builder)
    left = [each for key, each in signature.parameters.items() if key not in fixed]
    bound.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
    bound.__name__ = bound.__qualname__ = name
    bound.__doc__ = f"{text}; its arguments are the others of :func:`{builder.__name__}`."
    return bound
