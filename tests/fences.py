"""The fences of a page, and how each is executed in this process.

- ```python stands alone. Where its first line is "# NAME.py" it is written into that file as well.
- ```py is a part: it goes on where the fences before it on its page have ended.
- ```sh are commands: those of jdecouple run; see `Shell`.
- A line `<!-- not run: REASON -->` above a fence says why it cannot be executed.
"""

import contextlib
import importlib
import io
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import runs
import text_sets
from PIL import Image

from jdecouple.train import cli, commands, config, launch, loop, lr_finder, programs

ROOT = Path(__file__).resolve().parents[1]
CODE = ("python", "py", "sh")
NO_CODE = ("", "text", "grid", "diff", "yaml")
SET_UP = ("python3 -m venv ", ". ", "pip install ", "pre-commit install", "export ")
"""Commands that are not executed: CI makes an environment in the same way, by `.ci/run`."""

_FENCE = re.compile(r"(?:^<!-- not run: (.*?) -->\n)?^```(\w*)([^\n]*)\n(.*?)^```$", re.M | re.S)


class Fence(NamedTuple):
    """A fence; `reason` says why it is not executed."""

    language: str
    arguments: str
    text: str
    reason: str


def fences(page: Path) -> list[Fence]:
    found = _FENCE.findall(page.read_text())
    return [Fence(language, rest.strip(), text, why) for why, language, rest, text in found]


def run(snippet: str, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Executes Python; gives the names that it leaves."""
    names = {"__name__": __name__} if names is None else names  # dataclasses look for their module
    exec(compile(snippet, "snippet", "exec"), names)
    return names


def commands_of(text: str) -> Iterator[list[str]]:
    """The simple commands of a script, in order; a redirection stays with its command."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*map(os.path.expandvars, lexer), ";"]:
            if word in ("&&", ";", "&"):
                if command:
                    yield command
                command = []
            else:
                command.append(word)


class Shell:
    """Runs commands in a folder in which `configs` and `bench` lie.

    Args:
        monkeypatch: of the test.
        deep: train and predict; else a training ends when its configuration has been checked, and
            what needs a workdir when its arguments have.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, deep: bool):
        self._patch, self._deep = monkeypatch, deep
        for folder in ("configs", "bench", "tests"):
            Path(folder).symlink_to(ROOT / folder)
        monkeypatch.syspath_prepend(str(ROOT / "bench"))
        monkeypatch.setattr(cli, "log_in_short", lambda: None)
        monkeypatch.setattr(programs, "keep", lambda: None)

    def __call__(self, command: list[str]) -> None:
        words = " ".join(command)
        if words.startswith(SET_UP):
            return
        if words.startswith("python -m pytest"):
            given = [word for word in command[3:] if word.startswith("tests")]
            assert all(Path(word).exists() for word in given), words
        elif words.startswith("python bench/"):
            self._bench(command)
        elif words.startswith("python train.py "):
            self._train(cli.main, command[1:])
        elif command[:2] == ["jdecouple", "launch"]:  # trained as one process
            given = launch.parse(command[2:])
            assert launch.program(given.command)
            assert given.command[0] == "train"
            self(["jdecouple", *given.command])
        elif command[0] == "jdecouple":
            run = self._train if command[1] in ("train", "find_lr") else self._use
            run(commands.main, command)
        else:
            raise AssertionError(f"no way is known to run {words!r}: mark its fence as not run")

    def _bench(self, command: list[str]) -> None:
        """All that is checked before the first training, which step_time.py shares."""
        assert command[1] in ("bench/accuracy.py", "bench/step_time.py")
        accuracy, matrix = map(importlib.import_module, ("accuracy", "matrix"))
        cells = accuracy.cells_of(accuracy.parser().parse_args(command[2:]))
        assert not matrix.is_finished(cells[-1])  # of which the configuration is then checked

    def _train(self, main: Any, command: list[str]) -> None:
        with self._patch.context() as patch:
            if not self._deep or not any(name in " ".join(command) for name in _AT_HAND):
                patch.setattr(loop, "train_and_evaluate", lambda config_, *_: _checked(config_))
                patch.setattr(lr_finder, "find_lr", lambda config_, *_, **__: _checked(config_))
            elif command[1] != "find_lr":
                words = " ".join(command)
                command = [*command, *(flag for name, flag in _SMALLER.items() if name in words)]
            main(command)

    def _use(self, main: Any, command: list[str]) -> None:
        if command[1] in ("list", "plan"):
            main(command)
            return
        given = io.StringIO()
        if "<" in command:
            where = command.index("<")
            command, given = command[:where], io.StringIO("a good film\n")
        workdir = Path(command[2])
        if not self._deep:
            with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit):
                main(command)
            assert f"there is no run in {str(workdir)!r}" in said.getvalue(), said.getvalue()
            return
        for name in (word for word in command if word.startswith("runs/")):
            if not Path(name).exists():
                _train_one_like(Path(name))
        _inputs()
        self._patch.setattr(sys, "stdin", given)
        main(command)


_SMALLER = {
    "quickstart": "--config.epochs=1",
    "digits,mlp,deinforeg": "--config.method.projector=32-32",
}
_AT_HAND = ("quickstart", "digits", "mine.py")


def _checked(settings: Any) -> None:
    assert config.validate(settings)


def _train_one_like(workdir: Path) -> None:
    """A workdir that a page takes for granted."""
    if workdir.name == "sst2":
        settings = text_sets.tiny(text_sets.csv_set(Path("texts").absolute()))
        loop.train_and_evaluate(settings, workdir)
    else:
        trained = Path("runs/quickstart")
        shutil.copytree(trained if trained.exists() else runs.finished_here(), workdir)


def _inputs() -> None:
    """Images under the names that the pages give them."""
    image = Image.fromarray(np.zeros((8, 8), np.uint8))
    for folder in ("photos", "IMAGES..."):
        Path(folder).mkdir(exist_ok=True)
        image.save(Path(folder) / "one.png")
    image.save("more.png")
    Path("list.csv").write_text("path\nmore.png\n")
