"""The command line that makes a run again."""

import contextlib
import io
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flax import traverse_util
from ml_collections import ConfigDict

from jdecouple.train import cli, presets
from jdecouple.train import config as configuration
from jdecouple.train.errors import ConfigError
from jdecouple.train.overrides import NAMES, renamed


def command(config: ConfigDict, workdir: str) -> list[str] | None:
    """The arguments that train in `workdir` as a complete configuration says.

    They begin with the preset that leaves the fewest keys to set, whether or not the run began with
    it, and have been parsed back to the same configuration. None where no command line does, as
    for a value that it cannot spell.

    >>> from jdecouple.train.presets import load
    >>> command(load("equal:digits,mlp,bp", {"epochs": 2}), "runs/again")
    ['jdecouple', 'train', '--config', 'equal:digits,mlp,bp', '--workdir', 'runs/again', \
'--config.epochs=2']
    """
    found = sorted(_candidates(config), key=lambda pair: len(pair[1]))
    for base, overrides in found:
        arguments = ["--config", base, "--workdir", workdir, *overrides]
        spelt = "".join(arguments).isprintable()
        if spelt and _parsed(arguments) == config.to_dict():
            return ["jdecouple", "train", *arguments]
    return None


def spelt(arguments: Sequence[str]) -> str:
    """Arguments as a shell reads them, a line for each override."""
    words = [*map(shlex.quote, arguments)]
    first = next((i for i, x in enumerate(arguments) if x.startswith("--config.")), len(words))
    return " \\\n    ".join([" ".join(words[:first]), *words[first:]])


def _candidates(config: ConfigDict) -> Iterator[tuple[str, list[str]]]:
    """Presets that can be read for the run's names, and what has to be set beside each."""
    names = f"{config.data.name},{config.model.name},{config.method.name}"
    wanted = _flat(config)
    for preset in presets.names():
        for base in (preset, f"{preset}:{names}", f"{preset}:{names},{config.num_stages}"):
            try:
                loaded = presets.read(base)
                filled = _flat(configuration.filled(loaded))
                chosen = {key: wanted[key] for key in NAMES if filled[key] != wanted[key]}
                with contextlib.redirect_stderr(io.StringIO()):  # what `renamed` leaves out
                    begun = _flat(configuration.filled(renamed(loaded, chosen)))
            except ConfigError:
                continue
            begun |= {key: filled[key] for key in chosen}
            changed = [key for key in {**begun, **wanted} if begun.get(key) != wanted.get(key)]
            yield base, [f"--config.{key}={wanted.get(key)}" for key in sorted(changed)]


def _parsed(arguments: Sequence[str]) -> dict[str, Any] | None:
    """The configuration of a command line; None where it is refused."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            config, _ = cli.parse(["jdecouple train", *arguments])
    except ConfigError:
        return None
    return config.to_dict()


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    values = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    return traverse_util.flatten_dict(values, sep=".")
