"""What a run says of bad input: one line."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from ml_collections import ConfigDict

from jdecouple._errors import OneLine, first_line

_MOST_CHARACTERS = 200  # of a value in a message


class ConfigError(OneLine, ValueError):
    """A bad value, or input that does not fit; the message is one line."""


@contextlib.contextmanager
def one_line(section: Any = None, path: str = "config") -> Iterator[None]:
    """Turns what is raised about given values, files or data into a ConfigError.

    A message that begins with a key that `section`, which is at `path`, sets is about that.
    """
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, TypeError, OSError, OverflowError) as error:
        text = first_line(error)
        text = text if len(text) <= 2 * _MOST_CHARACTERS else f"{text[: 2 * _MOST_CHARACTERS]}..."
        key = re.split(r"\W", text, maxsplit=1)[0]
        value = None if section is None else section.get(key)
        known = value is not None and not is_section(value)
        raise ConfigError(f"{path}.{text}" if known else text) from error


def shown(value: Any) -> str:
    """A value in a message: in Python's words, cut where those are long."""
    try:
        text = repr(value)
    except ValueError:  # more digits than Python writes
        return "a huge number"
    if len(text) <= _MOST_CHARACTERS:
        return text
    if isinstance(value, int):
        return "a huge number"
    return f"{text[:_MOST_CHARACTERS]}... ({len(text)} characters)"


def is_section(value: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether a value is a section of a configuration."""
    return isinstance(value, Mapping | ConfigDict)
