"""The command line as it is given, and train.py as a program."""

import json
import subprocess
import sys

import pytest
import runs
from runs import TINY, arguments, finished

from jdecouple.train import cli as command_line


@pytest.fixture(autouse=True)
def log_as_it_is(monkeypatch):
    """Other tests of this process read the log as it is by default."""
    monkeypatch.setattr(command_line, "log_in_short", lambda: None)


def test_overrides_in_any_order_and_form(tmp_path):
    rest = ["--config.seed", "3", "--config.data.download", "--config.boundaries=(0,1)"]
    config, workdir = command_line.parse(
        ["train.py", *rest, "--config.batch_size=4", f"--config={TINY}", "--workdir", "w"]
    )
    assert workdir == "w"
    assert (config.seed, config.batch_size, config.boundaries) == (3, 4, (0, 1))
    assert config.data.download is True
    assert (config.model.hidden, config.steps) == (16, None)


def test_config_file_may_return_a_plain_dict(tmp_path):
    file = tmp_path / "given.py"
    file.write_text("def get_config(name):\n  return {'method': {'name': name}}")
    config, _ = command_line.parse(["train.py", "--config", f"{file}:bp", "--workdir", "w"])
    assert (config.method.name, config.batch_size) == ("bp", 128)


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["train.py", "--help"])
    assert not stopped.value.code
    text = capsys.readouterr().out
    assert "--config FILE[:ARGUMENT] --workdir FOLDER" in text
    assert "label_noise: 0.0" in text


def test_ctrl_c_before_training(monkeypatch, capsys, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("jdecouple.train.loop.train_and_evaluate", interrupted)
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["train.py", *arguments(tmp_path)])
    assert stopped.value.code == 130
    assert capsys.readouterr().err.startswith("error: interrupted")


def test_no_library_says_anything():
    run = runs.server().run(*arguments("/dev/null/x"))
    assert run.returncode == 2
    assert run.stderr == "error: workdir '/dev/null/x': Not a directory\n"


def python(*argv, cwd=runs.REPOSITORY):
    return subprocess.run(
        [sys.executable, *argv],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=runs.environment(),
        timeout=runs.SECONDS,
        check=False,
    )


def test_train_py(tmp_path):
    done = python("train.py", *arguments(tmp_path / "new" / "folder"))
    assert done.returncode == 0, done.stderr
    assert "last step" in done.stdout
    # Progress, and nothing that a library says.
    assert all(line.startswith("step ") for line in done.stderr.splitlines())
    config = json.loads((tmp_path / "new" / "folder" / "config.json").read_text())
    assert config["config"]["model"]["hidden"] == 16
    assert runs.final_arrays(tmp_path / "new" / "folder")[0] == 27


@pytest.mark.slow
def test_train_py_trains_as_a_fork_does(tmp_path):
    done = python("train.py", *arguments(tmp_path))
    assert done.returncode == 0, done.stderr
    runs.assert_same_run(tmp_path, finished())


@pytest.mark.slow
def test_train_py_with_bad_input(tmp_path):
    done = python("train.py", *arguments(tmp_path / "new", model__name="resnet999"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: config.model.name is 'resnet999'")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_second_run_compiles_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    counts = []
    for number in range(2):
        done = python("train.py", *runs.arguments(tmp_path / str(number)))
        assert done.returncode == 0, done.stderr
        counts.append(len(list((tmp_path / "cache/jdecouple/xla").glob("*-cache"))))
    assert 0 < counts[0] == counts[1]
    runs.assert_same_run(tmp_path / "0", tmp_path / "1")
