"""The command line of train.py: flags, one-line errors and exit codes."""

import errno
import functools
import inspect
import logging as python_logging
import operator
import os
import re
import runpy
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from jdecouple._errors import first_line
from jdecouple.checkpoint import CheckpointError
from jdecouple.train import config as configuration
from jdecouple.train import console, hosts, loop, programs
from jdecouple.train.config import ConfigError
from jdecouple.train.options import OWNERS, options

_USAGE = (
    "usage: python train.py --config FILE[:ARGUMENT] --workdir FOLDER [--nocache] "
    "[--config.KEY=VALUE ...]"
)
_HOSTS = """Several processes (docs/multi-host.md); SLURM and Open MPI need no flags:
  --coordinator HOST:PORT   where process 0 waits for the others
  --num_processes N         processes in the run
  --process_index I         number of this one, from 0
  --transport_address HOST  where the others reach this one; by default as process 0 sees it
On machines without one home, all need the same secret in JDECOUPLE_TOKEN."""
_KEY = r"--?(?:no)?config\.([^=]*)(?:=(.*))?"
EXPECTED = (ConfigError, CheckpointError, loop.NonFiniteError, OSError, KeyboardInterrupt)
# What ends a run although its input is good.
_OF_THE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EMFILE, errno.ENFILE}


@console.lasting()
def main(argv: Sequence[str] | None = None) -> None:
    """Runs train.py.

    Args:
        argv: the command line, the program first; by default the process's own.

    Raises:
        SystemExit: with code 1 if the training diverged or the disk is full, 2 after bad input,
            told in one line, 130 if Ctrl-C came where there was nothing to save. A run that ends,
            or that SIGTERM, SIGHUP or Ctrl-C stopped after saving, just returns. Of several
            processes, one that fails ends the others with its code; one that is lost ends them
            with 3.
    """
    log_in_short()
    try:
        argv = sys.argv if argv is None else argv
        config, workdir = parse(argv)
        if spec := parse_process_spec(argv):
            _train_among(spec, config, workdir)
        else:
            if _own_flags(argv)[0].cache:
                programs.keep()
            loop.train_and_evaluate(config, workdir)
    except EXPECTED as error:
        line, code = ending(error)
        print(f"error: {line}", file=sys.stderr)
        sys.exit(code)


def _train_among(spec: hosts.ProcessSpec, config: ConfigDict, workdir: str) -> None:
    """Trains as one of several processes, and ends the others if this one fails."""
    _keep_stdout()
    with configuration.one_line():
        configuration.validate(config)  # others need not wait for a process that cannot train
        processes = hosts.join(spec)
    try:
        loop.train_and_evaluate(config, workdir, processes)
        processes.close()
    except BaseException as error:
        if not isinstance(error, EXPECTED):
            processes.settle()
            traceback.print_exc()
        line, code = ending(error)
        processes.fail(line, code)
        print(f"error: {line}", file=sys.stderr)
        sys.stdout.flush()
        os._exit(code)  # JAX would wait for processes that end as well


def ending(error: BaseException) -> tuple[str, int]:
    """What a run that ends by `error` says in one line, and its exit code."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted before anything new could be saved", 130
    if isinstance(error, EXPECTED):
        bad_input = isinstance(error, ConfigError) and not _of_the_machine(error)
        return first_line(error), 2 if bad_input else 1
    return f"{type(error).__name__}: {first_line(error)}", 1


def _of_the_machine(error: BaseException | None) -> bool:
    """Whether an error goes back to one that no other input would avoid, such as a full disk."""
    if error is None or getattr(error, "errno", None) in _OF_THE_MACHINE:
        return error is not None
    return _of_the_machine(error.__cause__)


def parse(argv: Sequence[str]) -> tuple[ConfigDict, str]:
    """The complete configuration of a command line, its values not yet checked, and the workdir.

    Raises:
        ConfigError: bad flags or a bad file, in one line.
        SystemExit: with code 0 after `--help`.
    """
    given, program, rest = _own_flags(argv)
    for argument in rest:
        if argument.startswith("-") and not re.match(_KEY, argument):
            raise ConfigError(f"unknown flag {argument}; {_USAGE}")
    if not given.help and not (given.config and given.workdir):
        raise ConfigError(f"--config and --workdir are needed; {_USAGE}")
    loaded = _load(given.config) if given.config else {}
    config, rest = _typed(loaded, {key: given[f"config.{key}.name"].value for key in OWNERS}, rest)
    if given.help:
        print("\n\n".join([_USAGE, _HOSTS, f"Keys and their defaults:\n\n{config}", *_lists()]))
        sys.exit(0)
    overrides = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=overrides, sys_argv=rest)
    if extra := _parsed(overrides, [program, *rest], config)[1:]:
        raise ConfigError(f"unknown argument {extra[0]!r}; {_USAGE}")
    return configuration.filled(overrides.config), given.workdir


def _typed(
    loaded: Mapping[str, Any], names: Mapping[str, str | None], rest: list[str]
) -> tuple[ConfigDict, list[str]]:
    """What the file returned, with a typed key for all that may be set; the overrides left.

    The command line may choose other `names` of the method, model and optimizer. An override by
    None takes back what the file set, whoever's option it is, and leaves open what is open.
    """
    config, rest = {**loaded}, _joined(rest)
    for section, name in names.items():
        given = config.setdefault(section, {})
        if name and _is_section(given):  # any other value is refused below
            config[section] = {**given, "name": name}
    last = {match[1]: match[2] for match in map(_override, rest) if match}
    unset = {key for key, value in last.items() if value == "None"}
    done = {key for key in unset if _take_back(config, key)}
    complete = configuration.filled(config, all_options=True)
    for key in last.keys() - done:
        kind = configuration.value_type(complete, key)
        if key in unset and kind is not ConfigDict and _value(complete, key) is None:
            done.add(key)

    def counts(argument: str) -> bool:
        match = _override(argument)
        if not match:
            return True
        later = match[2] == "None" and match[1] not in unset  # another value comes later
        return match[1] not in done and not later

    return complete, list(filter(counts, rest))


def _joined(rest: list[str]) -> list[str]:
    """Arguments in which an override by None is one, as it may be two."""
    joined: list[str] = []
    for argument in rest:
        if argument == "None" and joined and re.fullmatch(r"--?config\.[^=]+", joined[-1]):
            joined[-1] += "=None"
        else:
            joined.append(argument)
    return joined


def _override(argument: str) -> re.Match[str] | None:
    return re.match(_KEY, argument)


def _value(config: Any, key: str) -> Any:
    return functools.reduce(operator.getitem, key.split("."), config)


def _take_back(config: dict[str, Any], key: str) -> bool:
    """Removes a key that is not at its default, out of copies of its sections; whether it is so."""
    *path, last = key.split(".")
    defaults = configuration.default()
    for name in path:
        if not _is_section(config.get(name)):
            return False
        config[name] = {**config[name]}
        config, defaults = config[name], defaults.get(name) or {}
    if _is_section(config.get(last, {})) or (last in defaults and config[last] == defaults[last]):
        return False
    del config[last]
    return True


def _is_section(value: Any) -> bool:
    return isinstance(value, Mapping | ConfigDict)


def _lists() -> Iterator[str]:
    """What the sections of owners may set, by the name of each."""
    for section, registry in OWNERS.items():
        yield f"Options of config.{section} by its name, and their defaults:\n\n" + "\n".join(
            f"  {name}: {', '.join(map(_shown, options(section, name).items()))}"
            for name in registry.names()
        )


def _shown(option: tuple[str, tuple[type, Any]]) -> str:
    key, (_, value) = option
    return key if value is inspect.Parameter.empty else f"{key}={value!r}"


def parse_process_spec(argv: Sequence[str]) -> hosts.ProcessSpec | None:
    """The process's place among several, by its flags and variables; None if it is alone.

    Raises:
        ConfigError: a part of a place without the rest, or a bad value, in one line.
    """
    given, *_ = _own_flags(argv)
    with configuration.one_line():
        return hosts.detect_cluster(
            os.environ,
            coordinator=given.coordinator,
            count=given.num_processes,
            index=given.process_index,
            address=given.transport_address,
        )


def _own_flags(argv: Sequence[str]) -> tuple[flags.FlagValues, str, list[str]]:
    """Values of flags that decide what the others mean; the program; the other arguments."""
    given = flags.FlagValues()
    names = (f"config.{section}.name" for section in OWNERS)
    for name in ("config", "workdir", "coordinator", "transport_address", *names):
        flags.DEFINE_string(name, None, "", flag_values=given)
    for name in ("num_processes", "process_index"):
        flags.DEFINE_integer(name, None, "", flag_values=given)
    flags.DEFINE_bool("help", False, "", flag_values=given)
    flags.DEFINE_bool("cache", True, "", flag_values=given)
    program, *rest = _parsed(given, argv)
    return given, program, rest


def _parsed(
    values: flags.FlagValues, argv: Sequence[str], config: ConfigDict | None = None
) -> list[str]:
    """Sets the flags, where there is no `config` only those that it knows; the other arguments."""
    values.set_gnu_getopt(True)  # flags may follow other arguments
    try:
        return values(list(argv), known_only=config is None)
    except (flags.Error, ValueError, TypeError) as error:
        match = re.match(r"flag --config\.([\w.]+)=(.*?): ", str(error), re.DOTALL)
        if not match or config is None:
            raise ConfigError(first_line(error)) from error
        kind = configuration.value_type(config, match[1])
        wanted = "a section with keys" if kind is ConfigDict else f"a value of type {kind.__name__}"
        given = configuration.shown(match[2])
        raise ConfigError(f"config.{match[1]} is {given}: {wanted} is needed") from error


def _load(config: str) -> Mapping[str, Any]:
    """Calls `get_config` of a file, with what follows the first colon if anything does."""
    path, *argument = config.split(":", 1)
    if not Path(path).is_file():
        raise ConfigError(f"--config {config}: there is no file {path!r}")
    try:
        get_config = runpy.run_path(path, run_name="config").get("get_config")
        loaded = get_config(*argument) if callable(get_config) else None
    except Exception as error:  # whatever the file does
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ConfigError(f"--config {config}: {kind}{first_line(error)}") from error
    if not isinstance(loaded, Mapping | ConfigDict):
        raise ConfigError(
            f"--config {config}: a function get_config() that returns a ConfigDict is needed"
        )
    return loaded


def log_in_short() -> None:
    """Lets libraries say warnings and errors only, each a plain line on stderr."""
    logging.set_verbosity(logging.WARNING)
    for handler in [*python_logging.root.handlers]:  # importing Orbax may leave one
        python_logging.root.removeHandler(handler)
    logging.use_absl_handler()
    logging.get_absl_handler().setFormatter(python_logging.Formatter("%(levelname)s: %(message)s"))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # absl notes with the first line that they are not


def _keep_stdout() -> None:
    """Leaves stdout to Python: the libraries of several processes talk there."""
    sys.stdout = console.Lasting(os.fdopen(os.dup(1), "w", buffering=1))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
