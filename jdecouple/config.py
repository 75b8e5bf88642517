"""The configuration of a run: its keys, their defaults, and one check of all values."""

import inspect
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jdecouple import data, methods, models, optim, schedules

DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}
# Keys of the optimizer section that make its learning rate; the others are its arguments.
LEARNING_RATE = {
    "learning_rate": 1e-3,
    "schedule": "cosine",
    "end_learning_rate": 0.0,  # of the cosine
    "decay_epochs": (),  # of step_decay
    "decay_factor": 0.1,
    "per_epoch": False,  # move the rate once an epoch, as the papers' code does
}
# Arguments of builders that the run itself fills in.
_FILLED = {"num_classes", "image_size", "channels", "input_size", "param_dtype", "rngs"}
_FILLED |= {"learning_rate"}


class ConfigError(ValueError):
    """A bad value, or input that does not fit; the message is one line."""


def default() -> ConfigDict:
    """The configuration that every file in configs/ starts from.

    Keys of `method`, `model` and `optimizer` are the arguments of all methods, models and
    optimisers; those left at None take the default of the one that `name` chooses.

    Returns:
        A locked ConfigDict: an unknown key is an error.
    """
    optional = {int: placeholder(int), float: placeholder(float), str: placeholder(str)}
    return ConfigDict(
        {
            "method": {"name": "deinforeg", **_union(methods.names(), methods.arguments)},
            "model": {"name": "vgg8", **_union(models.names(), model_arguments)},
            "data": {
                "name": "digits",
                "data_dir": optional[str],  # of prepared TFDS sets; None: TFDS's own folder
                "download": False,  # prepare a TFDS set that is missing
                "augment": "none",
                "label_noise": 0.0,  # share of the training labels that is drawn anew
                "validation": optional[float],  # share of the training set held out
                "image_size": optional[int],  # resize to this many pixels a side
                "synthetic_size": 4096,
                "channels": 3,  # of synthetic images
                "num_classes": 10,  # of synthetic images
            },
            "optimizer": {
                "name": "adam",
                **LEARNING_RATE,
                **_union(optim.names(), optimizer_arguments),
            },
            "schedule": "auto",
            "microbatches": 1,
            "mesh": {"stages": optional[int], "data": 1},  # stages None: as devices allow
            "num_stages": optional[int],  # None: mesh.stages
            "boundaries": placeholder(tuple),  # blocks at which stages begin; None: balanced
            "max_in_flight": optional[int],
            "batch_size": 128,
            "epochs": 1,
            "steps": optional[int],  # wins over epochs
            "eval_every": optional[int],  # steps; None: every epoch
            "checkpoint": {"every": optional[int], "keep": 3},  # None: at every evaluation
            "log_every": 50,
            "dtype": "float32",
            "seed": 0,
        }
    ).lock()


def model_arguments(name: str) -> dict[str, Any]:
    """Arguments of a model builder that a configuration may set, with their defaults."""
    return _arguments(models.get(name))


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


def validate(config: ConfigDict) -> ConfigDict:
    """Checks every key and value that needs neither data nor devices.

    Args:
        config: a configuration made from `default()`, or a mapping like it.

    Returns:
        The complete configuration; keys that were not given have their defaults.

    Raises:
        ConfigError: naming the first bad key, what it holds and what is allowed.
    """
    complete = default()
    _fill(complete, config, "config")
    _one_of(complete.method.name, methods.names(), "method.name")
    _one_of(complete.model.name, models.names(), "model.name")
    _one_of(complete.optimizer.name, optim.names(), "optimizer.name")
    _one_of(complete.optimizer.schedule, optim.schedule_names(), "optimizer.schedule")
    _one_of(complete.data.augment, data.augment.names(), "data.augment")
    _one_of(complete.schedule, ("auto", *schedules.names()), "schedule")
    _one_of(complete.dtype, DTYPES, "dtype")
    for key in (
        *("microbatches", "mesh.stages", "mesh.data", "num_stages", "max_in_flight"),
        *("batch_size", "epochs", "steps", "eval_every", "checkpoint.every", "checkpoint.keep"),
        *("log_every", "data.image_size", "data.synthetic_size"),
    ):
        _at_least(complete, key, 1)
    _at_least(complete, "seed", 0)
    for key in ("optimizer.learning_rate", "optimizer.decay_factor"):
        if not 0 < _value(complete, key) < float("inf"):
            raise ConfigError(
                f"config.{key} is {_value(complete, key)}: a positive number is needed"
            )
    if not 0 <= complete.optimizer.end_learning_rate < float("inf"):
        raise ConfigError(
            f"config.optimizer.end_learning_rate is {complete.optimizer.end_learning_rate}: "
            "a number of at least 0 is needed"
        )
    if not 0 <= complete.data.label_noise <= 1:
        raise ConfigError(
            f"config.data.label_noise is {complete.data.label_noise}: a share from 0 to 1 is needed"
        )
    pieces = complete.microbatches * complete.mesh.data
    if complete.batch_size % pieces:
        raise ConfigError(
            f"config.batch_size is {complete.batch_size}: it must divide into microbatches x "
            f"mesh.data = {complete.microbatches} x {complete.mesh.data} equal parts"
        )
    return complete


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
            allowed = ", ".join(sorted(target.keys()))
            raise ConfigError(f"unknown key {path}.{key}: allowed are {allowed}")
        here = f"{path}.{key}"
        value, wanted = given[key], target.get_type(key)
        if isinstance(target[key], ConfigDict):
            if not isinstance(value, Mapping | ConfigDict):
                raise ConfigError(f"{here} is {value!r}: a section with keys is needed")
            _fill(target[key], value, here)
            continue
        if isinstance(value, list) and wanted is tuple:
            value = tuple(value)
        if isinstance(value, int) and not isinstance(value, bool) and wanted is float:
            value = float(value)
        wrong = not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool)
        if wrong and not (value is None and target[key] is None):
            raise ConfigError(f"{here} is {value!r}: a value of type {wanted.__name__} is needed")
        target[key] = value


def _value(config: ConfigDict, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


def _one_of(value: str, allowed: Any, key: str) -> None:
    if value not in allowed:
        raise ConfigError(f"config.{key} is {value!r}: allowed are {', '.join(allowed)}")


def _at_least(config: ConfigDict, key: str, least: int) -> None:
    value = _value(config, key)
    if value is not None and value < least:
        raise ConfigError(f"config.{key} is {value}: a whole number of at least {least} is needed")
