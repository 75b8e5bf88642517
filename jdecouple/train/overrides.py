"""What a command line, or a caller, changes of the configuration that a file returned."""

import functools
import operator
import re
import sys
from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from jdecouple.train import config as configuration
from jdecouple.train.errors import is_section
from jdecouple.train.options import OWNERS, options
from jdecouple.train.rules import SCHEDULE_KEYS

_KEY = r"--?(?:no)?config\.([^=]*)(?:=(.*))?"
_SCHEDULE = "optimizer.schedule"
_DATA = "data.name"
_STATISTICS = ("mean", "std")  # keys of `data` whose values are those of one data set
NAMES = (*(f"{section}.name" for section in OWNERS), _SCHEDULE, _DATA)
"""Keys that choose what the other keys of their section belong to."""


def typed(
    loaded: Mapping[str, Any], names: Mapping[str, str], arguments: list[str]
) -> tuple[ConfigDict, list[str]]:
    """What a file returned, with a typed key for all that may be set; the overrides left.

    The command line may choose other `names`, by key. An override by None takes back what the file
    set, whoever's option it is, and leaves open what is open.

    Raises:
        ConfigError: a name or a key that does not exist, or a value of the wrong type.
    """
    config, arguments = {**loaded}, _joined(arguments)
    last = {match[1]: match[2] for match in map(override, arguments) if match}
    unset = {key for key, value in last.items() if value == "None"}
    done = {key for key in unset if _take_back(config, key)}
    complete = configuration.filled(renamed(config, names, last), all_options=True)
    for key in last.keys() - done:
        kind = configuration.value_type(complete, key)
        if key in unset and kind is not ConfigDict and _value(complete, key) is None:
            done.add(key)

    def counts(argument: str) -> bool:
        match = override(argument)
        if not match:
            return True
        later = match[2] == "None" and match[1] not in unset  # another value comes later
        return match[1] not in done and not later

    return complete, list(filter(counts, arguments))


def override(argument: str) -> re.Match[str] | None:
    """Key and value of an argument that sets a key; None for any other."""
    return re.match(_KEY, argument)


def renamed(
    config: Mapping[str, Any], names: Mapping[str, str], anew: Collection[str] = ()
) -> dict[str, Any]:
    """A copy of a configuration under other names, without what belongs to its own names.

    That is what its method, model, optimizer or schedule takes and the other one does not, or has
    another default for, as that is another key of the same name, and the statistics of its data
    set: a line on stderr tells of it, but for keys that are set `anew`. What belongs to neither
    stays, to be refused.
    """
    changed, told, defaults = {**config}, [], configuration.default()
    for key, new in names.items():
        section, last = key.split(".")
        given, default = changed.get(section, {}), defaults[section]
        if not is_section(given):  # refused where it is read
            continue
        old, new = given.get(last, default[last]), default[last] if new == "None" else new
        before, now = _taken(key, old) or {}, _taken(key, new)
        foreign = {k for k, kind in before.items() if now is not None and now.get(k) != kind}
        foreign &= {k for k, value in given.items() if value not in (None, default.get(k))}
        lost = [f"config.{section}.{k}" for k in sorted(foreign) if f"{section}.{k}" not in anew]
        if lost:
            told.append(f"config.{key} is {new!r}, not {old!r}: left out {', '.join(lost)}")
        changed[section] = {k: v for k, v in given.items() if k not in foreign} | {last: new}
    if told:
        print(f"note: {'; '.join(told)}", file=sys.stderr)
    return changed


def _taken(key: str, name: Any) -> dict[str, str] | None:
    """Keys that what a name chooses takes, with type and default; None where there is none."""
    try:
        if key == _SCHEDULE:
            return dict.fromkeys(SCHEDULE_KEYS[name], "")
        if key == _DATA:
            return dict.fromkeys(_STATISTICS, name)
        return {k: repr(kind) for k, kind in options(key.partition(".")[0], name).items()}
    except (LookupError, ValueError, TypeError):
        return None


def with_value(config: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of a configuration in which a key has another value."""
    first, dot, rest = key.partition(".")
    section = config.get(first, {})
    inner = with_value(section if is_section(section) else {}, rest, value) if dot else value
    return {**config, first: inner}


def _joined(arguments: list[str]) -> list[str]:
    """Arguments in which an override by None is one, as it may be two."""
    joined: list[str] = []
    for argument in arguments:
        if argument == "None" and joined and re.fullmatch(r"--?config\.[^=]+", joined[-1]):
            joined[-1] += "=None"
        else:
            joined.append(argument)
    return joined


def _value(config: Any, key: str) -> Any:
    return functools.reduce(operator.getitem, key.split("."), config)


def _take_back(config: dict[str, Any], key: str) -> bool:
    """Removes a key that is not at its default, out of copies of its sections; whether it is so."""
    *path, last = key.split(".")
    defaults = configuration.default()
    for name in path:
        if not is_section(config.get(name)):
            return False
        config[name] = {**config[name]}
        config, defaults = config[name], defaults.get(name) or {}
    if is_section(config.get(last, {})) or (last in defaults and config[last] == defaults[last]):
        return False
    del config[last]
    return True
