"""A matrix of trainings: its cells, each a workdir of train.py, and the processes that run them."""

import fcntl
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flax import traverse_util
from runner import pinned

from jdecouple.train import config as configuration
from jdecouple.train import places, report
from jdecouple.train.cli import parse
from jdecouple.train.metrics import read_metrics
from jdecouple.train.places import Place

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
OUTPUT = "output.txt"  # what the processes of a cell print, one after another
NAMES = ("data", "model", "method")  # axes whose values are names
WHERE = ("data.data_dir", "data.download")  # keys that may change: where the data lies
POLL_SECONDS = 0.1


class Cell(NamedTuple):
    """One training of the matrix."""

    axes: Mapping[str, str]  # what sets it apart: "data", "model", "method", swept keys, "seed"
    folder: Path  # its workdir
    arguments: Sequence[str]  # of train.py

    @property
    def title(self) -> str:
        """What it is, in a line."""
        return " ".join(
            value if key in NAMES else f"{short(key)}={value}" for key, value in self.axes.items()
        )


class Outcome(NamedTuple):
    """What became of a cell: "finished", "failed" or "stopped", and the last line of a failure."""

    state: str
    line: str = ""


def short(key: str) -> str:
    """The last part of a key: "label_noise" of "data.label_noise"."""
    return key.rpartition(".")[2]


def cells(
    config: str,
    axes: Mapping[str, Sequence[str]],
    settings: Sequence[str],
    settings_for: Sequence[tuple[Sequence[str], Sequence[str]]],
    folder: Path,
    variants: Mapping[str, str] = {},
    without: Sequence[Sequence[str]] = (),
) -> list[Cell]:
    """The product of the axes, the seed running fastest, with workdirs below a folder.

    In `config`, an argument of --config, {data}, {model}, {method} and other axes are replaced; one
    that stands there is no key of the configuration. `settings` are "KEY=VALUE" for all cells,
    those of `settings_for` for the cells that have all of its names. `variants` are names of
    methods with other settings, and which methods they are. Cells that have all that an entry of
    `without` says, names and KEY=VALUE of other axes, are left out.

    Raises:
        ValueError: in one line: something is given twice, unknown, or no setting.
    """
    for key, values in axes.items():
        if repeated := [value for value in values if list(values).count(value) > 1]:
            raise ValueError(f"{key} {repeated[0]!r} is given twice")
    known = dict.fromkeys(value for key in NAMES for value in axes[key])
    for names, _ in settings_for:
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"settings for {unknown[0]!r}: the matrix has {', '.join(known)}")
    for setting in [*settings, *itertools.chain(*(own for _, own in settings_for))]:
        key, equals, _ = setting.partition("=")
        if not equals:
            raise ValueError(f"setting {setting!r}: KEY=VALUE is needed")
        if key in {*axes, *(f"{name}.name" for name in NAMES)}:
            raise ValueError(f"setting {setting!r}: {key} is an axis of the matrix")
    marks = {_mark(key, value) for key, values in axes.items() for value in values}
    if strangers := [mark for left_out in without for mark in left_out if mark not in marks]:
        raise ValueError(f"cells without {strangers[0]!r}: no axis has it")
    by_label: dict[str, Cell] = {}
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        if any({*left_out} <= {_mark(*item) for item in chosen.items()} for left_out in without):
            continue
        real = {**chosen, "method": variants.get(chosen["method"], chosen["method"])}
        pairs = [f"{name}.name={real[name]}" for name in NAMES] + [*settings]
        for names, own in settings_for:
            if set(names) <= {chosen[name] for name in NAMES}:
                pairs += own
        path = config
        for name, value in real.items():
            if f"{{{name}}}" in config:
                path = path.replace(f"{{{name}}}", value)
            elif name not in NAMES:
                pairs.append(f"{name}={value}")
        cell = Cell(chosen, folder, ["--config", path, *(f"--config.{pair}" for pair in pairs)])
        label = re.sub(r"[^\w.=+-]", "_", cell.title.replace(" ", "-"))
        if label in by_label:
            raise ValueError(f"{cell.title!r} and {by_label[label].title!r} have one name: {label}")
        by_label[label] = cell._replace(folder=folder / label)
    return list(by_label.values())


def _mark(key: str, value: str) -> str:
    return value if key in NAMES else f"{key}={value}"


def is_finished(cell: Cell) -> bool:
    """Whether the workdir holds the result of a cell.

    Raises:
        ValueError: in one line: a bad configuration, or the workdir holds a run of another one.
    """
    try:
        config, _ = parse(["train.py", *cell.arguments, "--workdir", str(cell.folder)])
        wanted = _flat(configuration.validate(config))
    except configuration.ConfigError as error:
        raise ValueError(f"{cell.title}: {error}") from None
    try:
        written = json.loads((cell.folder / "config.json").read_text())
    except FileNotFoundError:
        return False
    try:
        present = _flat(configuration.filled(written["config"]))
    except configuration.ConfigError as error:
        present = {str(error): None}
    for key in {**present, **wanted}:
        if present.get(key) != wanted.get(key):
            raise ValueError(
                f"{cell.title}: '{cell.folder}' holds a run with {key} = {present.get(key)!r}, "
                f"now {wanted.get(key)!r}: choose another --output, or remove that folder"
            )
    steps = (line["step"] for line in read_metrics(cell.folder) if line["split"] == "test")
    return written["total_steps"] in steps


def _flat(config: Any) -> dict[str, Any]:
    """Values of a configuration as JSON, by key, without those that may change."""
    flat = traverse_util.flatten_dict(config.to_dict(), sep=".")
    return {key: value for key, value in json.loads(json.dumps(flat)).items() if key not in WHERE}


def result(cell: Cell) -> dict[str, Any]:
    """The results of a finished cell; accuracies are fractions, None without a validation split.

    Returns:
        "test" (final exit, last step) and "loss" (its mean cross-entropy), "test_by_exit" (last
        step, the exit that is best on the validation split) and that "exit", "test_by_step" (final
        exit, the step that is best on the validation split), "papers" (best test accuracy of any
        exit and step), "validation" (final exit, last step), "steps", "parameters",
        "examples_per_second" (median) and "device". Of language models also "bits_per_byte" (final
        exit, last step) and "bits_by_exit" (last step, the exit with fewest on the validation
        split).
    """
    written = json.loads((cell.folder / "config.json").read_text())
    lines = read_metrics(cell.folder)
    summary = report.summary(lines)
    last, steps = summary["test"], summary["test"]["step"]
    validation = next((x for x in lines if (x["split"], x["step"]) == ("validation", steps)), {})
    by_exit = report.exits(validation)
    chosen = max(by_exit, key=lambda name: by_exit[name], default=None)
    speeds = [line["examples_per_second"] for line in lines if line["split"] == "train"]
    return {
        "test": last["accuracy"],
        "loss": last.get("loss"),
        "test_by_exit": chosen and report.exits(last)[chosen],
        "exit": chosen,
        "test_by_step": summary.get("test_at_best_validation", {}).get("accuracy"),
        "papers": max(report.exits(summary["best_test"]).values()),
        "validation": validation.get("accuracy"),
        "steps": steps,
        "parameters": written["parameters"],
        "examples_per_second": statistics.median(speeds) if speeds else None,
        "device": written["device_kind"],
        **_bits(last, validation),
    }


def _bits(last: Mapping[str, Any], validation: Mapping[str, Any]) -> dict[str, Any]:
    if "bits_per_byte" not in last:
        return {}
    by_exit = report.exits(validation, "bits_per_byte")
    chosen = min(by_exit, key=lambda name: by_exit[name], default=None)
    found = report.exits(last, "bits_per_byte")
    return {"bits_per_byte": last["bits_per_byte"], "bits_by_exit": chosen and found[chosen]}


def slots(count: int, gpus: Sequence[str] = ()) -> list[Place]:
    """Places for so many processes, each with its part of the cores and one of the GPUs, if any."""
    cores = places.parts(places.cores() if count > 1 else [], count)
    found = []
    for index, own in enumerate(cores):
        variables = {"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]} if gpus else {}
        if count > max(1, len(gpus)):  # several on a GPU
            variables["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        found.append(Place(own, variables))
    return found


class _Running(NamedTuple):
    cell: Cell
    process: subprocess.Popen
    start: int  # of its output in the file


def run(
    waiting: Iterable[Cell], slots: Sequence[Place], ended: Callable[[Cell, Outcome], None]
) -> bool:
    """Trains cells, one at a time in every place, and calls `ended` after each.

    A process holds a lock on its output for as long as it lives. A cell whose process has outlived
    the benchmark that started it is thus waited for, not trained twice.

    Returns:
        False after SIGTERM or Ctrl-C, when the processes have saved and ended.
    """
    left, running = list(waiting), dict[int, _Running]()
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while left or running:
            for slot, place in enumerate(slots):
                if slot not in running and (started := _start_one(left, place, ended)):
                    running[slot] = started
            for slot, training in list(running.items()):
                if training.process.poll() is not None:
                    del running[slot]
                    ended(training.cell, _outcome(training))
            time.sleep(POLL_SECONDS if left or running else 0)
    except KeyboardInterrupt:
        for training in running.values():
            training.process.terminate()
        for training in running.values():
            training.process.wait()
            ended(training.cell, _outcome(training))
        return False
    finally:
        for training in running.values():
            training.process.kill()  # nothing that has ended
        signal.signal(signal.SIGTERM, previous)
    return True


def _start_one(
    left: list[Cell], place: Place, ended: Callable[[Cell, Outcome], None]
) -> _Running | None:
    """Starts the first cell that no process trains; it, and finished ones, leave the list."""
    for cell in list(left):
        cell.folder.mkdir(parents=True, exist_ok=True)
        with (cell.folder / OUTPUT).open("ab") as output:
            try:
                fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            left.remove(cell)
            if is_finished(cell):
                ended(cell, Outcome("finished"))
                continue
            start = output.tell()
            with pinned(place.cores):
                process = subprocess.Popen(
                    [sys.executable, TRAIN, *cell.arguments, "--workdir", cell.folder],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env={**os.environ, **place.variables},
                    start_new_session=True,  # Ctrl-C is for the benchmark, which asks them to stop
                )
            return _Running(cell, process, start)
    return None


def _outcome(training: _Running) -> Outcome:
    cell, code = training.cell, training.process.returncode
    text = (cell.folder / OUTPUT).read_bytes()[training.start :].decode(errors="replace")
    if code == 0 and is_finished(cell):
        return Outcome("finished")
    if code == 0 or -code == signal.SIGTERM:  # before there was anything to save
        return Outcome("stopped")
    if code < 0:
        return Outcome("failed", f"killed by {signal.Signals(-code).name}")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return Outcome("failed", (errors or lines or [f"exit code {code}"])[-1])
