"""The command line of train: flags, one-line errors and exit codes."""

import errno
import logging as python_logging
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePath

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from jdecouple._errors import did_you_mean, first_line
from jdecouple.checkpoint import CheckpointError
from jdecouple.train import config as configuration
from jdecouple.train import console, elastic, hosts, listing, loop, presets, programs
from jdecouple.train.errors import ConfigError, one_line, shown
from jdecouple.train.keys import KEYS
from jdecouple.train.options import OWNERS
from jdecouple.train.overrides import NAMES, override, typed
from jdecouple.train.tracking import TrackingError

_HOSTS = """Several processes (docs/multi-host.md); SLURM and Open MPI need no flags:
  --coordinator HOST:PORT   where process 0 waits for the others
  --num_processes N         processes in the run
  --process_index I         number of this one, from 0
  --transport_address HOST  where the others reach this one; by default as process 0 sees it
On machines without one home, all need the same secret in JDECOUPLE_TOKEN."""
_HELP = "--help KEY tells of a key alone, `jdecouple list keys` in a line of each."
EXPECTED = (
    *(ConfigError, CheckpointError, loop.NonFiniteError, TrackingError, OSError),
    KeyboardInterrupt,
)
# What ends a run although its input is good.
_OF_THE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EMFILE, errno.ENFILE}


@console.lasting()
def main(argv: Sequence[str] | None = None) -> None:
    """Trains as a command line says.

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
        spec = parse_process_spec(argv)
        if spec and config.mesh.elastic is not None:
            if _own_flags(argv)[0].cache:
                programs.keep()  # a process that is started again is there sooner
            elastic.train_stage(config, workdir, spec)
        elif spec:
            _train_among(spec, config, workdir)
        else:
            if _own_flags(argv)[0].cache:
                programs.keep()
            loop.train_and_evaluate(config, workdir)
    except EXPECTED as error:
        console.refuse(*ending(error))


def command(argv: Sequence[str]) -> None:
    """Runs `jdecouple train` with these arguments."""
    main(["jdecouple train", *argv])


def _train_among(spec: hosts.ProcessSpec, config: ConfigDict, workdir: str) -> None:
    """Trains as one of several processes, and ends the others if this one fails."""
    _keep_stdout()
    with one_line():
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
        return console.INTERRUPTED
    if isinstance(error, EXPECTED):
        bad_input = isinstance(error, ConfigError) and not _of_the_machine(error)
        return first_line(error), 2 if bad_input else 1
    return f"{type(error).__name__}: {first_line(error)}", 1


def _of_the_machine(error: BaseException | None) -> bool:
    """Whether an error goes back to one that no other input would avoid, such as a full disk."""
    if error is None or getattr(error, "errno", None) in _OF_THE_MACHINE:
        return error is not None
    return _of_the_machine(error.__cause__)


def parse(argv: Sequence[str], own: str = "") -> tuple[ConfigDict, str]:
    """The complete configuration of a command line, its values not yet checked, and the workdir.

    The usage tells of the command's `own` flags, too, such as "[--low X] ", which are not in it.

    Raises:
        ConfigError: bad flags or a bad file, in one line.
        SystemExit: with code 0 after `--help`.
    """
    given, program, rest = _own_flags(argv)
    usage = _usage(program, own)
    for argument in rest:
        if argument.startswith("-") and not override(argument):
            known = [*given, *re.findall(r"--(\w+)", own)]
            raise ConfigError(f"unknown flag {argument}; {usage}{_flag_meant(known, argument)}")
    workdir = given.workdir
    if given.config and not workdir and not _is_script(program):
        workdir = _own_folder(given.config)
    if not given.help and not (given.config and workdir):
        needed = "--config and --workdir are" if _is_script(program) else "--config is"
        raise ConfigError(f"{needed} needed; {usage}")
    chosen = {key: given[f"config.{key}"].value for key in NAMES}
    names = {key: name for key, name in chosen.items() if name is not None}
    config, rest = typed(presets.read(given.config) if given.config else {}, names, rest)
    if given.help:
        _help(config, usage, [argument for argument in rest if not override(argument)])
        sys.exit(0)
    overrides = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=overrides, sys_argv=rest)
    if extra := _parsed(overrides, [program, *rest], config)[1:]:
        raise ConfigError(f"unknown argument {extra[0]!r}; {usage}")
    return configuration.filled(overrides.config), workdir


def _is_script(program: str) -> bool:
    return program.endswith("train.py")


def _own_folder(config: str) -> str:
    """The workdir of a `--config` that comes without one.

    >>> _own_folder("quickstart"), _own_folder("mine/vision.py:cifar10,vgg8,scpl")
    ('runs/quickstart', 'runs/vision-cifar10-vgg8-scpl')
    """
    file, _, argument = config.partition(":")
    name = f"{PurePath(file).stem}-{argument}".rstrip("-")
    return "runs/" + re.sub(r"[^\w.]+", "-", name)


def _usage(program: str, own: str) -> str:
    workdir = "[--workdir FOLDER]"
    if _is_script(program):
        program, workdir = "python train.py", "--workdir FOLDER"
    own += "[--nocache] [--config.KEY=VALUE ...]"
    return f"usage: {program} --config FILE[:ARGUMENT] {workdir} {own}"


def _flag_meant(known: Iterable[str], argument: str) -> str:
    """Which flag was probably meant by one that is unknown, or which key."""
    name, keys = argument.partition("=")[0], [f"config.{key.name}" for key in KEYS]
    return did_you_mean(name, (f"--{flag}" for flag in [*keys, *known]))


def _help(config: ConfigDict, usage: str, keys: Sequence[str]) -> None:
    """Prints what --help prints: of the given keys, else of all flags and keys."""
    if keys:
        chosen = {section: config[section].name for section in OWNERS}
        print("\n\n".join(listing.described(key, chosen) for key in keys))
        return
    files = f"FILE is a preset ({', '.join(presets.names())}), or a path.\n{_HELP}"
    print("\n\n".join([usage, files, _HOSTS, f"Keys and their defaults:\n\n{config}", *_lists()]))


def _lists() -> Iterator[str]:
    """What the sections of owners may set, by the name of each."""
    for section, registry in OWNERS.items():
        yield f"Options of config.{section} by its name, and their defaults:\n\n" + "\n".join(
            f"  {name}: {listing.options_of(section, name)}" for name in registry.names()
        )


def parse_process_spec(argv: Sequence[str]) -> hosts.ProcessSpec | None:
    """The process's place among several, by its flags and variables; None if it is alone.

    Raises:
        ConfigError: a part of a place without the rest, or a bad value, in one line.
    """
    given, *_ = _own_flags(argv)
    with one_line():
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
    names = (f"config.{key}" for key in NAMES)
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
        given = shown(match[2])
        raise ConfigError(f"config.{match[1]} is {given}: {wanted} is needed") from error


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
