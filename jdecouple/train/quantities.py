"""Quantities with a unit, such as 16GB or 50us: read from a command line, and shown."""

import math
import re
from decimal import Decimal

from jdecouple.train.errors import ConfigError, shown

_EXAMPLES = {"B": "16GB", "B/s": "12GB/s", "s": "50us", "FLOPS": "8TFLOPS"}
"""The units that are known, each with what an error shows of it."""
_POWERS = {"": 0, "k": 3, "K": 3, "M": 6, "G": 9, "T": 12, "P": 15}
_LARGE = {prefix: Decimal(10) ** power for prefix, power in _POWERS.items()}
_BINARY = {f"{letter}i": Decimal(2) ** (10 * power) for power, letter in enumerate("KMGTP", 1)}
_SMALL = {"": Decimal(1), "m": Decimal("1e-3"), "u": Decimal("1e-6"), "n": Decimal("1e-9")}
_STEPS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))


def parse(name: str, text: str, unit: str) -> float:
    """The number that a quantity stands for.

    >>> parse("--memory", "16GB", "B"), parse("--latency", "50us", "s")
    (16000000000.0, 5e-05)

    Args:
        name: what it is given for, in the error.
        text: a number above 0, a prefix (k, M, G, T, P; Ki, Mi, ... for powers of 1,024; of
            seconds m, u, n) and the unit.
        unit: "B", "B/s", "s" or "FLOPS".

    Raises:
        ConfigError: anything else, in one line.
    """
    prefixes = _SMALL if unit == "s" else _LARGE | _BINARY
    match = re.fullmatch(rf"\s*(\d*\.?\d+(?:e[+-]?\d{{1,2}})?)\s*(\w*?){re.escape(unit)}\s*", text)
    factor = prefixes.get(match[2]) if match else None
    value = float(Decimal(match[1]) * factor) if match and factor else 0.0
    if not 0 < value < math.inf:
        raise ConfigError(
            f"{name} is {shown(text)}: a number above 0 with its unit, such as {_EXAMPLES[unit]}, "
            "is needed"
        )
    return value


def show(value: float, unit: str) -> str:
    """A quantity for people, to three digits.

    >>> show(1.5e9, "B"), show(0.0123, "s"), show(0, "B")
    ('1.5 GB', '12.3 ms', '0 B')
    """
    if unit == "s":
        for factor, prefix in ((1.0, ""), (1e-3, "m"), (1e-6, "u")):
            if value >= factor or prefix == "u":
                return f"{_digits(value / factor)} {prefix}s"
    for factor, prefix in _STEPS:
        if value >= factor:
            return f"{_digits(value / factor)} {prefix}{unit}"
    return f"{_digits(value)} {unit}"


def _digits(value: float) -> str:
    """Three digits, or all of a whole number before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
