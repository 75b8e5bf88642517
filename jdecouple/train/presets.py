"""Configurations by name or path: the presets of configs/, and files of one's own."""

import ast
import contextlib
import os
import runpy
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jdecouple._errors import choices, first_line
from jdecouple.train.errors import ConfigError, is_section


def folder() -> Path:
    """Where the presets are: in an installed package inside it, in a checkout beside it."""
    package = Path(__file__).parents[1]
    installed = package / "presets"
    return installed if installed.is_dir() else package.parent / "configs"


def names() -> tuple[str, ...]:
    """Names of the presets, sorted.

    >>> "quickstart" in names()
    True
    """
    return tuple(sorted(path.stem for path in folder().glob("*.py")))


def summaries() -> Iterator[tuple[str, str]]:
    """Names, and the first line of what each file says of itself; the files are not run."""
    for name in names():
        text = (folder() / f"{name}.py").read_text(encoding="utf-8")
        yield name, first_line(ast.get_docstring(ast.parse(text)) or name)


def load(config: str | os.PathLike[str], overrides: Mapping[str, Any] = {}) -> ConfigDict:
    """The complete configuration of a preset or a file.

    >>> config = load("quickstart", {"method.name": "bp", "epochs": 2})
    >>> config.method.to_dict(), config.epochs  # bp takes no projector
    ({'name': 'bp'}, 2)

    Args:
        config: "NAME" or "NAME:ARGUMENT" of a preset, such as "vision:cifar10,vgg8,deinforeg"; or a
            path, which has a separator or ends in .py, also with an argument.
        overrides: other values by key. Where they choose another method, model, optimizer or
            learning-rate schedule, what the file sets for its own is left out, and stderr tells;
            so are the statistics of images where they choose another data set.

    Raises:
        ConfigError: there is no such preset or file, it cannot be run, or a name, a key or a type
            in it or in `overrides` is wrong.
    """
    # What follows knows methods, models and optimizers, which a list of presets can do without.
    from jdecouple.train import config as configuration
    from jdecouple.train import overrides as changes

    chosen = {key: overrides[key] for key in changes.NAMES if key in overrides}
    changed = changes.renamed(read(os.fspath(config)), chosen, overrides)
    for key, value in overrides.items():
        changed = changes.with_value(changed, key, value)
    return configuration.filled(changed)


def read(config: str) -> Mapping[str, Any]:
    """What `get_config` of a preset or a file returns, called with what follows the first colon.

    Raises:
        ConfigError: there is no such preset or file, or it cannot be run, in one line.
    """
    path, *argument = _place(config)
    try:
        with _neighbours(path):
            get_config = runpy.run_path(str(path), run_name="config").get("get_config")
            loaded = get_config(*argument) if callable(get_config) else None
    except Exception as error:  # whatever the file does
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ConfigError(f"--config {config}: {kind}{first_line(error)}") from error
    if not is_section(loaded):
        raise ConfigError(
            f"--config {config}: a function get_config() that returns a ConfigDict is needed"
        )
    return loaded


def _place(config: str) -> tuple[Any, ...]:
    """The file of a `--config`, and its argument if there is one."""
    name, *argument = config.split(":", 1)
    path = Path(name)
    if "/" in name or path.suffix == ".py":
        if not path.is_file():
            raise ConfigError(f"--config {config}: there is no file {name!r}")
    elif name in names():  # also where a file is called so, which is ./NAME
        path = folder() / f"{name}.py"
    else:
        here = f" (the file is './{name}')" if path.is_file() else ""
        raise ConfigError(f"--config {config}: no preset{here}: {choices(name, names())}")
    return path, *argument


@contextlib.contextmanager
def _neighbours(path: Path) -> Iterator[None]:
    """Lets a file import what lies beside it, as Python does for a program.

    That of a user goes on to be found, last of all, as a key may name it: an optimizer.
    """
    place = str(path.resolve().parent)
    sys.path.insert(0, place)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the file itself took it away
            sys.path.remove(place)
    if path.parent != folder() and place not in sys.path:
        sys.path.append(place)
