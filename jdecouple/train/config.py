"""The configuration of a run: its keys, their defaults, and the checks that have no other owner."""

import contextlib
import functools
import json
import operator
import re
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from flax import traverse_util
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jdecouple._errors import choices, did_you_mean, require_int, require_one_of
from jdecouple.models.cuts import parsed
from jdecouple.train.errors import ConfigError, is_section, one_line, shown
from jdecouple.train.keys import KEYS, nested
from jdecouple.train.options import OWNERS, is_imported, options
from jdecouple.train.rules import MOST, RULES, clashes


def default() -> ConfigDict:
    """The configuration that every file in configs/ starts from.

    Its keys are those of `keys.KEYS`. It is locked (an unknown key is an error), but for the
    sections `method`, `model`, `optimizer` and `corrector`: these also take the options of what
    `name` chooses, or have its defaults.

    >>> config = default()
    >>> config.method.name = "scpl"
    >>> config.method.temperature = 0.2
    >>> config.batch_size, config.optimizer.learning_rate
    (128, 0.001)
    """
    config = ConfigDict(nested()).lock()
    for section in OWNERS:
        config[section].unlock()
    return config


def chosen(config: ConfigDict, section: str) -> dict[str, Any]:
    """The options that a complete configuration sets for its method, model and so on."""
    keys = default()[section]
    return {key: value for key, value in config[section].items() if key not in keys}


def value_type(config: ConfigDict, key: str, path: str = "config") -> type:
    """Type of the value of a key such as "mesh.stages"; ConfigDict for a section.

    Raises:
        ConfigError: there is no such key; what holds `config` is called `path`.
    """
    first, dot, rest = key.partition(".")
    if not isinstance(config, ConfigDict) or first not in config:
        _unknown_key(config, path, first)
    return value_type(config[first], rest, f"{path}.{first}") if dot else config.get_type(first)


def filled(config: Mapping[str, Any], *, all_options: bool = False) -> ConfigDict:
    """The complete configuration: keys that are not given have their defaults.

    With `all_options`, options that are not given are there too, None with their type.

    Raises:
        ConfigError: a name or a key that does not exist, or a value of the wrong type.
    """
    complete = default()
    for section, registry in OWNERS.items():
        target, given = complete[section], config.get(section)
        name = given.get("name", target.name) if is_section(given) else target.name
        if name not in (known := registry.names()) and not is_imported(section, name):
            known = (*known, "module:function") if section == "optimizer" else known
            raise ConfigError(f"config.{section}.name is {shown(name)}: {choices(name, known)}")
        target.name = name
        with one_line(target, f"config.{section}"):
            arguments = options(section, name)
        for key, (kind, _) in arguments.items():
            target[key] = placeholder(kind)
    _fill(complete, config, "config")
    for section in () if all_options else OWNERS:
        for key in [key for key, value in complete[section].items() if value is None]:
            del complete[section][key]
    return complete


def validate(config: Mapping[str, Any]) -> ConfigDict:
    """The complete configuration, checked: keys, types, and what nothing else would refuse.

    Args:
        config: a configuration made from `default()`, or a mapping like it.

    Raises:
        ConfigError: naming the first bad key, what it holds and what is allowed.
    """
    complete = filled(config)
    for keys, fits, allowed in RULES:
        for key in keys.split():
            *path, last = key.split(".")
            value = functools.reduce(operator.getitem, path, complete).get(last)
            if value is not None and not fits(value):
                raise ConfigError(f"config.{key} is {shown(value)}: {allowed}")
    for key, value in _flat(complete).items():
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(n, int) and abs(n) > MOST for n in numbers) and key != "seed":
            raise ConfigError(f"config.{key} is {shown(value)}: at most {MOST} is allowed")
    for message in clashes(complete, default()):
        raise ConfigError(f"config.{message}")
    return complete


# Keys of `data` that earlier versions did not know: at their defaults a run is what it was.
_LATER = ("crop_mode", "cutout", "clean", "tokenizer")
# Keys that say where, in which order and how often something is done, and not what is learnt.
_FREE = (
    *("log_every", "checkpoint", "profile", "sufficient_direction", "max_in_flight", "remat"),
    *("mesh", "num_stages", "boundaries", "split", "schedule", "engine", "chunk"),
    *("tracking", "gradient_norms"),
)


# Keys that are part of a run's identity where they are set.
_OWN = ("growth", "init_from", "corrector")


def settings(config: ConfigDict, total_steps: int) -> dict[str, Any]:
    """What else a complete configuration computes with: values by key, as JSON.

    A run may be continued with other ones, but then it is not what either of them computes.
    `steps` is the length of the run, whether or not epochs set it.
    """
    arguments = options("optimizer", config.optimizer.name).items()
    optimizer = {key: value for key, (_, value) in arguments} | config.optimizer.to_dict()
    parts = {"optimizer": optimizer, "early_stopping": config.early_stopping.to_dict()}
    values = config.to_dict() | traverse_util.flatten_dict(parts, sep=".")
    values["steps"] = total_steps
    for key in (*identity(config), *_FREE, *parts, *_OWN, "epochs"):
        values.pop(key, None)
    return json.loads(json.dumps(values, default=lambda x: getattr(x, "__qualname__", repr(x))))


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Key, old and new value of what differs between two `settings`; None where there is none.

    A key that earlier versions did not know had its default.
    """
    known = {key.name: key.value for key in KEYS}
    pairs = {key: (before.get(key, known.get(key)), now.get(key)) for key in {**before, **now}}
    return [(key, old, new) for key, (old, new) in pairs.items() if old != new]


def identity(config: ConfigDict) -> dict[str, Any]:
    """The values that make a run what it is, as JSON; what is left at None does not count.

    A run cannot be continued with others.
    """
    values = {key: config[key] for key in ("batch_size", "seed")}
    values["optimizer.name"] = config.optimizer.name
    for section in ("method", "model", "data"):
        values[section] = {k: v for k, v in config[section].items() if v is not None}
    for key in ("data_dir", "download"):  # where the data lies may change
        values["data"].pop(key, None)
    for key in _LATER:
        if values["data"].get(key) == default().data[key]:
            del values["data"][key]
    if config.corrector.name != "none":
        values["corrector"] = {k: v for k, v in config.corrector.items() if v is not None}
    if config.growth.blocks is not None:
        values["growth"] = {k: v for k, v in config.growth.items() if v is not None}
    if config.init_from is not None:
        values["init_from"] = config.init_from
    return json.loads(json.dumps(values))


def check_identity(now: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Raises ConfigError unless a run of the identity `before` may go on as one of `now`."""
    for key in {**now, **before}:
        if (old := before.get(key)) == (new := now.get(key)):
            continue
        if key == "schedule":  # written where batches wait for local methods
            old, new = (value or "one without queues" for value in (old, new))
        difference = f"{old}, now {new}"
        if isinstance(old, dict) and isinstance(new, dict):
            pairs = {name: (old.get(name), new.get(name)) for name in old | new}
            differing = (f"{k} {a!r} (now {b!r})" for k, (a, b) in pairs.items() if a != b)
            difference = ", ".join(differing)
        label = f"config.{key}" if key.split(".")[0] in default() else key
        raise ConfigError(
            f"the workdir holds a run with {label} = {difference}: choose another workdir, or the "
            "same value"
        )


def _fill(target: ConfigDict, given: Any, path: str) -> None:
    for key, value in given.items():
        here, owned = f"{path}.{key}", path.removeprefix("config.") in OWNERS
        if key not in target:
            if owned and value is None:  # left at its default
                continue
            _unknown_key(target, path, key)
        if is_section(target[key]):
            if not is_section(value):
                raise ConfigError(f"{here} is {shown(value)}: a section with keys is needed")
            _fill(target[key], value, here)
            continue
        if here == "config.remat" and isinstance(value, bool):  # what version 0.1.0 wrote
            value = "stages" if value else "none"
        kind, optional = target.get_type(key), target[key] is None
        if value == "None" and optional:  # as the command line gives it
            value = None
        if here == "config.model.cut" and kind is str:
            value = _spelt(value)
        if (type(value), kind) in ((list, tuple), (int, float)):
            with contextlib.suppress(OverflowError):  # a number beyond those of a float
                value = kind(value)
        fits = isinstance(value, kind) and (kind in (bool, object) or not isinstance(value, bool))
        if not fits and not (value is None and optional):
            raise ConfigError(
                f"{here} is {shown(value)}: a value of type {kind.__name__} is needed"
            )
        target[key] = value


def _spelt(cut: Any) -> Any:
    """A cut as the text that stands for it, in one spelling; what is none as it is."""
    said = parsed(cut)
    said = tuple(said) if isinstance(said, list) else said
    return str(said) if type(said) in (int, tuple) else cut


def _unknown_key(section: Any, path: str, key: str) -> NoReturn:
    if not isinstance(section, ConfigDict):
        raise ConfigError(f"unknown key {path}.{key}: {path} is a value, without keys")
    owner = path.removeprefix("config.")
    if owner in OWNERS:
        known = options(owner, section.name)
        shared = [name for name in default()[owner] if name not in {"name", *known}]
        beside = f", beside {', '.join(shared)}" if shared else ""
        hint = did_you_mean(key, [*known, *shared])
        allowed = f"{', '.join(known) or 'no options'}{beside}{hint}"
        raise ConfigError(
            f"{path}.{key} is set, but {owner} {section.name!r} takes only: {allowed}"
        )
    elsewhere = [*(each.name for each in KEYS), *_flat(section)]
    hint = did_you_mean(key, [*elsewhere, *section])
    raise ConfigError(f"unknown key {path}.{key}: allowed are {', '.join(sorted(section))}{hint}")


def _flat(section: ConfigDict) -> dict[str, Any]:
    return traverse_util.flatten_dict(section.to_dict(), sep=".")


def named(arguments: str) -> ConfigDict:
    """The default configuration with the names in "dataset,model,method"; a path may have commas.

    Initial weights are PyTorch's, as in the papers' code: local losses and LARS see their scale.

    Raises:
        ValueError: There are not three names, or no model or method has that name.
    """
    return _named(
        arguments, f"'dataset,model,method' is needed after the file: given {arguments!r}"
    )


def in_paper(
    arguments: str, papers: Collection[str], form: str
) -> tuple[ConfigDict, str | None, int | None]:
    """What `named` makes of "dataset,model,method[@paper][,K]"; paper and K, None if not given.

    Args:
        arguments: what follows the file.
        papers: those whose settings there are.
        form: what an error says that the arguments should be.

    Raises:
        ValueError: As `named`, or there are no such settings of a paper, or K is 0.
    """
    names, paper, count = re.fullmatch(_IN_PAPER, arguments).groups()  # type: ignore[union-attr]
    config = _named(names, f"{form!r} is needed after the file: given {arguments!r}")
    if paper is not None:
        paper = paper.strip()
        require_one_of(papers, paper=paper)
    if count is not None:
        count = int(count)
        require_int(1, K=count)
    return config, paper, count


_IN_PAPER = re.compile(r"(.*?)(?:@([^@,]*))?(?:,\s*(\d+))?\s*", re.DOTALL)


def _named(arguments: str, needed: str) -> ConfigDict:
    names = [name.strip() for name in arguments.rsplit(",", 2)]
    if len(names) != 3 or ("," in names[0] and ":" not in names[0]):  # only a path may have commas
        raise ValueError(needed)
    config = default()
    config.data.name, config.model.name, config.method.name = names
    for section in ("model", "method"):
        if "init" in options(section, config[section].name):
            config[section].init = "torch"
    return config


def set_keys(config: ConfigDict, settings: Mapping[str, Any]) -> None:
    """Sets values by key, such as "data.augment".

    Options that the chosen model or method does not take are left out: settings of a paper are for
    every net and method that is trained in them.
    """
    for key, value in settings.items():
        *path, last = key.split(".")
        section = functools.reduce(operator.getitem, path, config)
        if path[:1] not in (["model"], ["method"]) or last in options(path[0], section.name):
            section[last] = value
