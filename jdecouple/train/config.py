"""The configuration of a run: its keys, their defaults, and the checks that have no other owner."""

import contextlib
import functools
import json
import operator
import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn, TypeGuard

from flax import traverse_util
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jdecouple._errors import OneLine, first_line
from jdecouple.train.options import OWNERS, options
from jdecouple.train.rules import MOST, RULES, clashes

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
        known = value is not None and not _is_section(value)
        raise ConfigError(f"{path}.{text}" if known else text) from error


def default() -> ConfigDict:
    """The configuration that every file in configs/ starts from.

    It is locked (an unknown key is an error), but for the sections `method`, `model` and
    `optimizer`: these also take the options of what `name` chooses, or have its defaults.

    >>> config = default()
    >>> config.method.name = "scpl"
    >>> config.method.temperature = 0.2
    >>> config.batch_size, config.optimizer.learning_rate
    (128, 0.001)
    """
    # Every key needs a placeholder of its own: a shared one would link their values.
    config = ConfigDict(
        {
            "method": {"name": "deinforeg"},
            "model": {"name": "vgg8"},
            "data": {
                "name": "digits",
                "data_dir": placeholder(str),  # of prepared TFDS sets; None: TFDS's own folder
                "download": False,  # prepare a TFDS set that is missing
                "augment": "none",
                "label_noise": 0.0,  # share of the training labels that is drawn anew
                "validation": placeholder(float),  # share of the training set held out
                "image_size": placeholder(int),  # resize to this many pixels a side
                "synthetic_size": 4096,
                "channels": 3,  # of synthetic images
                "num_classes": 10,  # of synthetic images
                "max_length": placeholder(int),  # words kept of a text; None: the last bucket, 256
                "parts": placeholder(tuple),  # words of each part that a text is cut into
                "vocabulary_size": placeholder(int),  # None: 30000
                "glove": placeholder(str),  # text file of word vectors
                "label_column": placeholder(str),  # of CSV and Parquet files; None: by its name
                "text_columns": placeholder(tuple),  # None: all others
                "buckets": placeholder(tuple),  # lengths that batches of texts are padded to
            },
            "optimizer": {
                "name": "adam",
                "learning_rate": 1e-3,
                "schedule": "cosine",
                "end_learning_rate": 0.0,  # of the cosine
                "decay_epochs": (),  # of step_decay
                "decay_factor": 0.1,
                "per_epoch": False,  # move the rate once an epoch, as the papers' code does
                "warmup_epochs": 0.0,  # over which the rate rises to its schedule
                "warmup_start": 0.01,  # share of the rate that it rises from
            },
            "growth": {
                "blocks": placeholder(tuple),  # that exist, in turn; None: all from the start
                "epochs": placeholder(tuple),  # from which on they do, the first 0
                "steps": placeholder(tuple),  # or from which steps on
                "freeze": True,  # what exists is trained no more when others are added
            },
            "early_stopping": {
                "patience": placeholder(int),  # evaluations without a better validation accuracy
                "min_delta": 0.0,  # that it must be better by
            },
            "engine": "mpmd",  # a call for every stage; "spmd": one for all; "auto": where it fits
            "schedule": "auto",
            "microbatches": 1,
            "mesh": {
                "stages": placeholder(int),  # None: as many as devices allow
                "data": 1,
                "replicas": placeholder(tuple),  # of each stage, instead of stages and data
                "propose": False,  # choose boundaries and replicas by simulation, and print them
            },
            "num_stages": placeholder(int),  # None: mesh.stages
            "boundaries": placeholder(tuple),  # blocks at which stages begin; None: balanced
            "split": placeholder(str),  # or a published split of the model, such as "fdg"
            "max_in_flight": placeholder(int),
            "chunk": 1,  # batches that a stage trains on in one compiled call
            "batch_size": 128,
            "epochs": 1,
            "steps": placeholder(int),  # wins over epochs
            "eval_every": placeholder(int),  # steps; None: every epoch
            "checkpoint": {"every": placeholder(int), "keep": 3},  # None: at every evaluation
            "log_every": 50,
            "profile": placeholder(int),  # steps to trace after the first 10; no stages are fused
            "sufficient_direction": False,  # measure it with every line of the log (fr)
            "dtype": "float32",
            "clip_norm": placeholder(float),  # bound on the gradient's norm (synchronous methods)
            "remat": "auto",  # what a forward keeps: none, elementwise, blocks, stages, offload
            "seed": 0,
            "init_from": placeholder(str),  # WORKDIR or WORKDIR@STEP, whose weights it begins with
        }
    ).lock()
    for section in OWNERS:
        config[section].unlock()
    return config


def chosen(config: ConfigDict, section: str) -> dict[str, Any]:
    """The options that a complete configuration sets for its method, model or optimizer."""
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
        name = given.get("name", target.name) if _is_section(given) else target.name
        if name not in registry.names():
            allowed = ", ".join(registry.names())
            raise ConfigError(f"config.{section}.name is {shown(name)}: allowed are {allowed}")
        target.name = name
        for key, (kind, _) in options(section, name).items():
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
    for key, value in traverse_util.flatten_dict(complete.to_dict(), sep=".").items():
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(n, int) and abs(n) > MOST for n in numbers) and key != "seed":
            raise ConfigError(f"config.{key} is {shown(value)}: at most {MOST} is allowed")
    for message in clashes(complete, default()):
        raise ConfigError(f"config.{message}")
    return complete


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


# Keys that say where, in which order and how often something is done, and not what is learnt.
_FREE = (
    *("log_every", "checkpoint", "profile", "sufficient_direction", "max_in_flight", "remat"),
    *("mesh", "num_stages", "boundaries", "split", "schedule", "engine", "chunk"),
)


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
    for key in (*identity(config), *_FREE, *parts, "growth", "epochs", "init_from"):
        values.pop(key, None)
    return json.loads(json.dumps(values, default=repr))


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Key, old and new value of what differs between two `settings`; None where there is none.

    A key that earlier versions did not know had its default.
    """
    known = traverse_util.flatten_dict(default().to_dict(), sep=".")
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


def _is_section(value: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping | ConfigDict)


def _fill(target: ConfigDict, given: Any, path: str) -> None:
    for key, value in given.items():
        here, owned = f"{path}.{key}", path.removeprefix("config.") in OWNERS
        if key not in target:
            if owned and value is None:  # left at its default
                continue
            _unknown_key(target, path, key)
        if _is_section(target[key]):
            if not _is_section(value):
                raise ConfigError(f"{here} is {shown(value)}: a section with keys is needed")
            _fill(target[key], value, here)
            continue
        if here == "config.remat" and isinstance(value, bool):  # what version 0.1.0 wrote
            value = "stages" if value else "none"
        kind, optional = target.get_type(key), target[key] is None
        if value == "None" and optional:  # as the command line gives it
            value = None
        if (type(value), kind) in ((list, tuple), (int, float)):
            with contextlib.suppress(OverflowError):  # a number beyond those of a float
                value = kind(value)
        fits = isinstance(value, kind) and (kind in (bool, object) or not isinstance(value, bool))
        if not fits and not (value is None and optional):
            raise ConfigError(
                f"{here} is {shown(value)}: a value of type {kind.__name__} is needed"
            )
        target[key] = value


def _unknown_key(section: Any, path: str, key: str) -> NoReturn:
    if not isinstance(section, ConfigDict):
        raise ConfigError(f"unknown key {path}.{key}: {path} is a value, without keys")
    owner = path.removeprefix("config.")
    if owner in OWNERS:
        allowed = ", ".join(options(owner, section.name)) or "no options"
        raise ConfigError(
            f"{path}.{key} is set, but {owner} {section.name!r} takes only: {allowed}"
        )
    raise ConfigError(f"unknown key {path}.{key}: allowed are {', '.join(sorted(section))}")


def named(arguments: str) -> ConfigDict:
    """The default configuration with the names in "dataset,model,method"; a path may have commas.

    Initial weights are PyTorch's, as in the papers' code: local losses and LARS see their scale.

    Raises:
        ValueError: There are less than three names, or no model or method has that name.
    """
    names = [name.strip() for name in arguments.rsplit(",", 2)]
    if len(names) != 3:
        raise ValueError(f"'dataset,model,method' is needed after the file: given {arguments!r}")
    config = default()
    config.data.name, config.model.name, config.method.name = names
    for section in ("model", "method"):
        if "init" in options(section, config[section].name):
            config[section].init = "torch"
    return config
