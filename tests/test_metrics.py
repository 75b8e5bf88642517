"""Metrics: the file survives kills and resumes, the curves show it, the console stays plain."""

import io
import json
import os
import re

import matplotlib.image
import numpy as np
import pytest

from jdecouple.train import metrics
from jdecouple.train.metrics import MetricsWriter, Progress, plot_curves, read_metrics


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

    monkeypatch.setattr(metrics.os, "replace", killed)
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


def axes_of(monkeypatch, workdir, **kwargs):
    """The axes of the figure that `plot_curves` saves."""
    from matplotlib.figure import Figure

    figures = []
    savefig = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k))
    )
    path = plot_curves(workdir, **kwargs)
    return path, figures[0], figures[0].axes


@pytest.mark.parametrize(("blocks", "steps"), [(4, 40), (1, 10), (16, 10)])
def test_curves_show_every_block_and_exit(tmp_path, monkeypatch, blocks, steps):
    write_run(tmp_path, blocks, steps)
    path, figure, (losses, accuracies) = axes_of(monkeypatch, tmp_path, title="a run")
    assert path == tmp_path / "curves.png"
    image = matplotlib.image.imread(path)
    assert image.shape[:2] == (540, 1320)
    assert image[..., :3].std() > 0.05
    assert figure.get_suptitle() == "a run"
    assert [axes.get_xlabel() for axes in (losses, accuracies)] == ["step", "step"]
    assert (losses.get_ylabel(), accuracies.get_ylabel()) == ("training loss", "accuracy")
    legend = [text.get_text() for text in losses.get_legend().get_texts()]
    assert legend == [f"block {i}" for i in range(blocks)]
    legend = [text.get_text() for text in accuracies.get_legend().get_texts()]
    assert sorted(legend) == sorted(
        [f"exit {i}" for i in range(blocks)] + ["final", "train", "validation", "test"]
    )
    assert len(accuracies.lines) == 2 * (blocks + 1) + 1
    for i, line in enumerate(losses.lines):
        np.testing.assert_allclose(line.get_ydata(), (i + 1) / np.arange(1, steps + 1))


def test_curves_without_blocks_or_exits(tmp_path, monkeypatch):
    with MetricsWriter(tmp_path, resume_step=None) as writer:
        writer.write(1, "train", {"loss": float("nan"), "accuracy": 0.5})
        writer.write(2, "train", {"loss": 1.0})
    _, _, (losses, accuracies) = axes_of(monkeypatch, tmp_path)
    assert [line.get_label() for line in losses.lines] == ["loss"]
    np.testing.assert_array_equal(losses.lines[0].get_ydata(), [np.nan, 1.0])
    assert [line.get_label() for line in accuracies.lines] == ["final"]


def test_losses_of_many_decades_get_a_logarithmic_axis(tmp_path, monkeypatch):
    write_run(tmp_path, steps=200, test=False)
    assert axes_of(monkeypatch, tmp_path)[2][0].get_yscale() == "log"


def test_curves_of_an_empty_run_go_where_told(tmp_path):
    path = plot_curves(tmp_path, tmp_path / "other.png")
    assert path == tmp_path / "other.png"
    assert os.listdir(tmp_path) == ["other.png"]


def test_curves_leave_pyplot_alone(tmp_path):
    import sys

    write_run(tmp_path)
    sys.modules.pop("matplotlib.pyplot", None)
    plot_curves(tmp_path)
    assert "matplotlib.pyplot" not in sys.modules


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
    last = re.split(r"[\r\n]", terminal.getvalue().rstrip())[-1]
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
