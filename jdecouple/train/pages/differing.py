"""In what runs differ: their names, and the values of their keys."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jdecouple._files import absolute
from jdecouple.train import config as configuration
from jdecouple.train.pages.record import Record
from jdecouple.train.pages.setup import default_values, flat


def labels(folders: Sequence[Path]) -> list[str]:
    """Names of different folders, each with as many of its parents as tell it from the others.

    >>> labels([Path("/runs/a/bp"), Path("/runs/b/bp"), Path("/runs/b/dgl")])
    ['a/bp', 'b/bp', 'dgl']
    """
    every = [absolute(folder).parts[1:] for folder in folders]

    def named(parts: tuple[str, ...]) -> str:
        for count in range(1, len(parts)):
            if sum(other[-count:] == parts[-count:] for other in every) == 1:
                return "/".join(parts[-count:])
        return f"/{'/'.join(parts)}"

    return [*map(named, every)]


class Value(NamedTuple):
    """What a run has for a key, whether that is the default, and what it was before which step."""

    value: Any
    default: bool = False
    before: tuple[tuple[int, Any], ...] = ()

    def __str__(self) -> str:
        said = [f"{self.value} (default)" if self.default else f"{self.value}"]
        return "; ".join([*said, *(f"{old} before step {step:,}" for step, old in self.before)])

    @property
    def same(self) -> tuple[str, Any]:
        """What is equal for values that are."""
        return str(self.value), self.before


def values(run: Record) -> dict[str, Value]:
    """Values of a run's keys, those of its method, model and optimizer too.

    Keys that an earlier version did not know have their defaults, and `steps` is the length, also
    where epochs set it. A configuration that this version does not know is taken as it is written.
    """
    config = run.content["config"] if run.config is None else run.config
    defaults = flat(configuration.default()) if run.config is None else default_values(run.config)
    given = flat(config)
    given["steps"] = given.get("steps") or run.total_steps  # where epochs set it
    changes: dict[str, list[tuple[int, Any]]] = {}
    for change in run.content.get("history") or ():
        changes.setdefault(change["key"], []).append((change["step"], _plain(change["old"])))
    found = {}
    for key in {**defaults, **given}:
        value, default = (_plain(each.get(key)) for each in (given, defaults))
        value = default if value is None else value
        is_default = key in defaults and value == default
        found[key] = Value(value, is_default, tuple(changes.get(key, ())))
    return found


def differences(runs: Sequence[Record]) -> dict[str, list[Value | None]]:
    """The keys that differ between runs, with the value of each; None where one does not take it.

    An option that only some of them take, as their method has it, counts where one has set it.
    Device, stages and versions come last.
    """
    found = [values(run) for run in runs]
    rows: dict[str, list[Value | None]] = {}
    for key in sorted({key for each in found for key in each}):
        row = [each.get(key) for each in found]
        if all(row) or not all(value.default for value in row if value):
            rows[key] = row
    versions = [run.content.get("versions") or {} for run in runs]
    told = {
        "device": [run.content.get("device_kind") for run in runs],
        "blocks at which stages begin": [run.content.get("boundaries") for run in runs],
    }
    for name in {name: None for each in versions for name in each}:
        told[f"version of {name}"] = [each.get(name) for each in versions]
    for key, plain in told.items():
        rows[key] = [None if value is None else Value(_plain(value)) for value in plain]
    return {key: row for key, row in rows.items() if len({v and v.same for v in row}) > 1}


def _plain(value: Any) -> Any:
    """A value as it is compared and shown: lists are tuples, functions their names."""
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    return getattr(value, "__qualname__", repr(value)) if callable(value) else value
