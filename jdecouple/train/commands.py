"""The command jdecouple: which commands there are, and how they end."""

import contextlib
import os
import pkgutil
import sys
from collections.abc import Sequence
from typing import NamedTuple

from jdecouple._errors import choices
from jdecouple.train import console


class Command(NamedTuple):
    """A command.

    Attributes:
        run: "module:function", imported when it is called, as JAX and the like take seconds. The
            function takes the arguments.
        about: what it does.
        compiles: whether it runs compiled programs, and raises what is wrong with its input.
    """

    run: str
    about: str
    compiles: bool = True


COMMANDS = {
    "train": Command("jdecouple.train.cli:command", "Trains a network.", compiles=False),
    "launch": Command(
        "jdecouple.train.launch:main",
        "Starts a run as several processes of this machine.",
        compiles=False,
    ),
    "plan": Command(
        "jdecouple.train.plan:main", "Plans a run: bytes and time, before anything is trained."
    ),
    "predict": Command("jdecouple.inference.cli:predict", "Classifies images or texts."),
    "generate": Command("jdecouple.inference.cli:generate", "Goes on with a text."),
    "evaluate": Command(
        "jdecouple.train.evaluation:evaluate", "Measures every exit on labelled examples."
    ),
    "calibrate": Command(
        "jdecouple.train.evaluation:calibrate", "Chooses by which rule inputs leave early."
    ),
    "report": Command("jdecouple.train.pages.report:main", "Writes one HTML page about a run."),
    "export": Command(
        "jdecouple.inference.cli:export", "Writes a network into a folder that serves it."
    ),
    "gather": Command(
        "jdecouple.train.gathering:main",
        "Makes checkpoints whole whose parts several machines have written.",
    ),
    "compare": Command(
        "jdecouple.train.pages.compare:main", "Compares runs on one page, and in two tables."
    ),
    "find_lr": Command(
        "jdecouple.train.lr_finder:main", "Finds a learning rate for a configuration."
    ),
    "list": Command(
        "jdecouple.train.commands:show", "Lists what there is to choose from.", compiles=False
    ),
}
TOPICS = {
    "methods": "jdecouple.train.listing:methods",
    "models": "jdecouple.train.listing:models",
    "optimizers": "jdecouple.train.listing:optimizers",
    "correctors": "jdecouple.train.listing:correctors",
    "data": "jdecouple.train.listing:data_sets",
    "presets": "jdecouple.train.presets:summaries",
    "keys": "jdecouple.train.listing:keys",
}
"""What `list` lists: a function that gives names and what there is to say of each."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command.

    Args:
        argv: the command line, the program first; by default the process's own.

    Raises:
        SystemExit: with code 2 after bad input, told in one line; 1 if the disk is full; 130 after
            Ctrl-C.
    """
    command, *rest = [*(sys.argv if argv is None else argv)[1:]] or ["help"]
    try:
        if command in ("-h", "--help", "help"):
            print(_usage())
        elif command == "--version":
            print(pkgutil.resolve_name("jdecouple:__version__"))
        elif command in COMMANDS:
            _run(COMMANDS[command], rest)
        else:
            console.refuse(f"unknown command {command!r}: {choices(command, COMMANDS)}")
    except BrokenPipeError:  # whoever reads stdout has seen enough
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _run(command: Command, arguments: Sequence[str]) -> None:
    with console.ends_at_once():
        run = pkgutil.resolve_name(command.run)
        if command.compiles:
            from jdecouple.train import cli, programs
            from jdecouple.train.errors import one_line
    if not command.compiles:
        run(arguments)
        return
    cli.log_in_short()
    try:
        if "--nocache" not in arguments:  # of find_lr; the others refuse it
            programs.keep()
        with one_line():
            run(arguments)
    except BrokenPipeError:
        raise
    except cli.EXPECTED as error:
        console.refuse(*cli.ending(error))


def show(arguments: Sequence[str]) -> None:
    """Prints a list of what there is to choose from, a line for each."""
    topic, *rest = arguments or ("--help",)
    if topic in ("-h", "--help"):
        print(f"usage: jdecouple list {'|'.join(TOPICS)}")
        return
    if topic not in TOPICS or rest:
        given = " ".join(arguments)
        console.refuse(f"there is no list of {given!r}: {choices(topic, TOPICS)}")
    with console.ends_at_once():
        rows = [*pkgutil.resolve_name(TOPICS[topic])()]
    width = max(len(name) for name, _ in rows)
    for name, said in rows:
        print(f"{name:{width}}  {said}")
    sys.stdout.flush()


def _usage() -> str:
    usage = "usage: jdecouple COMMAND ... (COMMAND --help tells more), or jdecouple --version"
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.about}" for name, command in COMMANDS.items()]
    return "\n".join([usage, "", *lines, "", f"list {'|'.join(TOPICS)}"])
