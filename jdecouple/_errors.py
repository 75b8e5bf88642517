"""What errors say: the first line of one, and checks of arguments in one dialect."""

import argparse
import difflib
import inspect
import math
import os
import re
from collections.abc import Collection, Iterable
from numbers import Integral, Real
from typing import Any, NoReturn

_MOST_CHARACTERS = 100  # of a name that is compared with others


def first_line(error: object) -> str:
    r"""First line of what an error says, or its type where it says nothing.

    What a terminal would not show, or would obey, is written as an escape.

    >>> first_line(ValueError("no such file\nand more"))
    'no such file'
    >>> first_line(KeyboardInterrupt())
    'KeyboardInterrupt'
    >>> print(first_line("\x1b[32mwell"))
    \x1b[32mwell
    """
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def gigabytes(size: int) -> str:
    """A number of bytes in a message."""
    return f"{size / 1e9:,.1f} GB"


def machine_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class OneLine(Exception):
    """An error about what the user gave or did: a notebook shows its line, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows of it."""
        return [f"{type(self).__name__}: {first_line(self)}"]


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """The end of a line that refuses a name: which of those `known` was probably meant, if any.

    Capitals and the dashes of a flag make no difference; the last part of a key is enough.

    >>> did_you_mean("DeInforeg", ("bp", "deinforeg"))
    "; did you mean 'deinforeg'?"
    >>> did_you_mean("learning_rat", ("optimizer.learning_rate", "seed"))
    "; did you mean 'optimizer.learning_rate'?"
    >>> did_you_mean("momentum", ("bp", "deinforeg"))
    ''
    """
    plain = {name.lower().lstrip("-"): name for name in known}
    names = {name.rpartition(".")[2]: plain[name] for name in plain} | plain
    text = str(given)[:_MOST_CHARACTERS].lower().lstrip("-")
    close = difflib.get_close_matches(text, names, 1)
    return f"; did you mean {names[close[0]]!r}?" if close else ""


def choices(given: object, allowed: Collection[str]) -> str:
    """What a line says that refuses a name: those allowed, and the one that was probably meant.

    >>> choices("bb", ("bp", "scpl"))
    'allowed are bp, scpl'
    >>> choices("scp", ("bp", "scpl"))
    "allowed are bp, scpl; did you mean 'scpl'?"
    """
    return f"allowed are {', '.join(allowed)}{did_you_mean(given, allowed)}"


class Arguments(argparse.ArgumentParser):
    """Arguments of a command; ValueError of one line for what they are not."""

    def __init__(self, command: str, documentation: str | None):
        super().__init__(
            prog=f"jdecouple {command}",
            description=inspect.cleandoc(documentation or "").partition("\n\nRaises:")[0],
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Refuses the arguments."""
        usage = " ".join(self.format_usage().split())
        _, is_unknown, flag = message.partition("unrecognized arguments: ")
        hint = did_you_mean(flag.split("=")[0], re.findall(r"--\w+", usage)) if is_unknown else ""
        raise ValueError(f"{message}; {usage}{hint}")


def require_type(wanted: type, /, **values: Any) -> None:
    """Raises TypeError for the first of `values` that is of another type.

    >>> require_type(Real, rate="0.1")
    Traceback (most recent call last):
    TypeError: rate is a str: a numbers Real is needed
    """
    for name, value in values.items():
        if not isinstance(value, wanted):
            package, given = wanted.__module__.split(".")[0], type(value).__name__
            raise TypeError(f"{name} is a {given}: a {package} {wanted.__name__} is needed")


def require_int(least: int, most: float = math.inf, /, **values: Any) -> None:
    """Raises ValueError for the first of `values` that is no whole number from `least` to `most`.

    >>> require_int(1, depth=0)
    Traceback (most recent call last):
    ValueError: depth is 0: a whole number of at least 1 is needed
    """
    for name, value in values.items():
        is_int = isinstance(value, Integral) and not isinstance(value, bool)
        if not is_int or not least <= value <= most:
            allowed = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
            raise ValueError(f"{name} is {value!r}: a whole number {allowed} is needed")


def require_number(*, positive: bool = False, below: float = math.inf, **values: Any) -> None:
    """Raises ValueError for the first of `values` that is no finite number in [0, `below`).

    >>> require_number(below=1, dropout=1.5)
    Traceback (most recent call last):
    ValueError: dropout is 1.5: a number in [0, 1) is needed

    Args:
        positive: Whether 0 is refused too.
        below: Upper bound, excluded.
        **values: Numbers by name.
    """
    for name, value in values.items():
        number = (
            isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) < below
        )
        if not number or (positive and value == 0):
            kind = f"finite number {'above' if positive else 'of at least'} 0"
            if below < math.inf:
                kind = f"number in {'(' if positive else '['}0, {below})"
            raise ValueError(f"{name} is {value!r}: a {kind} is needed")


def require_bool(**values: Any) -> None:
    """Raises ValueError for the first of `values` that is neither True nor False.

    >>> require_bool(normalize=1)
    Traceback (most recent call last):
    ValueError: normalize is 1: True or False is needed
    """
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}: True or False is needed")


def require_one_of(allowed: Collection[str], /, **values: Any) -> None:
    """Raises ValueError for the first of `values` that is not `allowed`.

    >>> require_one_of(("mean", "class"), pooling="max")
    Traceback (most recent call last):
    ValueError: pooling is 'max': allowed are mean, class
    """
    for name, value in values.items():
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}: {choices(value, allowed)}")
