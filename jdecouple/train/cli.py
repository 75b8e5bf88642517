"""The command line of train.py: flags, one-line errors and exit codes."""

import logging as python_logging
import os
import re
import runpy
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from jdecouple._errors import first_line

_USAGE = "usage: python train.py --config FILE[:ARGUMENT] --workdir FOLDER [--config.KEY=VALUE ...]"
_HOSTS = """Several processes (docs/multi-host.md); SLURM and Open MPI need no flags:
  --coordinator HOST:PORT   where process 0 waits for the others
  --num_processes N         processes in the run
  --process_index I         number of this one, from 0
  --transport_address HOST  where the others reach this one; by default as process 0 sees it"""
_INTERRUPTED = "interrupted before anything new could be saved"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs train.py.

    Args:
        argv: the command line, the program first; by default the process's own.

    Raises:
        SystemExit: with code 1 if the training diverged, 2 after bad input, told in one line,
            130 if Ctrl-C came where there was nothing to save. A run that ends, or that SIGTERM
            or Ctrl-C stopped after saving, just returns. Of several processes, one that fails
            ends the others with its code; one that is lost ends them with 3.
    """
    _log_in_short()
    try:
        from jdecouple.train.config import ConfigError

        argv = sys.argv if argv is None else argv
        try:
            config, workdir = parse(argv)
            place = parse_process_spec(argv)
        except ConfigError as error:
            _fail(error, 2)
        if place is None:
            _train_alone(config, workdir)
        else:
            _train_among(place, config, workdir)
    except KeyboardInterrupt:
        _fail(_INTERRUPTED, 130)


def _train_alone(config: ConfigDict, workdir: str) -> None:
    from jdecouple.train.config import ConfigError
    from jdecouple.train.loop import NonFiniteError, train_and_evaluate

    try:
        train_and_evaluate(config, workdir)
    except ConfigError as error:
        _fail(error, 2)
    except NonFiniteError as error:
        _fail(error, 1)


def _train_among(place: Any, config: ConfigDict, workdir: str) -> None:
    """As `_train_alone`, as one of several processes."""
    from jdecouple.train import hosts
    from jdecouple.train.config import ConfigError, validate
    from jdecouple.train.loop import NonFiniteError, train_and_evaluate

    _keep_stdout()
    try:
        validate(config)  # others need not wait for a process that cannot train
        processes = hosts.join(place)
    except ValueError as error:
        _fail(error, 2)
    code, shown = 0, ""
    try:
        train_and_evaluate(config, workdir, processes)
        processes.close()
    except ConfigError as error:
        code, shown = 2, first_line(error)
    except NonFiniteError as error:
        code, shown = 1, first_line(error)
    except KeyboardInterrupt:
        code, shown = 130, _INTERRUPTED
    except BaseException as error:
        processes.settle()
        traceback.print_exc()
        code, shown = 1, f"{type(error).__name__}: {first_line(error)}"
    if code:
        processes.fail(shown, code)
        print(f"error: {shown}", file=sys.stderr)
        sys.stdout.flush()
        os._exit(code)  # JAX would wait for processes that end as well


def parse(argv: Sequence[str]) -> tuple[ConfigDict, str]:
    """Reads the command line.

    Args:
        argv: the program, `--config`, `--workdir`, any `--config.KEY=VALUE`, and what
            `parse_process_spec` reads.

    Returns:
        The complete configuration, its values not yet checked, and the workdir.

    Raises:
        ConfigError: bad flags or a bad file, in one line.
        SystemExit: with code 0 after `--help`.
    """
    from jdecouple.train import config as configuration

    given, program, rest = _own_flags(argv)
    if given.help:
        print(f"{_USAGE}\n\n{_HOSTS}\n\nKeys and their defaults:\n\n{configuration.default()}")
        sys.exit(0)
    for argument in rest:
        if match := re.match(r"--?(?:no)?config\.([^=]*)", argument):
            configuration.value_type(match[1])
        elif argument.startswith("-"):
            raise configuration.ConfigError(f"unknown flag {argument}; {_USAGE}")
    if not given.config or not given.workdir:
        raise configuration.ConfigError(f"--config and --workdir are needed; {_USAGE}")
    config = configuration.filled(_load(given.config))
    overrides = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=overrides, sys_argv=rest)
    if extra := _parsed(overrides, [program, *rest])[1:]:
        raise configuration.ConfigError(f"unknown argument {extra[0]!r}; {_USAGE}")
    return overrides.config, given.workdir


def parse_process_spec(argv: Sequence[str]) -> Any:
    """The `hosts.ProcessSpec` of the process by its flags and variables; None if it is alone.

    Raises:
        ConfigError: a part of a place without the rest, or a bad value, in one line.
    """
    from jdecouple.train.config import ConfigError
    from jdecouple.train.hosts import detect_cluster

    given, *_ = _own_flags(argv)
    try:
        return detect_cluster(
            os.environ,
            coordinator=given.coordinator,
            count=given.num_processes,
            index=given.process_index,
            address=given.transport_address,
        )
    except ValueError as error:
        raise ConfigError(first_line(error)) from error


def _own_flags(argv: Sequence[str]) -> tuple[flags.FlagValues, str, list[str]]:
    """Values of the flags that are no key of the configuration; the program; other arguments."""
    given = flags.FlagValues()
    for name in ("config", "workdir", "coordinator", "transport_address"):
        flags.DEFINE_string(name, None, "", flag_values=given)
    for name in ("num_processes", "process_index"):
        flags.DEFINE_integer(name, None, "", flag_values=given)
    flags.DEFINE_bool("help", False, "", flag_values=given)
    program, *rest = _parsed(given, argv, known_only=True)
    return given, program, rest


def _parsed(values: flags.FlagValues, argv: Sequence[str], known_only: bool = False) -> list[str]:
    from jdecouple.train import config as configuration

    values.set_gnu_getopt(True)  # flags may follow other arguments
    try:
        return values(list(argv), known_only=known_only)
    except flags.IllegalFlagValueError as error:
        match = re.match(r"flag --config\.([\w.]+)=(.*?): ", str(error), re.DOTALL)
        if not match:
            raise configuration.ConfigError(first_line(error)) from error
        kind = configuration.value_type(match[1])
        wanted = "a section with keys" if kind is ConfigDict else f"a value of type {kind.__name__}"
        raise configuration.ConfigError(
            f"config.{match[1]} is {match[2]!r}: {wanted} is needed"
        ) from error
    except (flags.Error, ValueError, TypeError) as error:
        raise configuration.ConfigError(first_line(error)) from error


def _load(config: str) -> Mapping[str, Any]:
    """Calls `get_config` of a file, with what follows the first colon if anything does."""
    from jdecouple.train import config as configuration

    path, *argument = config.split(":", 1)
    if not Path(path).is_file():
        raise configuration.ConfigError(f"--config {config}: there is no file {path!r}")
    try:
        found = runpy.run_path(path, run_name="config").get("get_config")
        loaded = found(*argument) if callable(found) else None
    except Exception as error:  # whatever the file does
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise configuration.ConfigError(f"--config {config}: {kind}{first_line(error)}") from error
    if not isinstance(loaded, Mapping | ConfigDict):
        raise configuration.ConfigError(
            f"--config {config}: a function get_config() that returns a ConfigDict is needed"
        )
    return loaded


def _log_in_short() -> None:
    """Lets libraries say warnings and errors only, each a plain line on stderr."""
    logging.set_verbosity(logging.WARNING)
    logging.use_absl_handler()
    logging.get_absl_handler().setFormatter(python_logging.Formatter("%(levelname)s: %(message)s"))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # absl notes with the first line that they are not


def _keep_stdout() -> None:
    """Leaves stdout to Python: the libraries of several processes talk there."""
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def _fail(error: object, code: int) -> NoReturn:
    print(f"error: {first_line(error)}", file=sys.stderr)
    sys.exit(code)
