"""The command launch: the processes of one run on this machine, which end together.

No JAX in here: it starts at once, and its memory is small.
"""

import argparse
import contextlib
import ctypes
import functools
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import IO

from jdecouple._errors import Arguments, first_line, require_int
from jdecouple.train import console, places
from jdecouple.train.places import Place

_GRACE = 5.0  # seconds in which the others end by themselves once a process has failed
_PATIENCE = 60.0  # seconds that they have to end once they have been told to
_RESTARTS = 100  # of the processes of an elastic run, all together
_ELASTIC = re.compile(r"--?config\.mesh\.elastic(=(?!None$).*)?")
_KILLS = 3  # of so many signals the last ends the processes at once
_OURS = ("--coordinator", "--num_processes", "--process_index")
_DEATH = 1  # of the parent, upon which Linux sends a signal: PR_SET_PDEATHSIG
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def main(argv: Sequence[str]) -> None:
    """Starts the processes of one run on this machine, and ends with them.

    COMMAND is `train` with its arguments, a Python file or any other program. Every process finds
    its place in the run in JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, and has
    a part of the cores, and of the GPUs if there are any. The console is that of process 0; what
    others print begins with their number, as in "[1] ". SIGTERM, SIGINT and SIGHUP go to all, the
    third ends them at once. Where one fails, the others are ended, and the exit code is its own; of
    an elastic run one that a signal has ended is started again.

    Raises:
        SystemExit: where a process has failed; with code 2 after bad arguments, told in one line.
    """
    try:
        given = parse(argv)
        command = program(given.command)
        where = placed(given.num_processes, given.cores, given.gpus)
        code = run(command, where, given.restarts)
    except (ValueError, OSError) as error:
        console.refuse(first_line(error))
    if code:
        sys.exit(code)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of the command; ValueError for bad ones."""
    parser = Arguments("launch", main.__doc__)
    parser.usage = (
        "%(prog)s --num_processes K [--cores LIST] [--gpus LIST] [--restarts N] [--] COMMAND ..."
    )
    parser.add_argument("--num_processes", "-n", type=int, metavar="K", help="processes of the run")
    parser.add_argument(
        "--cores", metavar="LIST", help="to share out, such as 0-3,8; none: the processes have all"
    )
    parser.add_argument("--gpus", metavar="LIST", help="to share out, such as 0,2; none: the same")
    parser.add_argument(
        "--restarts",
        type=int,
        metavar="N",
        help="how often processes that a signal has ended are started again, all together; by "
        f"default {_RESTARTS} where COMMAND sets --config.mesh.elastic, else 0",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="to run")
    given = parser.parse_args(argv)
    if given.command[:1] == ["--"]:
        del given.command[0]
    if given.command and given.command[0].startswith("-"):
        parser.error(f"unrecognized arguments: {given.command[0]}")
    missing = {"--num_processes": given.num_processes is None, "a command": not given.command}
    for name in (name for name, is_missing in missing.items() if is_missing):
        parser.error(f"{name} is needed")
    require_int(1, **{"--num_processes": given.num_processes})
    if given.restarts is None:
        given.restarts = _RESTARTS if any(map(_ELASTIC.fullmatch, given.command)) else 0
    require_int(0, **{"--restarts": given.restarts})
    return given


def program(words: Sequence[str]) -> list[str]:
    """What is started for a COMMAND; ValueError if there is no such program, or it has a place."""
    name, *rest = words
    own = [word for word in rest if word.partition("=")[0] in _OURS]
    if own and os.path.basename(name) in ("train", "train.py"):
        raise ValueError(f"{own[0]} is what launch gives each process: leave it out of {name}")
    if name == "train":
        return [sys.executable, "-m", "jdecouple", *words]
    if name.endswith(".py"):
        if not os.path.isfile(name):
            raise ValueError(f"there is no file {name!r}")
        return [sys.executable, *words]
    if not shutil.which(name):
        raise ValueError(f"there is no program {name!r}: train, a Python file or another is needed")
    return list(words)


def placed(count: int, cores: str | None = None, gpus: str | None = None) -> list[Place]:
    """Where so many processes run, each on its part of the cores and GPUs.

    Args:
        count: K.
        cores: which to share out, as on the command line; by default all that this process may use.
        gpus: the same; by default all that JAX would use.

    Raises:
        ValueError: cores that are none, or are not there, or fewer GPUs than processes.
    """
    own = places.parts(_cores(cores), count)
    given = "" if gpus == "none" else gpus
    named = places.gpus(os.environ) if given is None else [*filter(None, given.split(","))]
    if not named:
        return [Place(part, {}) for part in own]
    if len(named) < count:
        raise ValueError(
            f"{count} processes for {len(named)} GPU(s): each needs its own, unless --gpus=none "
            "or JAX_PLATFORMS=cpu is given"
        )
    shared = places.parts(named, count)
    variables = [{"CUDA_VISIBLE_DEVICES": ",".join(part)} for part in shared]
    return list(map(Place, own, variables))


def _cores(given: str | None) -> list[int]:
    """Cores of a list such as 0-3,8, in its order."""
    allowed = places.cores()
    if given is None or given == "none":
        return [] if given else allowed
    if not allowed:
        raise ValueError("--cores: this system cannot pin processes to cores")
    found: list[int] = []
    for part in given.split(","):
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part)
        own = range(int(match[1]), int(match[2] or match[1]) + 1) if match else ()
        if not own:
            raise ValueError(f"--cores is {given!r}: numbers and ranges are needed, such as 0-3,8")
        found += own
    if missing := [core for core in found if core not in allowed]:
        known = ", ".join(map(str, sorted(allowed)))
        raise ValueError(f"--cores has {missing[0]}: this process may use {known}")
    return found


def run(command: Sequence[str], where: Sequence[Place], restarts: int = 0) -> int:
    """Runs a command as processes of one run; the exit code of the first that fails, else 0.

    Those that a signal ends, and not this one, are started again, so many times in all.
    """
    processes: list[subprocess.Popen] = []
    asked: list[int] = []
    again = [0]
    held: list[bytes] = []
    relays: list[threading.Thread] = []
    variables = _variables(len(where))

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        _tell(processes, number if len(asked) < _KILLS else signal.SIGKILL)

    def start(index: int) -> subprocess.Popen:
        process = _start(command, where[index], variables[index], first=not index)
        for stream, target in ((process.stdout, 1), (process.stderr, 2)):
            if stream:
                given = stream, target, f"[{index}] ".encode(), held
                relays.append(threading.Thread(target=_relay, args=given, daemon=True))
                relays[-1].start()  # daemon: one that outlives its parent may hold the pipe
        return process

    def restart(index: int, code: int) -> bool:
        if code >= 0 or asked or again[0] >= restarts:
            return False
        again[0] += 1
        processes[index] = start(index)
        if asked:  # meanwhile
            _tell(processes[index : index + 1], asked[-1])
        what = f"process {index} was ended by {_name(-code)}: it is started again"
        print(f"{what} ({again[0]} of at most {restarts})", file=sys.stderr, flush=True)
        return True

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as by nohup
            signal.signal(number, ask)
    try:
        for index in range(len(where)):
            processes.append(start(index))
    except OSError:
        _tell(processes, signal.SIGKILL)
        raise
    index, code = _ends(processes, restart)
    for thread in relays:
        thread.join(_GRACE)
    if processes[0].returncode <= 0:  # else it has told why, its own error or that of another
        _write(2, b"".join(held))
    if code < 0 and not asked:
        print(f"error: process {index} was ended by {_name(-code)}", file=sys.stderr)
    return code if code >= 0 else 128 - code


def _variables(count: int) -> list[Mapping[str, str]]:
    """What tells each process its place in the run."""
    if count == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    shared = {"JAX_COORDINATOR_ADDRESS": coordinator, "JAX_NUM_PROCESSES": str(count)}
    return [{**shared, "JAX_PROCESS_ID": str(index)} for index in range(count)]


def _start(
    command: Sequence[str], place: Place, variables: Mapping[str, str], *, first: bool
) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        stdin=None if first else subprocess.DEVNULL,
        stdout=None if first else subprocess.PIPE,
        stderr=None if first else subprocess.PIPE,
        env={**os.environ, **place.variables, **variables},
        start_new_session=True,  # of a Ctrl-C each gets one signal, from here
        preexec_fn=functools.partial(_settle, place.cores),
    )


def _settle(cores: Sequence[int]) -> None:
    """In a new process: its cores, before XLA counts them, and its end if launch is killed."""
    if _LIBC:
        _LIBC.prctl(_DEATH, signal.SIGTERM)
    if cores:
        os.sched_setaffinity(0, cores)


def _ends(
    processes: Sequence[subprocess.Popen], restart: Callable[[int, int], bool]
) -> tuple[int, int]:
    """Waits for all, and ends them when one fails; which failed first, and its code, or zeros.

    One that `restart` puts another in the place of, by its number and its code, has not failed.
    """
    ended: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()

    def wait(index: int) -> None:
        ended.put((index, processes[index].wait()))

    def watch(index: int) -> None:
        threading.Thread(target=wait, args=(index,), daemon=True).start()

    for index in range(len(processes)):
        watch(index)
    failed = 0, 0
    steps = [(_GRACE, signal.SIGTERM), (_PATIENCE, signal.SIGKILL)]
    left = len(processes)
    while left:
        try:
            found = ended.get(timeout=steps[0][0] if failed[1] and steps else None)
        except queue.Empty:
            _tell(processes, steps.pop(0)[1])
            continue
        if not failed[1] and restart(*found):
            watch(found[0])
            continue
        left -= 1
        failed = failed if failed[1] else (found if found[1] else failed)
    return failed


def _tell(processes: Sequence[subprocess.Popen], number: int) -> None:
    for process in processes:
        process.send_signal(number)  # nothing where it has ended


def _relay(stream: IO[bytes], target: int, tag: bytes, held: list[bytes]) -> None:
    """Prints the lines of a process behind its tag; an error, which process 0 tells, is held."""
    for line in stream:
        tagged = tag + line.rstrip(b"\n") + b"\n"
        if line.startswith(b"error: "):
            held.append(tagged)
        else:
            _write(target, tagged)


def _write(target: int, text: bytes) -> None:
    with contextlib.suppress(OSError):  # a console that is gone ends no run
        os.write(target, text)


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
