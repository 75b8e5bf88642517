"""Checks that several functions make of their arguments."""

from numbers import Integral
from typing import Any


def check_type(label: str, value: Any, wanted: type) -> None:
    """Raises TypeError unless a value is of a type."""
    if not isinstance(value, wanted):
        package = wanted.__module__.split(".")[0]
        raise TypeError(
            f"{label} is a {type(value).__name__}: a {package} {wanted.__name__} is needed"
        )


def check_count(label: str, value: Any) -> None:
    """Raises ValueError for a value that is neither None nor a whole number above 0."""
    if value is not None and (not isinstance(value, Integral) or value < 1):
        raise ValueError(f"{label} is {value!r}: a whole number of at least 1 is needed")
