"""What metrics are written to beside metrics.jsonl: each reads back as what that holds."""

import functools
import json
import math
import os
import re
import shutil
import struct
import subprocess
import threading
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import test_hosts
from runs import cheap, lines
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jdecouple.train import cli as command_line
from jdecouple.train import tracking
from jdecouple.train.errors import ConfigError
from jdecouple.train.loop import train_and_evaluate
from jdecouple.train.metrics import MetricsWriter
from jdecouple.train.tracking import table, tensorboard, writers

BOTH = "tensorboard, wandb"


@pytest.fixture(autouse=True)
def user_without_settings(monkeypatch, tmp_path):
    """W&B finds nothing of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))


def flat(written: list[dict]) -> dict[tuple[str, int], float]:
    """Values of metrics.jsonl by what trackers call them, and by step."""
    return {
        (f"{line['split']}/{name}", line["step"]): value
        for line in written
        for name, value in line.items()
        if name not in ("step", "split")
    }


def of_tensorboard(workdir: Path) -> dict[tuple[str, int], float]:
    """Scalars as TensorBoard shows them; none twice."""
    events = EventAccumulator(str(workdir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    points = [(tag, p) for tag in events.Tags()["scalars"] for p in events.Scalars(tag)]
    found = {(tag, point.step): point.value for tag, point in points}
    assert len(found) == len(points)
    return found


def of_wandb(workdir: Path) -> tuple[set[str], list[tuple[str, int, float]]]:
    """Ids of W&B's runs, and the scalars in its files, in the order of their folders.

    A file is a log as LevelDB writes it: after 7 bytes blocks of 32 KiB with records of checksum,
    length and type, which are pieces of a message.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    ids, values = set(), []
    for path in sorted(workdir.glob("wandb/offline-run-*/*.wandb")):
        data, position, message = path.read_bytes(), 7, b""
        while position + 7 <= len(data):
            if (rest := 32768 - position % 32768) < 7:
                position += rest
                continue
            _, length, kind = struct.unpack("<IHB", data[position : position + 7])
            message += data[position + 7 : position + 7 + length]
            position += 7 + length
            if kind not in (1, 4):  # the whole, or the last piece
                continue
            record, message = Record.FromString(message), b""
            if record.run.run_id:
                ids.add(record.run.run_id)
            items = {i.key or i.nested_key[0]: i.value_json for i in record.history.item}
            step = int(items.pop("_step", -1))
            values += [(k, step, json.loads(v)) for k, v in items.items() if k[0] != "_"]
    return ids, values


def to_float32(values: dict) -> dict:
    return {key: float(np.float32(value)) for key, value in values.items()}


class Recorder:
    """A writer that keeps what it gets."""

    def __init__(self):
        self.lines: list[dict[str, Any]] = []
        self.closed = 0

    def write(self, step, split, values):
        self.lines.append({"step": step, "split": split, **values})

    def close(self):
        self.closed += 1


@functools.cache
def settings() -> dict[str, Any]:
    return {"optimizer__learning_rate": 0.05, "eval_every": 3, "checkpoint__every": 3}


# --- A run, and one that goes on from an earlier checkpoint ----------------------------------


@pytest.mark.slow
def test_trackers_hold_what_metrics_jsonl_holds(tmp_path):
    """Of a run, then of one that goes on, otherwise, from before its end, in the same W&B run."""
    workdir, recorder, calls = tmp_path / "run", Recorder(), []
    before = {*threading.enumerate()}

    def count(step, split, values):
        calls.append((step, split, values["loss"]))

    config = cheap(steps=6, tracking=BOTH, gradient_norms=True, **settings())
    train_and_evaluate(config, workdir, callbacks=[recorder, count])
    first = lines(workdir)
    assert recorder.lines == first
    assert recorder.closed == 1
    assert calls == [(line["step"], line["split"], line["loss"]) for line in first]
    assert {"train/gradient_norm", "train/learning_rate"} < {name for name, _ in flat(first)}
    assert of_tensorboard(workdir) == to_float32(flat(first))
    ids, values = of_wandb(workdir)
    assert {(name, step): value for name, step, value in values} == flat(first)
    assert len(values) == len(flat(first))

    shutil.rmtree(workdir / "checkpoints" / "6")
    config = cheap(steps=9, tracking=tuple(BOTH.split(", ")), **settings())
    config.optimizer.learning_rate = 0.2
    config.gradient_norms = False
    train_and_evaluate(config, workdir)
    second = lines(workdir)
    assert flat(second)["train/loss", 6] != flat(first)["train/loss", 6]
    assert of_tensorboard(workdir) == to_float32(flat(second))
    both_ids, values = of_wandb(workdir)
    assert both_ids == ids == {json.loads((workdir / "wandb.json").read_text())["id"]}
    known = {(name, step): value for name, step, value in values}
    assert len(known) == len(values)  # none twice, as W&B takes nothing back
    assert known == {k: v for k, v in flat(second).items() if k[1] > 6} | flat(first)

    assert {*threading.enumerate()} == before
    children = Path(f"/proc/self/task/{threading.get_native_id()}/children")
    for child in children.read_text().split() if children.exists() else ():
        assert "wandb" not in Path(f"/proc/{child}/cmdline").read_text()


def start(workdir: Path, step: int | None, written: list[dict]) -> tracking.Start:
    return tracking.Start(cheap(), workdir, step, written)


def test_tensorboard_begins_late_with_all_lines_and_anew_with_none(tmp_path):
    known = [
        {"step": 1, "split": "train", "loss": 3.0, "x": None},
        {"step": 2, "split": "train", "loss": 2.0},
        {"step": 2, "split": "test", "loss": 2.5},
    ]
    tensorboard.TensorBoard(start(tmp_path, 2, known)).close()
    expected = {("train/loss", 1): 3.0, ("train/loss", 2): 2.0, ("test/loss", 2): 2.5}
    assert of_tensorboard(tmp_path) == expected
    # Killed before the test was written, which is measured again.
    again = tensorboard.TensorBoard(start(tmp_path, 2, known[:2]))
    again.write(2, "test", {"loss": 2.25, "y": math.inf})
    again.close()
    assert of_tensorboard(tmp_path) == expected | {("test/loss", 2): 2.25}
    tensorboard.TensorBoard(start(tmp_path, None, [])).close()
    assert of_tensorboard(tmp_path) == {}


@pytest.mark.slow
def test_of_several_processes_the_first_alone_writes(tmp_path):
    values = {"method__name": "greedy_exit", "method__projector": "None", "mesh__stages": 2}
    values |= {"steps": 4, "tracking": "tensorboard", "gradient_norms": True}
    ended = [run.wait() for run in test_hosts.start(tmp_path / "run", 2, **values)]
    assert [run.returncode for run in ended] == [0, 0], ended[0].stderr
    written = flat(lines(tmp_path / "run"))
    assert of_tensorboard(tmp_path / "run") == to_float32(written)
    assert not (tmp_path / "unused").exists()
    for step in range(1, 5):
        parts = (written[f"train/block_{i}/gradient_norm", step] for i in (0, 1))
        assert written["train/gradient_norm", step] == pytest.approx(math.hypot(*parts))


@pytest.mark.slow
def test_the_callback_of_the_documents(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (runs.REPOSITORY / "docs" / "tracking.md").read_text()
    [snippet] = re.findall(r"```python\n((?:(?!```).)*callbacks=.*?)```", page, re.S)
    assert len([line for line in snippet.splitlines() if line]) <= 10
    names: dict[str, Any] = {}
    exec(compile(snippet, "snippet", "exec"), names)
    tests = [line["accuracy"] for line in lines(tmp_path / "runs/told") if line["split"] == "test"]
    assert names["best"]["test"] == max(tests)
    assert f"test {max(tests):.1%}" in capsys.readouterr().out


# --- What fails ------------------------------------------------------------------------------


class Failing(Recorder):
    def __init__(self, *when: str):
        super().__init__()
        self._when = when

    def write(self, step, split, values):
        super().write(step, split, values)
        if "write" in self._when:
            raise OSError(28, "full")

    def close(self):
        super().close()
        if "close" in self._when:
            raise ZeroDivisionError


@pytest.fixture
def opened(tmp_path):
    with writers.Writers(MetricsWriter(tmp_path, resume_step=None)) as made:
        yield made


def test_a_writer_of_the_package_that_fails_costs_no_run(opened, tmp_path, caplog):
    failing, sound = Failing("write", "close"), Recorder()
    opened.add("tensorboard", lambda: failing, built_in=True)
    opened.add("wandb", lambda: {}["x"], built_in=True)
    opened.add("mine", lambda: sound)
    for step in (1, 2):
        opened.write(step, "train", {"loss": 1.0})
    opened.close()
    assert len(failing.lines) == failing.closed == 1
    assert len(sound.lines) == len(lines(tmp_path)) == opened.rows == 2
    assert [record.getMessage() for record in caplog.records] == [
        "wandb failed at the start: KeyError: 'x'; the run goes on without it",
        "tensorboard failed at step 1: OSError: [Errno 28] full; the run goes on without it",
    ]


def test_one_of_the_user_ends_the_run_in_one_line(opened, tmp_path):
    others = Recorder(), Recorder()
    opened.add("one", lambda: others[0])
    opened.add("mine", lambda: Failing("write"))
    opened.add("two", lambda: others[1])
    with pytest.raises(tracking.TrackingError) as raised:
        opened.write(7, "train", {"loss": 1.0})
    assert str(raised.value).startswith("mine failed at step 7: OSError: [Errno 28] full (")
    assert "(test_tracking.py, line " in str(raised.value)
    assert isinstance(raised.value.__cause__, OSError)
    assert [len(each.lines) for each in others] == [1, 0]
    assert len(lines(tmp_path)) == 1


def leave(opened: writers.Writers, fails: bool) -> None:
    with opened:
        if fails:
            raise KeyError


def test_all_are_closed_whatever_one_raises(tmp_path, caplog):
    recorder = Recorder()
    for fails in (False, True):
        opened = writers.Writers(MetricsWriter(tmp_path, resume_step=None))
        opened.add("one", lambda: recorder)
        opened.add("two", lambda: Failing("close"))
        opened.add("tensorboard", lambda: Failing("close"), built_in=True)
        with pytest.raises(KeyError if fails else tracking.TrackingError):
            leave(opened, fails)
    assert recorder.closed == 2
    messages = [record.getMessage().partition(" at ")[0] for record in caplog.records]
    assert messages == ["tensorboard failed", "tensorboard failed", "two failed"]


CONFIG = """
import sys
sys.path.insert(0, {tests!r})
import runs
from jdecouple.train import tracking

def halves(start):
    print("begins", start.step, start.workdir.name)
    def write(step, split, values):
        print("half", step, split, values["loss"] / 2)
        1 / (2 - step)
    return write

def get_config():
    tracking.register("halves", halves)
    config = runs.cheap(steps=4, log_every=1)
    config.tracking = "halves"
    return config
"""


def test_a_registered_writer_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(table, "_REGISTERED", {})
    path = tmp_path / "mine.py"
    path.write_text(CONFIG.format(tests=str(Path(runs.TINY).parent)))
    with pytest.raises(SystemExit) as ended:
        command_line.main(["train.py", f"--config={path}", f"--workdir={tmp_path / 'run'}"])
    assert ended.value.code == 1
    out, err = capsys.readouterr()
    assert "begins None run\nhalf 1 train " in out
    said = [line for line in err.splitlines() if not line.startswith("step ")]
    place = f"(mine.py, line {CONFIG.splitlines().index('        1 / (2 - step)') + 1})"
    assert said[-1].endswith(
        f"halves failed at step 2: ZeroDivisionError: division by zero {place}"
    )
    assert "Traceback" not in err


def test_a_missing_package_is_told_before_training(tmp_path, monkeypatch, capsys):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(table.metadata, "distribution", absent)
    for name, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        arguments = [f"--config={runs.TINY}", f"--workdir={tmp_path / 'run'}"]
        with pytest.raises(SystemExit) as ended:
            command_line.main(["train.py", *arguments, f"--config.tracking={name}"])
        assert ended.value.code == 2
        [line] = capsys.readouterr().err.splitlines()
        assert f"config.tracking is '{name}': {name} needs the package {package};" in line
        assert 'pip install "jdecouple[tracking]"' in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("tensorbord", ("'tensorbord'", "tensorboard, wandb", "did you mean 'tensorboard'")),
        (("wandb", 3), ("('wandb', 3)", "are needed")),
        (7, ("7", "are needed")),
    ],
)
def test_names_that_do_not_exist_are_refused(value, words, tmp_path):
    config = cheap()
    config.tracking = value
    with pytest.raises(ConfigError) as refused:
        train_and_evaluate(config, tmp_path / "run")
    for word in ("config.tracking is", *words):
        assert word in str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "factory", "kind"),
    [("wandb", list, ValueError), ("a,b", list, ValueError), ("mine", 3, TypeError)],
)
def test_what_cannot_be_registered(name, factory, kind):
    with pytest.raises(kind):
        tracking.register(name, factory)


def test_what_is_no_callback(opened):
    with pytest.raises(tracking.TrackingError, match="a function of"):
        opened.add("mine", functools.partial(writers._as_writer, 3))


@pytest.mark.parametrize("given", ["online", None])
def test_nothing_is_sent_unless_the_user_s_settings_say_so(given, tmp_path, monkeypatch):
    import wandb

    from jdecouple.train.tracking.weights_and_biases import WeightsAndBiases

    asked: dict[str, Any] = {}

    class Run:
        log = finish = staticmethod(lambda *_, **__: None)

    def init(**options):
        asked.update(options)
        return Run()

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.delenv("WANDB_ERROR_REPORTING")
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    if given:
        monkeypatch.setenv("WANDB_MODE", given)
    (tmp_path / "name").mkdir()
    writer = WeightsAndBiases(start(tmp_path / "name", None, []))
    writer.close()
    assert asked["mode"] == (given or "offline")
    assert (asked["id"], asked["project"], asked["name"]) == ("mine", "theirs", "name")
    assert os.environ.get("WANDB_ERROR_REPORTING") == (None if given else "false")


@pytest.mark.slow
def test_a_run_that_ctrl_c_stops_is_whole_in_wandb(tmp_path):
    """Ctrl-C reaches W&B's process, too."""
    command = ["--config.tracking=wandb", "--config.epochs=2000", "--config.log_every=5"]
    run = subprocess.Popen(
        [
            *("python", str(runs.REPOSITORY / "train.py"), f"--config={runs.TINY}"),
            *(f"--workdir={tmp_path}", *command),
        ],
        env={**runs.environment(), "WANDB_CONFIG_DIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    while not lines(tmp_path):
        assert run.poll() is None, run.stdout.read()
    os.killpg(run.pid, 2)
    out, _ = run.communicate(timeout=100)
    assert run.returncode == 0, out
    assert "the same command continues" in out
    _, values = of_wandb(tmp_path)
    assert {(name, step): value for name, step, value in values} == flat(lines(tmp_path))
