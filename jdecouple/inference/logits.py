"""Checks of saved logits and of the labels that go with them."""

import math
from numbers import Real
from typing import Any

import numpy as np


def check_logits(logits: Any, least: int = 0) -> np.ndarray:
    """Logits `[exits, n, classes]` as float32, which is what a device gives.

    >>> check_logits([[1.0, 2.0]])
    Traceback (most recent call last):
    ValueError: logits have shape [1, 2]: [exits, n, classes] with an exit and 2 classes is needed

    Args:
        logits: Those of every exit.
        least: The smallest number of examples that will do.

    Raises:
        TypeError: They are no numbers.
        ValueError: They have another shape, too few examples, or a value that is not finite.
    """
    given = _array(logits, "logits", np.floating)
    shape = given.shape
    if given.ndim != 3 or shape[0] < 1 or shape[2] < 2:
        raise ValueError(
            f"logits have shape {list(shape)}: [exits, n, classes] with an exit and 2 classes "
            "is needed"
        )
    if shape[1] < least:
        raise ValueError(f"logits hold {shape[1]} examples: at least {least} is needed")
    with np.errstate(over="ignore"):  # the next lines tell
        checked = given.astype(np.float32)
    bad = np.argwhere(~np.isfinite(checked))
    if len(bad):
        place = tuple(map(int, bad[0]))
        raise ValueError(
            f"logits are {given[place]} at exit {place[0]}, example {place[1]}, class {place[2]}: "
            "finite float32 numbers are needed"
        )
    return checked


def check_labels(labels: Any, logits: np.ndarray) -> np.ndarray:
    """Labels `[n]` as integers, one for every example of `logits` `[..., n, classes]`.

    Raises:
        TypeError: They are no integers.
        ValueError: They are too few, too many, or not all classes.
    """
    count, classes = logits.shape[-2:]
    given = _array(labels, "labels", np.integer)
    if given.shape != (count,):
        raise ValueError(f"labels have shape {list(given.shape)}: [{count}] is needed")
    wrong = np.flatnonzero((given < 0) | (given >= classes))
    if len(wrong):
        raise ValueError(
            f"label {wrong[0]} is {given[wrong[0]]}: a class from 0 to {classes - 1} is needed"
        )
    return given.astype(np.int64)


def check_numbers(
    name: str, values: Any, *, positive: bool = False, never: bool = False
) -> float | tuple[float, ...]:
    """A finite number, or a tuple of some, from what a user gives.

    Args:
        name: What an error calls them.
        values: A number, or a sequence of numbers.
        positive: Whether 0 and less are refused.
        never: Whether infinity is allowed too.

    Raises:
        TypeError: They are no numbers.
        ValueError: One is not allowed.
    """
    if hasattr(values, "tolist"):  # an array, or a number of one
        values = values.tolist()
    many = isinstance(values, list | tuple)
    listed = tuple(values) if many else (values,)
    if not listed:
        raise ValueError(f"{name} are empty: a number, or one for each exit, is needed")
    for value in listed:
        if not isinstance(value, Real) or isinstance(value, bool):
            raise TypeError(f"{name} hold {value!r}: a number, or one for each exit, is needed")
        number = float(value)
        if not (math.isfinite(number) or (never and number == math.inf)) or (
            positive and number <= 0
        ):
            kind = "finite numbers above 0" if positive else "finite numbers"
            raise ValueError(f"{name} hold {number}: {kind}{' or inf' * never} are needed")
    return tuple(map(float, listed)) if many else float(values)


def scaled(logits: np.ndarray, temperatures: Any) -> np.ndarray:
    """Checked logits `[exits, n, classes]`, each exit's divided by its temperature, in float32.

    Raises:
        TypeError: A temperature is no number.
        ValueError: A temperature is not above 0, they are of another number of exits, or a
            quotient is beyond float32.
    """
    divisors = check_numbers("temperatures", temperatures, positive=True)
    if isinstance(divisors, tuple) and len(divisors) != len(logits):
        raise ValueError(
            f"there are {len(divisors)} temperatures: one is needed for each of {len(logits)} exits"
        )
    with np.errstate(over="ignore"):  # the next lines tell
        quotients = logits / np.reshape(np.asarray(divisors, np.float32), (-1, 1, 1))
    if not np.isfinite(quotients).all():
        raise ValueError(
            f"logits up to {np.abs(logits).max()} are beyond float32 when divided by the "
            f"temperature {np.min(divisors)}: higher temperatures are needed"
        )
    return quotients


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Log-softmax over the last axis, in float64."""
    shifted = logits - np.max(logits, axis=-1, keepdims=True).astype(np.float64)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))


def losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Negative log likelihood `[exits, n]` of the labels `[n]` under logits `[exits, n, classes]`.

    Both are checked already.
    """
    every = np.arange(len(labels))
    return -log_probabilities(logits)[:, every, labels]


def _array(values: Any, name: str, kind: Any) -> np.ndarray:
    """The values as an array of integers, or of integers and floating-point numbers."""
    try:
        given = np.asarray(values)
    except ValueError:
        raise ValueError(f"{name} are rows of unequal length: an array is needed") from None
    allowed = {np.floating: "numbers", np.integer: "integers"}[kind]
    if given.dtype.kind == "V" and kind is np.floating:  # bfloat16 and its like
        given = given.astype(np.float32)
    if not (np.issubdtype(given.dtype, kind) or np.issubdtype(given.dtype, np.integer)):
        raise TypeError(f"{name} are of dtype {given.dtype}: {allowed} are needed")
    return given
