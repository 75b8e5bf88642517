"""What a run cannot write is told in one line and costs nothing that was saved."""

import errno
import io
import os
import shlex
import subprocess
import sys

import numpy as np
import pytest
import runs
from runs import arguments, cheap, copy, lines

from jdecouple import _files
from jdecouple.checkpoint import Checkpointer, CheckpointError
from jdecouple.train import cli as command_line
from jdecouple.train import console, metrics
from jdecouple.train.config import ConfigError
from jdecouple.train.loop import train_and_evaluate
from jdecouple.trainer import Trainer


@pytest.fixture(autouse=True)
def _log_as_it_is(monkeypatch):
    monkeypatch.setattr(command_line, "log_in_short", lambda: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of two epochs; copies of it are worked on."""
    folder = tmp_path_factory.mktemp("finished")
    train_and_evaluate(cheap(epochs=2), folder)
    return folder


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def raised(function, *args):
    with pytest.raises(Exception) as caught:
        function(*args)
    return caught.value


def main(*argv):
    command_line.main(["train.py", *argv])


def end_of(capfd, *argv):
    """Exit code of a command line, and its lines on stderr, the last one an error."""
    with pytest.raises(SystemExit) as stopped:
        main(*argv)
    told = capfd.readouterr().err
    assert "Traceback" not in told
    return stopped.value.code, told.splitlines()


# --- Exit codes ----------------------------------------------------------------------------------


def bad_place():
    with command_line.configuration.one_line():
        _files.replace(runs.REPOSITORY, lambda temporary: None)


def full_disk_at_the_start():
    with command_line.configuration.one_line(), _files.naming(runs.REPOSITORY):
        full()


def full_disk_for_checkpoints(folder):
    with command_line.configuration.one_line():
        Checkpointer(folder)


def test_the_exit_code_tells_bad_input_from_a_full_disk(tmp_path, monkeypatch):
    assert command_line.ending(raised(bad_place))[1] == 2
    line, code = command_line.ending(raised(full_disk_at_the_start))
    assert (line, code) == (f"cannot write {runs.REPOSITORY}: No space left on device", 1)
    assert command_line.ending(CheckpointError("checkpoint 4 could not"))[1] == 1
    monkeypatch.setattr("tempfile.TemporaryFile", full)
    error = raised(full_disk_for_checkpoints, tmp_path)
    assert isinstance(error, ConfigError)
    assert command_line.ending(error)[1] == 1


@pytest.mark.parametrize(
    ("workdir", "said"),
    [
        ("gs://bucket/run", "needs the package gcsfs: pip install gcsfs"),
        ("any+one://x", "is no folder: one of this machine, or gs://, s3://, az:// is needed"),
        ("s3:/", "names no bucket: s3://BUCKET/FOLDER is needed"),
    ],
)
def test_a_workdir_that_is_no_folder(capfd, tmp_path, monkeypatch, workdir, said):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.chdir(tmp_path)
    code, told = end_of(capfd, *arguments(workdir))
    assert code == 2
    (line,) = told
    assert line.startswith(f"error: '{workdir}")
    assert line.endswith(said)
    assert os.listdir(tmp_path) == []


def test_home_is_expanded(finished, tmp_path, monkeypatch, capfd):
    copy(finished, tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert train_and_evaluate(cheap(epochs=2), "~/copy")["finished"]
    assert f"checkpoints: {tmp_path}/copy/checkpoints" in capfd.readouterr().out


# --- A full disk ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_a_folder_in_the_place_of_a_file(capfd, finished, tmp_path, name):
    folder = copy(finished, tmp_path)
    before = runs.fingerprint(folder / "checkpoints")
    (folder / name).unlink()
    (folder / name).mkdir()
    error = raised(train_and_evaluate, cheap(epochs=2), folder)
    assert str(error) == f"cannot write {folder / name}: Is a directory"
    assert command_line.ending(error)[1] == 2
    assert runs.fingerprint(folder / "checkpoints") == before


def test_metrics_on_a_full_disk(capfd, tmp_path, monkeypatch):
    device = "/dev/full"
    monkeypatch.setattr(metrics.os, "fdopen", lambda *_, **__: open(device, "wb", buffering=0))  # noqa: SIM115
    code, told = end_of(capfd, *arguments(tmp_path, method__name="bp", method__projector="None"))
    assert code == 1
    assert told == [f"error: cannot write {tmp_path / 'metrics.jsonl'}: No space left on device"]


def test_a_half_written_line_is_left_out(tmp_path):
    """A disk that fills up takes a part of the last line."""
    with metrics.MetricsWriter(tmp_path, resume_step=None) as writer:
        writer.write(1, "train", {"loss": 0.5})
        file, writer._file = writer._file, HalfFull()
        with pytest.raises(OSError, match=r"metrics.jsonl: No space left"):
            writer.write(2, "train", {"loss": 0.25})
        file.write(writer._file.written)
        file.close()
    assert [line["step"] for line in metrics.read_metrics(tmp_path)] == [1]
    with metrics.MetricsWriter(tmp_path, resume_step=2) as writer:
        writer.write(2, "train", {"loss": 0.25})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


class HalfFull:
    """A file that takes ten bytes more."""

    written = b""

    def write(self, data):
        if self.written:
            full()
        self.written = bytes(data[:10])
        return len(self.written)

    def close(self):
        pass


def test_damaged_lines_are_told_of_and_left_out(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(metrics.logging, "warning", lambda text, *args: told.append(text % args))
    good = [b'{"step": 1, "split": "train"}\n', b'{"step": 2, "split": "test"}\r\n']
    bad = [
        b'{"step": 1, "split": "caf\xe9"}\n',
        b"\xff\xfe\n",
        b"[" * 100_000 + b"\n",
        b'{"step": "1", "split": "train"}\n',
        b'{"step": null, "split": "train"}\n',
        b'{"step": 1, "split": "bogus"}\n',
        b"7\n",
        b"\0\0\0\n",
    ]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join([good[0], *bad, good[1], b'{"step": 2, "s']))
    assert [line["step"] for line in metrics.read_metrics(tmp_path)] == [1, 2]
    metrics.MetricsWriter(tmp_path, resume_step=2).close()
    assert told == ["metrics.jsonl: left out line 2, 3, 4, 5, 6, 7, 8, 9"]
    kept = b'{"step": 1, "split": "train"}\n{"step": 2, "split": "test"}\n'
    assert (tmp_path / "metrics.jsonl").read_bytes() == kept


def test_metrics_do_not_follow_a_link(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to(tmp_path / "precious")
    with metrics.MetricsWriter(tmp_path / "run", resume_step=None) as writer:
        writer.write(1, "train", {})
    assert (tmp_path / "precious").read_text() == "precious"
    assert len(lines(tmp_path / "run")) == 1


# --- The evaluation comes after the save ---------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("calls", [0, 1])
def test_an_evaluation_that_fails_costs_no_step(finished, tmp_path, monkeypatch, calls):
    """The run goes on with it, and ends as one in which nothing has failed."""
    evaluate = Trainer.evaluate
    split = ["validation", "test"][calls]

    def broken(trainer, state, batches):
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise ValueError(f"split {split!r}: example 3 cannot be read")
        return evaluate(trainer, state, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", broken)
        for _ in range(2):  # and again at the restart, at once
            with pytest.raises(ConfigError, match=f"split '{split}': example 3 cannot be read"):
                train_and_evaluate(cheap(epochs=2), tmp_path)
            saved = Checkpointer(tmp_path / "checkpoints", read_only=True)
            assert saved.latest_step == 9
            assert saved.best_step is None
            calls = 0
            split = "validation"
    assert train_and_evaluate(cheap(epochs=2), tmp_path)["finished"]
    runs.assert_same_run(tmp_path, finished)
    saved, wanted = (
        Checkpointer(folder / "checkpoints", read_only=True) for folder in (tmp_path, finished)
    )
    assert saved.best_step == wanted.best_step
    assert saved.extras() == wanted.extras()


# --- Pictures ------------------------------------------------------------------------------------


def test_neither_a_picture_nor_a_lost_console_costs_the_results(
    finished, tmp_path, monkeypatch, caplog
):
    folder = copy(finished, tmp_path)
    (folder / "curves.png").unlink()
    (folder / "curves.png").mkdir()
    reader, writer = os.pipe()
    os.close(reader)
    streams = os.fdopen(writer, "w"), open("/dev/full", "w")  # noqa: SIM115
    for name, stream in zip(("stdout", "stderr"), streams, strict=True):
        monkeypatch.setattr(sys, name, stream)
    values = {"method__name": "bp", "method__projector": "None", "optimizer__name": "sgd"}
    main(*arguments(folder, **values, epochs=2, mesh__stages=1))
    assert (sys.stdout, sys.stderr) == streams
    for stream in streams:
        stream.close()  # as Python does when it ends: nothing is left to fail with
    assert f"no curves.png: cannot write {folder / 'curves.png'}: Is a directory" in caplog.messages


def test_the_table_is_shown_without_the_picture(finished, tmp_path, capsys, monkeypatch, drawn):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    folder = copy(finished, tmp_path)
    result = train_and_evaluate(cheap(epochs=2), folder)
    assert np.isfinite(result["test"]["loss"])
    out = capsys.readouterr().out
    assert "last step: " in out
    assert "curves:" not in out


# --- The console ---------------------------------------------------------------------------------


def test_letters_that_the_console_lacks_are_shown_otherwise(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    with console.lasting():
        print("caf\xe9 \udce9 猫")
    assert stream.buffer.getvalue() == b"caf\\xe9 \\udce9 \\u732b\n"


def test_without_a_stdout_nothing_is_printed(monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with console.lasting():
        assert not sys.stderr.isatty()
        print("out")
        print("error", file=sys.stderr)
    assert sys.stdout is None
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "streams", "code"),
    [
        (4, "2>/dev/null | head -0", 0),
        (4, ">&- 2>&- <&-", 0),
        (4, ">/dev/full 2>/dev/full", 0),
        (0, "2>&1 | head -0", 2),
        (0, ">&- 2>&-", 2),
    ],
)
def test_a_lost_console_does_not_change_the_exit_code(tmp_path, steps, streams, code):
    values = {"method__name": "bp", "method__projector": "None", "steps": steps}
    words = [sys.executable, "train.py", *arguments(tmp_path, **values)]
    script = f"{shlex.join(words)} {streams}; exit ${{PIPESTATUS[0]}}"
    shell = ["bash", "-c", script]
    assert subprocess.run(shell, cwd=runs.REPOSITORY, env=runs.environment()).returncode == code
    assert (tmp_path / "curves.png").is_file() == (code == 0)
