"""The configuration of a run: its keys, their defaults, and one check of all values."""

import contextlib
import inspect
import itertools
import json
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax.numpy as jnp
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jdecouple import data, methods, models, optim, schedules
from jdecouple._errors import first_line
from jdecouple.pipeline.engine import ENGINES

DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}
# Keys of the optimizer section that make its learning rate; the others are its arguments.
LEARNING_RATE = {
    "learning_rate": 1e-3,
    "schedule": "cosine",
    "end_learning_rate": 0.0,  # of the cosine
    "decay_epochs": (),  # of step_decay
    "decay_factor": 0.1,
    "per_epoch": False,  # move the rate once an epoch, as the papers' code does
    "warmup_epochs": 0.0,  # over which the rate rises to its schedule
    "warmup_start": 0.01,  # share of the rate that it rises from
}
_MOST = 2**31 - 1
_SIZES = (
    *("microbatches", "mesh.stages", "mesh.data", "num_stages", "max_in_flight", "chunk"),
    *("batch_size", "epochs", "steps", "eval_every", "checkpoint.every", "checkpoint.keep"),
    *("log_every", "profile", "data.image_size", "data.synthetic_size", "data.num_classes"),
    *("data.max_length", "data.vocabulary_size"),
)
# Key, least value, whether that one is excluded, largest value.
_NUMBERS = (
    ("optimizer.learning_rate", 0, True, sys.float_info.max),
    ("optimizer.end_learning_rate", 0, False, sys.float_info.max),
    ("optimizer.decay_factor", 0, True, sys.float_info.max),
    ("optimizer.warmup_epochs", 0, False, _MOST),
    ("optimizer.warmup_start", 0, False, 1),
    ("clip_norm", 0, True, sys.float_info.max),
    ("data.label_noise", 0, False, 1),
    ("data.validation", 0, False, 1),
)
# A run may be continued with other values of all keys but these: they define what it computes.
_IDENTITY = ("method", "model", "data", "optimizer.name", "batch_size", "seed")
# Arguments of builders that the run itself fills in.
_FILLED = {"num_classes", "image_size", "channels", "input_size", "param_dtype", "rngs"}
_FILLED |= {"vocabulary_size", "max_length", "embeddings", "learning_rate"}


class ConfigError(ValueError):
    """A bad value, or input that does not fit; the message is one line."""


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Turns what is raised about given values, files or data into a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(first_line(error)) from error


def default() -> ConfigDict:
    """The configuration that every file in configs/ starts from.

    Keys of `method`, `model` and `optimizer` are the arguments of all methods, models and
    optimisers; those left at None take the default of the one that `name` chooses.

    Returns:
        A locked ConfigDict: an unknown key is an error.
    """
    # Every key needs a placeholder of its own: a shared one would link their values.
    return ConfigDict(
        {
            "method": {"name": "deinforeg", **_union(methods.names(), methods.arguments)},
            "model": {"name": "vgg8", **_union(models.names(), model_arguments)},
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
                "vocabulary_size": placeholder(int),  # None: 30000
                "glove": placeholder(str),  # text file of word vectors
                "buckets": placeholder(tuple),  # lengths that batches of texts are padded to
            },
            "optimizer": {
                "name": "adam",
                **LEARNING_RATE,
                **_union(optim.names(), optimizer_arguments),
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
            "remat": False,  # keep inputs of stages alone, repeat the forward in the backward
            "seed": 0,
        }
    ).lock()


def model_arguments(name: str) -> dict[str, Any]:
    """Arguments of a model builder that a configuration may set, with their defaults."""
    return _arguments(models.get(name))


def check_model_reads(name: str, inputs: Mapping[str, Any], what: str) -> None:
    """Raises ConfigError unless a model takes what a data set tells of its inputs.

    Args:
        name: of the model.
        inputs: the arguments that the data set gives to a builder.
        what: what the data set is called and holds.
    """

    def reads(other: str) -> bool:
        return set(inputs) <= set(inspect.signature(models.get(other)).parameters)

    if not reads(name):
        fitting = ", ".join(filter(reads, models.names())) or "no built-in model"
        raise ConfigError(f"config.model.name is {name!r}: {what}, which {fitting} read")


def optimizer_arguments(name: str) -> dict[str, Any]:
    """Arguments of an optimiser that a configuration may set, with their defaults."""
    return _arguments(optim.get(name))


def chosen(section: Mapping[str, Any], allowed: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The arguments that a section sets for the method, model or optimiser it names.

    Raises:
        ConfigError: an argument that belongs to another one.
    """
    given = {key: value for key, value in section.items() if key != "name" and value is not None}
    for key in given:
        if key not in allowed:
            raise ConfigError(
                f"config.{what}.{key} is set, but {what} {section['name']!r} takes only: "
                f"{', '.join(allowed) or 'no arguments'}"
            )
    return given


def value_type(key: str) -> type:
    """Type of the value of a key such as "model.hidden"; ConfigDict for a section.

    Raises:
        ConfigError: there is no such key.
    """
    section: Any = default()
    *path, last = key.split(".")
    for depth, part in enumerate((*path, last)):
        if not isinstance(section, ConfigDict) or part not in section:
            _unknown_key(section, ".".join(("config", *path[:depth])), part)
        wanted, section = section.get_type(part), section[part]
    return wanted


def filled(config: Mapping[str, Any]) -> ConfigDict:
    """The complete configuration: keys that are not given have their defaults.

    Args:
        config: a configuration made from `default()`, or a mapping like it.

    Raises:
        ConfigError: a key that does not exist, or a value of the wrong type.
    """
    complete = default()
    _fill(complete, config, "config")
    return complete


def validate(config: Mapping[str, Any]) -> ConfigDict:
    """Checks every key and value that needs neither data nor devices.

    Args:
        config: a configuration made from `default()`, or a mapping like it.

    Returns:
        The complete configuration; keys that were not given have their defaults.

    Raises:
        ConfigError: naming the first bad key, what it holds and what is allowed.
    """
    complete = filled(config)
    _one_of(complete.method.name, methods.names(), "method.name")
    _one_of(complete.model.name, models.names(), "model.name")
    _one_of(complete.optimizer.name, optim.names(), "optimizer.name")
    _one_of(complete.optimizer.schedule, optim.schedule_names(), "optimizer.schedule")
    _one_of(complete.data.augment, data.augment.names(), "data.augment")
    _one_of(complete.schedule, ("auto", *schedules.names()), "schedule")
    _one_of(complete.engine, ENGINES, "engine")
    _one_of(complete.dtype, DTYPES, "dtype")
    for section, arguments in (
        ("method", methods.arguments),
        ("model", model_arguments),
        ("optimizer", optimizer_arguments),
    ):
        given = complete[section]
        own = {key: given[key] for key in given if key not in LEARNING_RATE}
        chosen(own, arguments(given.name), section)
    for key in _SIZES:
        _whole(complete, key, 1, _MOST)
    _whole(complete, "seed", 0, 2**32 - 1)
    for key, least, excluded, most in _NUMBERS:
        _number(complete, key, least, excluded, most)
    if complete.profile is not None and complete.engine == "spmd":
        raise ConfigError(
            "config.profile shows the calls of stages: config.engine 'spmd' has none, 'mpmd' has"
        )
    _numbers(complete, "boundaries", int)
    _check_buckets(complete)
    if complete.split is not None and complete.boundaries is not None:
        raise ConfigError("config.split and config.boundaries are both set: give one of them")
    _numbers(complete, "optimizer.decay_epochs", (int, float))
    replicas = complete.mesh.replicas
    if replicas is not None:
        if not replicas or not all(type(each) is int and each >= 1 for each in replicas):
            raise ConfigError(
                f"config.mesh.replicas is {replicas}: a whole number of at least 1 is needed for "
                "every stage"
            )
        if complete.mesh.stages not in (None, len(replicas)) or complete.mesh.data != 1:
            raise ConfigError(
                "config.mesh.replicas is set: leave config.mesh.stages and config.mesh.data alone"
            )
    if complete.mesh.propose and (
        replicas is not None or complete.boundaries is not None or complete.split is not None
    ):
        raise ConfigError(
            "config.mesh.propose chooses boundaries and replicas: leave config.boundaries, "
            "config.split and config.mesh.replicas alone"
        )
    if complete.profile and complete.chunk > 1:
        raise ConfigError("config.profile shows single batches: leave config.chunk at 1")
    data_axis = complete.mesh.data if replicas is None else math.lcm(*replicas)
    if complete.batch_size % (complete.microbatches * data_axis):
        raise ConfigError(
            f"config.batch_size is {complete.batch_size}: it must divide into microbatches x "
            f"replicas = {complete.microbatches} x {data_axis} equal parts"
        )
    return complete


def identity(config: ConfigDict) -> dict[str, Any]:
    """The values that make a run what it is, as JSON; what is left at None does not count."""
    found = {}
    for key in _IDENTITY:
        value = _value(config, key)
        found[key] = value.to_dict() if isinstance(value, ConfigDict) else value
    # Where the data lies may change between two parts of a run.
    found["data"] = {k: v for k, v in found["data"].items() if k not in ("data_dir", "download")}
    for section in ("method", "model", "data"):
        found[section] = {k: v for k, v in found[section].items() if v is not None}
    return json.loads(json.dumps(found))


def check_identity(now: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Raises ConfigError unless a run of the identity `before` may go on as one of `now`."""
    for key in {**now, **before}:
        value = now.get(key)
        if before.get(key) != value:
            label = f"config.{key}" if key in (*_IDENTITY, "boundaries", "dtype") else key
            raise ConfigError(
                f"the workdir holds a run with {label} = "
                f"{_difference(before.get(key), value)}: choose another workdir, or the same value"
            )


def _arguments(builder: Any) -> dict[str, Any]:
    parameters = inspect.signature(builder).parameters.values()
    return {each.name: each.default for each in parameters if each.name not in _FILLED}


def _union(names: Any, arguments: Any) -> dict[str, Any]:
    """A placeholder for every argument of any of the named."""
    return {
        key: placeholder(type(value)) for name in names for key, value in arguments(name).items()
    }


def _fill(target: ConfigDict, given: Any, path: str) -> None:
    for key in given:
        if key not in target:
            _unknown_key(target, path, key)
        here = f"{path}.{key}"
        value, wanted = given[key], target.get_type(key)
        if isinstance(target[key], ConfigDict):
            if not isinstance(value, Mapping | ConfigDict):
                raise ConfigError(f"{here} is {value!r}: a section with keys is needed")
            _fill(target[key], value, here)
            continue
        optional = target[key] is None
        if value == "None" and optional:  # as the command line gives it
            value = None
        if isinstance(value, list) and wanted is tuple:
            value = tuple(value)
        if isinstance(value, int) and not isinstance(value, bool) and wanted is float:
            value = float(value)
        wrong = not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool)
        if wrong and not (value is None and optional):
            raise ConfigError(f"{here} is {value!r}: a value of type {wanted.__name__} is needed")
        target[key] = value


def _unknown_key(section: Any, path: str, key: str) -> NoReturn:
    if not isinstance(section, ConfigDict):
        raise ConfigError(f"unknown key {path}.{key}: {path} is a value, without keys")
    allowed = ", ".join(sorted(section.keys()))
    raise ConfigError(f"unknown key {path}.{key}: allowed are {allowed}")


def _value(config: ConfigDict, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


def _one_of(value: str, allowed: Any, key: str) -> None:
    if value not in allowed:
        raise ConfigError(f"config.{key} is {value!r}: allowed are {', '.join(allowed)}")


def _whole(config: ConfigDict, key: str, least: int, most: int) -> None:
    value = _value(config, key)
    if value is not None and not least <= value <= most:
        text = str(value) if abs(value) < 2**64 else "a huge number"  # of any number of digits
        raise ConfigError(
            f"config.{key} is {text}: a whole number from {least} to {most} is needed"
        )


def _number(config: ConfigDict, key: str, least: float, excluded: bool, most: float) -> None:
    value = _value(config, key)
    if value is None or (least <= value <= most and not (excluded and value == least)):
        return
    bounds = f"{'above' if excluded else 'of at least'} {least:g}"
    bounds += f" and at most {most:g}" if most < _MOST else ""
    raise ConfigError(f"config.{key} is {value}: a finite number {bounds} is needed")


def _numbers(config: ConfigDict, key: str, kind: Any, least: int = 0) -> None:
    values = _value(config, key) or ()
    good = all(isinstance(each, kind) and not isinstance(each, bool) for each in values)
    if not (good and all(a < b for a, b in itertools.pairwise((least - 1, *values)))):
        what = "whole numbers" if kind is int else "numbers"
        raise ConfigError(f"config.{key} is {values}: increasing {what} from {least} on are needed")


def _check_buckets(config: ConfigDict) -> None:
    _numbers(config, "data.buckets", int, least=1)
    buckets, length = config.data.buckets, config.data.max_length
    if not buckets:
        return
    if length not in (None, buckets[-1]):
        raise ConfigError(
            f"config.data.buckets is {buckets}: its last must be config.data.max_length, {length}"
        )
    for key, least in (("chunk", 1), ("profile", None)):
        if config[key] != least:
            raise ConfigError(
                f"config.data.buckets is set: config.{key} is {config[key]}, which needs batches "
                f"of one length: leave it at {least}"
            )


def _difference(before: Any, now: Any) -> str:
    if not isinstance(before, dict) or not isinstance(now, dict):
        return f"{before}, now {now}"
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return ", ".join(f"{key} {before.get(key)!r} (now {now.get(key)!r})" for key in keys)


def parts(arguments: str) -> list[str]:
    """Data set, model and method of "dataset,model,method"; a path may have commas.

    Raises:
        ValueError: There are less than three parts.
    """
    found = [part.strip() for part in arguments.rsplit(",", 2)]
    if len(found) != 3:
        raise ValueError(f"'dataset,model,method' is needed after the file: given {arguments!r}")
    return found


def named(dataset: str, model: str, method: str) -> ConfigDict:
    """The default configuration with these names, and PyTorch's initial weights.

    The papers' code has those; local losses and LARS see their scale.

    Raises:
        ValueError: No model or no method has that name.
    """
    models.get(model)
    methods.arguments(method)
    config = default()
    config.data.name = dataset
    config.model.name, config.method.name = model, method
    config.model.init = config.method.init = "torch"
    return config
