"""What there is to choose from, and what a key of the configuration means, as text."""

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from jdecouple import data
from jdecouple._errors import did_you_mean, first_line
from jdecouple.data.loaders import options as data_options
from jdecouple.methods.table import spec
from jdecouple.train.errors import ConfigError
from jdecouple.train.keys import KEYS
from jdecouple.train.options import OWNERS, described_arguments, meanings, options
from jdecouple.train.rules import SCHEDULE_KEYS


@dataclasses.dataclass
class Entry:
    """What there is to say of a key.

    Attributes:
        key: the key, such as "optimizer.momentum".
        kind: type of its values.
        default: its value where none is given.
        meaning: what it is, in one line.
        takers: names of what takes it, by the kind of that; none for every run.
    """

    key: str
    kind: type
    default: Any
    meaning: str
    takers: dict[str, list[str]]

    @property
    def value(self) -> str:
        """Type and default."""
        kind = "any value" if self.kind is object else self.kind.__name__
        needed = self.default is inspect.Parameter.empty
        return f"{kind}, {'no default' if needed else f'by default {self.default!r}'}"


def entries(chosen: Mapping[str, str] = {}) -> list[Entry]:
    """All keys, and the options of all methods, models, optimizers and correctors.

    Owners that mean the same by an option, with the same default, share an entry. An optimizer that
    is `chosen` as "module:function" is one of them.
    """
    found = [*map(_entry, KEYS)]
    for section, registry in OWNERS.items():
        shared: dict[Any, Entry] = {}
        for name in dict.fromkeys([*registry.names(), *filter(None, [chosen.get(section)])]):
            meaning = meanings(section, name)
            for key, (kind, default) in options(section, name).items():
                said = _sentence(meaning[key])
                entry = Entry(f"{section}.{key}", kind, default, said, {section: []})
                same = (key, kind, repr(default), said)
                shared.setdefault(same, entry).takers[section].append(name)
        found += shared.values()
    return found


def _entry(key: Any) -> Entry:
    section, _, last = key.name.rpartition(".")
    meaning, takers = key.meaning, {"": [key.takers] if key.takers else []}
    if section == "data" and not meaning:
        meaning = _sentence(described_arguments(data.load.__doc__)[last])
        takers = {"data set": [name for name, keys in data_options().items() if last in keys]}
    if section == "optimizer":
        takers = {"schedule": [name for name, keys in SCHEDULE_KEYS.items() if last in keys]}
    return Entry(key.name, key.kind, key.value, meaning, takers)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] if text else "Its docstring does not say."


def described(key: str, chosen: Mapping[str, str] = {}) -> str:
    """Meaning, type, default and takers of a key, of an option, or of all in a section.

    The options of what is `chosen`, by section, are known as well.

    Raises:
        ConfigError: there is no such key.
    """
    wanted, known = key.lstrip("-").removeprefix("config."), entries(chosen)
    found = [entry for entry in known if f"{entry.key}.".startswith(f"{wanted}.")]
    found = found or [entry for entry in known if entry.key.endswith(f".{wanted}")]
    if not found:
        hint = did_you_mean(wanted, (entry.key for entry in known))
        raise ConfigError(f"unknown key {key!r}: `jdecouple list keys` shows all{hint}")
    return "\n\n".join(
        f"config.{entry.key}\n  {entry.meaning}\n  {entry.value}\n  taken by: {_takers(entry)}"
        for entry in found
    )


def _takers(entry: Entry) -> str:
    listed = (f"{kind} {', '.join(names)}".strip() for kind, names in entry.takers.items() if names)
    return "; ".join(listed) or "every run"


def options_of(section: str, name: str) -> str:
    """The options of a method, model, optimizer or corrector with their defaults, in one line."""
    return ", ".join(
        key if default is inspect.Parameter.empty else f"{key}={default!r}"
        for key, (_, default) in options(section, name).items()
    )


def methods() -> Iterator[tuple[str, str]]:
    """Methods, and what each is."""
    for name in OWNERS["method"].names():
        objective, route, source, *_ = spec(name)
        said = first_line(inspect.cleandoc(objective.__doc__ or objective.__name__))
        yield name, f"{said} Route: {route.__name__}. {source}".rstrip()


def models() -> Iterator[tuple[str, str]]:
    """Models, and what each is."""
    return _builders("model")


def optimizers() -> Iterator[tuple[str, str]]:
    """Optimizers, and what each is."""
    return _builders("optimizer")


def correctors() -> Iterator[tuple[str, str]]:
    """Correctors, and what each does."""
    return _builders("corrector")


def _builders(section: str) -> Iterator[tuple[str, str]]:
    registry = OWNERS[section]
    for name in registry.names():
        yield name, first_line(inspect.cleandoc(registry.get(name).__doc__ or name))


def data_sets() -> Iterator[tuple[str, str]]:
    """Data sets, and the keys that each takes."""
    for name, keys in data_options().items():
        place = f"{name}PATH" if name.endswith(":") else name
        yield place, f"takes {', '.join(f'data.{key}' for key in keys)}"


def keys() -> Iterator[tuple[str, str]]:
    """Keys of the configuration, and what each is."""
    for entry in entries():
        yield f"config.{entry.key}", f"{entry.meaning} ({entry.value}; {_takers(entry)})"
