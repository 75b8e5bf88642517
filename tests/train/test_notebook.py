"""What a run shows in a notebook, and how it stops there."""

import base64
import signal
import sys
import types
from pathlib import Path

import nbformat
import pytest
import runs
from nbclient import NotebookClient
from runs import cheap, lines

from jdecouple._errors import OneLine
from jdecouple.checkpoint import Checkpointer, CheckpointError
from jdecouple.train import notebook
from jdecouple.train.config import ConfigError
from jdecouple.train.loop import NonFiniteError, train_and_evaluate
from jdecouple.train.notebook import StoppedError
from jdecouple.trainer import Trainer

SHORT = {"steps": 6, "eval_every": 3, "checkpoint__every": 3, "data__validation": 0.1}


@pytest.fixture
def shown(monkeypatch):
    """A shell such as a notebook's; what is displayed in it."""
    shell, pictures = types.SimpleNamespace(kernel=object()), []
    package = types.SimpleNamespace(get_ipython=lambda: shell)
    display = types.SimpleNamespace(Image=lambda filename: filename, display=pictures.append)
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return pictures


def interrupt(monkeypatch, step, action):
    """Does something once this step has been trained."""
    train_step = Trainer.step

    def interrupted(self, state, batch):
        state, metrics = train_step(self, state, batch)
        if state.step == step:
            action()
        return state, metrics

    monkeypatch.setattr(Trainer, "step", interrupted)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train_and_evaluate(cheap(**SHORT), folder)
    return folder


@pytest.mark.slow
def test_a_bar_and_the_curves(shown, whole, tmp_path, capsys):
    assert train_and_evaluate(cheap(**SHORT), tmp_path)["finished"]
    assert shown == [str(tmp_path / "curves.png")]
    printed = capsys.readouterr()
    assert "100%|" in printed.err
    assert "step 6/6 |" not in printed.err
    assert "last step: " in printed.out
    runs.assert_same_run(tmp_path, whole)


def test_elsewhere_nothing_is_shown(whole, tmp_path, capsys, monkeypatch):
    terminal = types.SimpleNamespace(get_ipython=lambda: object())
    for shell in (None, terminal, types.SimpleNamespace(get_ipython=lambda: None)):
        monkeypatch.setitem(sys.modules, "IPython", shell)
        assert not notebook.is_active()
    train_and_evaluate(cheap(**SHORT), tmp_path)
    printed = capsys.readouterr()
    assert "100%|" not in printed.err
    assert "step 6/6 |" in printed.err


class TestStop:
    def test_saves_and_raises(self, shown, whole, tmp_path, monkeypatch, capsys):
        """The button sends SIGINT."""
        with monkeypatch.context() as patch:
            interrupt(patch, 4, lambda: signal.raise_signal(signal.SIGINT))
            with pytest.raises(StoppedError) as stopped:
                train_and_evaluate(cheap(**SHORT), tmp_path)
        line = "stopped at step 4 of 6 and saved: the run is not finished; run this cell again, "
        assert stopped.value._render_traceback_() == [f"StoppedError: {line}and it continues"]
        assert "test accuracy\n" not in capsys.readouterr().out
        assert shown == [str(tmp_path / "curves.png")]
        assert Checkpointer(tmp_path / "checkpoints", read_only=True).latest_step == 4
        assert train_and_evaluate(cheap(**SHORT), tmp_path)["finished"]
        runs.assert_same_run(tmp_path, whole)

    @pytest.mark.slow
    def test_pressed_twice(self, shown, tmp_path, monkeypatch):
        def twice():
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)

        with monkeypatch.context() as patch:
            interrupt(patch, 4, twice)
            with pytest.raises(StoppedError, match="interrupted at once, without saving"):
                train_and_evaluate(cheap(**SHORT), tmp_path)
        assert Checkpointer(tmp_path / "checkpoints", read_only=True).latest_step == 3
        assert max(line["step"] for line in lines(tmp_path)) == 3
        assert train_and_evaluate(cheap(**SHORT), tmp_path)["finished"]

    def test_elsewhere_it_stays_what_it_is(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "IPython", None)
        interrupt(monkeypatch, 4, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train_and_evaluate(cheap(**SHORT), tmp_path)


@pytest.mark.parametrize("kind", [ConfigError, CheckpointError, NonFiniteError, StoppedError])
def test_errors_are_one_line(kind):
    error = kind("what is wrong\nand more")
    assert isinstance(error, OneLine)
    assert error._render_traceback_() == [f"{kind.__name__}: what is wrong"]


CELLS = (
    """
    import os, signal, sys, threading
    sys.path[:0] = [{tests!r}, {repository!r}]
    import runs
    from jdecouple.train.loop import train_and_evaluate
    """,
    "train_and_evaluate(runs.cheap(seed=-1), {folder!r})",
    "result = train_and_evaluate(runs.cheap(), {folder!r}); print(result['finished'])",
    """
    from jdecouple.trainer import Trainer
    step = Trainer.step
    def press(self, state, batch):
        if state.step == 30:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, state, batch)
    Trainer.step = press
    train_and_evaluate(runs.cheap(epochs=9), {folder!r})
    """,
    "Trainer.step = step; print(train_and_evaluate(runs.cheap(epochs=9), {folder!r})['step'])",
)


@pytest.mark.slow
def test_in_a_kernel(tmp_path, monkeypatch):
    for key, value in runs.environment().items():
        monkeypatch.setenv(key, value)
    places = {"folder": str(tmp_path / "run"), "tests": str(Path(__file__).parents[1])}
    places |= {"repository": str(runs.REPOSITORY)}
    cells = [nbformat.v4.new_code_cell(_dedented(cell).format(**places)) for cell in CELLS]
    book = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(book, timeout=600, kernel_name="python3", allow_errors=True).execute()
    _, wrong, whole, stopped, rest = (cell.outputs for cell in book.cells)
    (error,) = wrong
    assert error.ename == "ConfigError"
    assert error.traceback == [f"ConfigError: {error.evalue}"]
    for outputs in (whole, stopped, rest):
        (picture,) = [output for output in outputs if output.output_type == "display_data"]
        assert base64.b64decode(picture.data["image/png"]).startswith(b"\x89PNG")
        assert "%|" in _text(outputs, "stderr")
    assert "last step: " in _text(whole, "stdout")
    assert stopped[-1].traceback == [f"StoppedError: {stopped[-1].evalue}"]
    assert "stopped at step 31 of 81 and saved" in stopped[-1].evalue
    assert "continuing from step 31 of 81" in _text(rest, "stdout")
    assert _text(rest, "stdout").endswith("81\n")


def _dedented(cell: str) -> str:
    return "\n".join(line[4:] if line.startswith("    ") else line for line in cell.splitlines())


def _text(outputs, name: str) -> str:
    return "".join(output.text for output in outputs if output.get("name") == name)
