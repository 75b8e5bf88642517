"""The learning-rate finder: its curves, what it suggests and what it leaves alone."""

import re
import subprocess
import sys

import numpy as np
import pytest
import runs
from runs import REPOSITORY, cheap

from jdecouple.train import cli as command_line
from jdecouple.train import commands, lr_finder, programs
from jdecouple.train.config import ConfigError
from jdecouple.train.lr_finder import Curve, find_lr

RATES = np.geomspace(1e-4, 1.0, 41)


def test_what_a_curve_suggests():
    """A loss that falls fastest at 1e-3 and is lowest at 1e-1."""
    logs = np.log10(RATES)
    losses = 2 - np.tanh(2 * (logs + 3)) + np.where(logs > -1, 4 * (logs + 1), -0.01 * (logs + 1))
    curve = Curve(RATES, losses)
    assert curve.problem is None
    assert curve.steepest == pytest.approx(1e-3, rel=0.3)
    assert curve.before_lowest == pytest.approx(1e-2, rel=0.3)


@pytest.mark.parametrize(
    ("losses", "problem"),
    [
        (np.linspace(1, 2, 41), "does not fall"),
        (np.cos(3 * np.arange(41)) + 5, "does not fall"),
        (np.linspace(2, 1, 41), "falls to the end"),
    ],
)
def test_a_loss_that_tells_nothing_suggests_nothing(losses, problem, tmp_path, capsys):
    assert Curve(RATES, losses).problem == problem
    lr_finder._print({"loss": Curve(RATES, losses)}, 41, tmp_path)
    assert f"suggested: nothing, the loss {problem}; try" in capsys.readouterr().out


def test_a_loss_that_the_first_step_has_spoilt_suggests_nothing():
    """It comes down again, but never to where it began."""
    losses = 10 + np.abs(np.log10(RATES) + 2)
    assert Curve(RATES, losses, start=12.0).problem is None
    assert Curve(RATES, losses, start=2.3).problem == "does not fall"


def test_a_range_ends_where_it_diverges():
    assert not lr_finder._diverges([])
    assert lr_finder._diverges([1.0, float("nan")])
    falling = list(np.linspace(2.3, 0.1, 20))
    assert not lr_finder._diverges(falling)
    assert not lr_finder._diverges([*falling, 3.0])  # an outlier
    assert not lr_finder._diverges([*falling, *5 * [1.5]])  # no higher than it was
    assert lr_finder._diverges([*falling, *5 * [4.0]])


def test_it_trains_and_touches_nothing_but_its_picture(tmp_path, capsys, drawn):
    """Blocks have losses of their own; the schedule of the configuration is not used."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "kept").write_text("as it was")
    (tmp_path / "metrics.jsonl").write_text("as it was")
    curves = find_lr(cheap(method__name="greedy_exit", ema=0.9), tmp_path, high=1e6, steps=40)
    assert list(curves) == ["loss", "block 0", "block 1"]
    count = len(curves["loss"].rates)
    assert 10 < count < 40  # it diverges long before the end
    np.testing.assert_allclose(curves["loss"].rates, np.geomspace(1e-6, 1e6, 40)[:count])
    for curve in curves.values():
        assert curve.losses.shape == (count,)
        assert np.isfinite(curve.losses).all()
    starts = [curve.start for curve in curves.values()]
    assert starts[0] == pytest.approx(sum(starts[1:]))
    assert min(curves["loss"].losses) < starts[0]
    assert (tmp_path / "lr_finder.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert (tmp_path / "checkpoints" / "kept").read_text() == "as it was"
    assert (tmp_path / "metrics.jsonl").read_text() == "as it was"
    assert len(list(tmp_path.iterdir())) == 3
    printed = capsys.readouterr().out
    assert ", where it diverges" in printed
    assert "block 1" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [
        {"method__name": "fdg", "num_stages": 2},
        {"method__name": "adl", "num_stages": 2},
        {"accumulate": 2, "microbatches": 2},
    ],
)
def test_other_routes(values, tmp_path):
    """One row a step of the optimiser; the batches that are on their way count for none."""
    curves = find_lr(cheap(**values), tmp_path, high=1e-2, steps=12)
    assert list(curves) == ["loss"]
    assert len(curves["loss"].rates) == 12


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"low": 0.0}, "low is 0.0: a finite number above 0 is needed"),
        ({"low": 1.0, "high": 0.5}, "high is 0.5: more than low, 1.0, is needed"),
        ({"steps": 3}, "steps is 3: a whole number of at least 10 is needed"),
    ],
)
def test_bad_ranges(given, message, tmp_path):
    with pytest.raises(ConfigError) as caught:
        find_lr(cheap(), tmp_path, **given)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--low=much", "argument --low: invalid float value: 'much'"),
        ("--config.batch_size=0", "batch_size is 0"),
        ("--fast", "unknown flag --fast"),
        ("--step=20", "[--low X] [--high X] [--steps N] [--nocache] "),
        ("--step=20", "; did you mean '--steps'?"),
    ],
)
def test_bad_command_lines(argument, message, tmp_path, capsys, monkeypatch):
    kept = []
    monkeypatch.setattr(command_line, "log_in_short", lambda: None)
    monkeypatch.setattr(programs, "keep", lambda: kept.append("in the folder of the user"))
    with pytest.raises(SystemExit) as caught:
        commands.main(["jdecouple", "find_lr", *runs.arguments(tmp_path), *argument.split()])
    assert caught.value.code == 2
    assert bool(kept) == ("--nocache" not in argument)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.slow
def test_the_quickstart(tmp_path):
    """A process of its own, as a user has it."""
    config = str(REPOSITORY / "configs" / "quickstart.py")
    done = subprocess.run(
        [sys.executable, "-m", "jdecouple", "find_lr", "--config", config, "--workdir", tmp_path],
        env=runs.environment(),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    [rate] = re.findall(r"^suggested: --config.optimizer.learning_rate=(\S+)$", done.stdout, re.M)
    assert 1e-3 <= float(rate) <= 1e-2
    assert done.stdout.count("block ") == 3
    assert {path.name for path in tmp_path.iterdir()} == {"lr_finder.png"}
