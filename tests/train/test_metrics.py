"""Metrics: the file survives kills and resumes, and the console stays plain."""

import io
import json
import os
import re

import numpy as np
import pytest

from jdecouple import _files
from jdecouple.train import metrics
from jdecouple.train.metrics import MetricsWriter, Progress, read_metrics


def write_run(workdir, blocks=4, steps=40, test=True):
    with MetricsWriter(workdir, resume_step=None) as writer:
        for step in range(1, steps + 1):
            train = {f"block_{i}/loss": (i + 1) / step for i in range(blocks)}
            train |= {f"block_{i}/variance": 0.5 for i in range(blocks)}
            writer.write(step, "train", {"loss": 10 / step, "accuracy": 1 - 1 / step, **train})
            if step % 10 == 0:
                exits = {f"exit_{i}/accuracy": 1 - (i + 1) / (4 * step) for i in range(blocks)}
                writer.write(step, "validation", {"loss": 1.0, "accuracy": 0.123, **exits})
        if test:
            writer.write(steps, "test", {"loss": 1.0, "accuracy": 0.0123, **exits})
    return workdir / "metrics.jsonl"


def test_lines_are_plain_json_with_plain_floats(tmp_path):
    with MetricsWriter(tmp_path / "new", resume_step=None) as writer:
        writer.write(np.int64(3), "train", {"loss": np.float32(0.5), "accuracy": np.array(1)})
        writer.write(3, "test", {"loss": float("nan"), "a": float("inf"), "b": -np.inf})
        text = (tmp_path / "new" / "metrics.jsonl").read_text()
    assert text == (
        '{"step": 3, "split": "train", "loss": 0.5, "accuracy": 1.0}\n'
        '{"step": 3, "split": "test", "loss": null, "a": null, "b": null}\n'
    )
    assert read_metrics(tmp_path / "new") == [json.loads(line) for line in text.splitlines()]


def test_each_line_is_on_disk_at_once(tmp_path):
    writer = MetricsWriter(tmp_path, resume_step=None)
    for step in range(3):
        writer.write(step, "train", {"loss": 1})
        assert len(read_metrics(tmp_path)) == step + 1
    writer.close()
    writer.close()


@pytest.mark.parametrize(
    ("split", "values", "message"),
    [
        ("dev", {"loss": 1.0}, "split is 'dev': allowed are train, validation, test"),
        ("train", {"step": 1.0}, "a metric may not be named step"),
        ("train", {"split": 1.0}, "a metric may not be named split"),
    ],
)
def test_bad_lines_are_not_written(tmp_path, split, values, message):
    with MetricsWriter(tmp_path, resume_step=None) as writer, pytest.raises(ValueError) as error:
        writer.write(1, split, values)
    assert str(error.value) == message
    assert read_metrics(tmp_path) == []


def test_resume_drops_later_lines_and_keeps_the_rest_byte_for_byte(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = (
        b'{"step":1,  "split": "train", "loss": 1.50}\n{"split": "test", "step": 2, "loss": null}\n'
    )
    dropped = b'{"step": 3, "split": "train", "loss": 1.0}\n'
    path.write_bytes(kept + dropped + b'{"step": 2, "split": "tr')
    with MetricsWriter(tmp_path, resume_step=2) as writer:
        assert path.read_bytes() == kept
        writer.write(3, "train", {"loss": 2.0})
    assert path.read_bytes() == kept + b'{"step": 3, "split": "train", "loss": 2.0}\n'
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize("resume_step", [None, 0, 1000])
def test_resume_of_missing_or_short_file(tmp_path, resume_step):
    MetricsWriter(tmp_path, resume_step=resume_step).close()
    assert read_metrics(tmp_path) == []
    write_run(tmp_path, steps=10)
    MetricsWriter(tmp_path, resume_step=resume_step).close()
    assert len(read_metrics(tmp_path)) == (12 if resume_step == 1000 else 0)


def test_killed_rewrite_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_run(tmp_path)
    before = path.read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(_files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricsWriter(tmp_path, resume_step=5)
    assert path.read_bytes() == before


@pytest.mark.parametrize("size", [1, 20, 43])
def test_reading_tolerates_a_half_written_last_line(tmp_path, size):
    whole = '{"step": 1, "split": "train", "loss": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_text(whole + whole[:size])
    assert len(read_metrics(tmp_path)) == (2 if size == 43 else 1)


def test_reading_nothing(tmp_path):
    assert read_metrics(tmp_path) == []


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    return now


def run_progress(clock, **kwargs):
    progress = Progress(100, 10, 32, **kwargs)
    for step, seconds in [(20, 500.0), (30, 505.0), (40, 510.0)]:
        clock[0] = seconds
        progress.update(step, {"epoch": 2, "loss": np.float32(0.25), "accuracy": 0.5})
        progress.update(step, {})
    progress.print("evaluated")
    progress.close()
    progress.close()


def test_plain_lines_off_a_terminal(clock, capsys):
    run_progress(clock)
    out, err = capsys.readouterr()
    assert err == (
        "step 20/100 | epoch 2 | loss 0.25 | accuracy 0.5\n"
        "step 30/100 | 64 examples/s | 00:35 left | epoch 2 | loss 0.25 | accuracy 0.5\n"
        "step 40/100 | 64 examples/s | 00:30 left | epoch 2 | loss 0.25 | accuracy 0.5\n"
    )
    assert out == "evaluated\n"


def test_bar_on_a_terminal(clock, monkeypatch, capsys):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    run_progress(clock)
    _, *shown, last = re.split(r"[\r\n]", terminal.getvalue().rstrip())
    assert [line.endswith("10/100, compiling") for line in shown].count(True) == 1
    assert "compiling" not in last
    assert last.startswith(" 40%|")
    assert last.endswith("40/100, 64 examples/s, 00:30 left, epoch 2, loss 0.25, accuracy 0.5")
    assert capsys.readouterr().out == "evaluated\n"


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_other_processes_print_nothing(clock, monkeypatch, capsys, stream):
    stderr = stream()
    monkeypatch.setattr("sys.stderr", stderr)
    run_progress(clock, enabled=False)
    assert stderr.getvalue() == ""
    assert capsys.readouterr().out == ""
