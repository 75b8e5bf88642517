"""Runs of train.py for the tests: a tiny configuration, and a server that forks one a run.

Importing JAX and what comes with it takes seconds. `python tests/runs.py` pays that once and then
forks a child for every request; a child is a process like any other, with its own command line,
output and exit code, that may be stopped and killed.
"""

import atexit
import functools
import hashlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import chex
import jax
import numpy as np
from ml_collections import ConfigDict

from jdecouple.checkpoint import Checkpointer

REPOSITORY = Path(__file__).resolve().parents[1]
TINY = str(Path(__file__).resolve())
SECONDS = 1200  # after which a run that does not end is a failure


def get_config():
    """Three epochs of nine steps of about a millisecond; this file is its own --config."""
    from jdecouple.train import config as configuration

    config = configuration.default()
    config.data.name = "synthetic"
    config.data.image_size = 8
    config.data.channels = 1
    config.data.synthetic_size = 80  # 72 to train on, 8 to validate, 20 to test
    config.data.augment = "basic"
    config.model.name = "mlp"
    config.model.hidden = 16
    config.model.depth = 2
    config.method.name = "deinforeg"
    config.method.projector = "8-4"
    config.optimizer.schedule = "constant"
    config.batch_size = 8
    config.epochs = 3
    config.checkpoint.every = 4
    config.log_every = 1
    return config


# Backpropagation with other parts of the same machinery: momentum, cosine, label noise.
BP = {
    "method__name": "bp",
    "method__projector": "None",
    "optimizer__name": "sgd",
    "optimizer__momentum": 0.9,
    "optimizer__learning_rate": 0.05,
    "optimizer__schedule": "cosine",
    "data__label_noise": 0.3,
    "data__augment": "strong",
}


def delayed(name: str, **values: Any) -> dict[str, Any]:
    """A delayed method in two stages of one block each, which share a device if there is one."""
    return {"method__name": name, "method__projector": "None", "num_stages": 2, **values}


def tiny(**values: Any) -> ConfigDict:
    """The tiny configuration in one stage; `model__hidden=8` sets model.hidden."""
    config = get_config()
    config.mesh.stages = 1
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in values.items()})
    return config


def cheap(**values: Any) -> ConfigDict:
    """As `tiny`, by backpropagation, which compiles fastest."""
    config = tiny(**{"method__name": "bp", "optimizer__name": "sgd", **values})
    config.method.projector = None
    return config


class Run:
    """A child of the server: `train.py` with a command line."""

    def __init__(self, server: "Server", pid: int, output: Path):
        self.pid = pid
        self.returncode: int | None = None
        self._server = server
        self._output = output

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def pause(self) -> None:
        """Holds it, so that what is on disk can be looked at; SIGCONT lets it go on."""
        self.signal(signal.SIGSTOP)
        while _state(self.pid) not in ("T", "Z"):
            time.sleep(0.0002)

    def wait(self) -> "Run":
        """Waits for its end; `returncode` is that of subprocess, minus the signal if killed."""
        if self.returncode is None:
            self.returncode = self._server.ask(wait=self.pid)["returncode"]
        return self

    @property
    def ended(self) -> bool:
        return _state(self.pid) in ("Z", "")

    @property
    def stdout(self) -> str:
        return self._output.with_suffix(".out").read_text()

    @property
    def stderr(self) -> str:
        return self._output.with_suffix(".err").read_text()


class Server:
    """Starts runs, one after another or processes of one run together; see the module."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._count = 0
        self._started: list[Run] = []
        self.file_limit: int | None = None  # bytes of any file that a run writes
        self.store: str | None = None  # folder of the object store that runs find, see `stores`
        self._process = subprocess.Popen(
            [sys.executable, TINY],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
            cwd=REPOSITORY,
            text=True,
        )

    def start(self, *arguments: str, devices: int = 1) -> Run:
        """Starts `train.py` with these arguments on so many CPU devices."""
        return self.start_together([arguments], devices=devices)[0]

    def start_together(self, commands: Sequence[Sequence[str]], devices: int = 1) -> list[Run]:
        """Starts several processes at once."""
        for run in self._started:
            if run.returncode is None:  # a test failed half-way
                run.signal(signal.SIGKILL)
                run.wait()
        self._started = [self._start(command, devices) for command in commands]
        return self._started

    def start_beside(self, arguments: Sequence[str], devices: int = 1) -> Run:
        """Starts one more process while those that were started last go on."""
        self._started.append(self._start(arguments, devices))
        return self._started[-1]

    def _start(self, arguments: Sequence[str], devices: int) -> Run:
        output = self._folder / f"run{self._count}"
        self._count += 1
        for suffix in (".out", ".err"):
            output.with_suffix(suffix).touch()
        found = self.ask(
            arguments=arguments,
            devices=devices,
            output=str(output),
            file_limit=self.file_limit,
            store=self.store,
        )
        return Run(self, found["pid"], output)

    def run(self, *arguments: str, devices: int = 1) -> Run:
        return self.start(*arguments, devices=devices).wait()

    def ask(self, **request: Any) -> dict[str, Any]:
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=SECONDS)
        self._process.stdout.close()


@functools.cache
def server() -> Server:
    """The server that all tests share; it ends with this process."""
    folder = tempfile.TemporaryDirectory()
    shared = Server(Path(folder.name))
    atexit.register(folder.cleanup)
    atexit.register(shared.close)
    return shared


@functools.cache
def finished(**values: Any) -> Path:
    """Workdir of a run that nothing has interrupted; tests work on copies of it."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    workdir = Path(folder.name) / "run"
    run = server().run(*arguments(workdir, **values))
    assert run.returncode == 0, run.stderr
    return workdir


@functools.cache
def finished_here(**values: Any) -> Path:
    """As `finished`, but run by this process, which needs no server."""
    from jdecouple.train.loop import train_and_evaluate

    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    train_and_evaluate(tiny(**values), Path(folder.name))
    return Path(folder.name)


def copy(workdir: Path, folder: Path) -> Path:
    return Path(shutil.copytree(workdir, folder / "copy"))


def arrays_at(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Arrays of a checkpoint, read as any other program would."""
    checkpoints = Checkpointer(workdir / "checkpoints", read_only=True)
    info = checkpoints.directory / str(step) / "info" / "metadata"
    document = json.loads(info.read_text())["document"]
    template = {unquote(name): _struct(spec) for name, (spec, _) in document["leaves"].items()}
    return checkpoints.restore(template, step).arrays


def final_arrays(workdir: Path) -> tuple[int, dict[str, np.ndarray]]:
    """Step and arrays of the last checkpoint."""
    step = Checkpointer(workdir / "checkpoints", read_only=True).latest_step
    return step, arrays_at(workdir, step)


def assert_same_run(workdir: Path, reference: Path) -> None:
    """The last checkpoints are equal to the last bit, and so are all metrics."""
    step, arrays = final_arrays(workdir)
    wanted_step, wanted = final_arrays(reference)
    assert step == wanted_step
    chex.assert_trees_all_equal_shapes_and_dtypes(arrays, wanted)
    chex.assert_trees_all_equal(arrays, wanted)
    assert without_timing(lines(workdir)) == without_timing(lines(reference))


def fingerprint(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder, by its relative path."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def environment(devices: int = 1) -> dict[str, str]:
    """Variables of a process that trains on so many CPU devices; its JAX is not imported yet."""
    given = os.environ.get("XLA_FLAGS", "")
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        # The tests' own flags, so that both compile alike; the last count of devices holds.
        "XLA_FLAGS": f"{given} --xla_force_host_platform_device_count={devices}".strip(),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(REPOSITORY),
    }


def arguments(workdir: Path, config: str = TINY, **values: Any) -> list[str]:
    """Command line of a run; `model__hidden=8` stands for --config.model.hidden=8."""
    overrides = [f"--config.{key.replace('__', '.')}={value}" for key, value in values.items()]
    return ["--config", config, "--workdir", str(workdir), *overrides]


def wait_for(condition: Callable[[], bool], run: Run) -> None:
    """Polls until `condition()`; fails if the run ends before that."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert not run.ended, f"the run ended first: {run.stdout} {run.stderr}"
        assert time.monotonic() < end
        time.sleep(0.0005)


def lines(workdir: Path) -> list[dict[str, Any]]:
    """Complete lines of metrics.jsonl, while they are being written too."""
    path = workdir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def without_timing(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timing = ("examples_per_second", "input_wait", "process_memory_peak")
    return [{k: v for k, v in line.items() if k not in timing} for line in lines]


def _struct(spec: str) -> jax.ShapeDtypeStruct:
    dtype, _, shape = spec.rstrip("]").partition("[")
    return jax.ShapeDtypeStruct([int(size) for size in shape.split(",") if size], dtype)


def _state(pid: int) -> str:
    """State of a process as a letter, T if it is stopped; "" if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def connected(port: int) -> socket.socket:
    """A connection to a port at which somebody will soon listen."""
    end = time.monotonic() + 300
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            assert time.monotonic() < end
            time.sleep(0.01)


def _serve() -> None:
    # Everything that a run needs, except JAX's devices: those must not exist before a fork.
    import blank
    import grain  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    import tensorflow_datasets  # noqa: F401

    import jdecouple.train.cli
    import jdecouple.train.loop  # noqa: F401

    blank.install()

    while request := sys.stdin.readline():
        request = json.loads(request)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            reply = {"returncode": os.waitstatus_to_exitcode(status)}
        else:
            reply = {"pid": os.fork()}
            if not reply["pid"]:
                _child(request)
        print(json.dumps(reply), flush=True)


def _child(request: Mapping[str, Any]) -> None:
    from jdecouple.train import cli as command_line

    os.environ["XLA_FLAGS"] = environment(request["devices"])["XLA_FLAGS"]
    if request["store"] is not None:
        import stores

        os.environ[stores.VARIABLE] = request["store"]
        stores.install()
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for number, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(request["output"] + suffix, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if (limit := request["file_limit"]) is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = ["train.py", *request["arguments"]]
    command_line.main()
    sys.exit()


if __name__ == "__main__":
    _serve()
