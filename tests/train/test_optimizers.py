"""Optimisers, averages and accumulation in a run: from a configuration to its checkpoints."""

import json
import shutil
import sys

import numpy as np
import pytest
import runs
from runs import cheap

import jdecouple as jd
from jdecouple.train import cli as command_line
from jdecouple.train import commands, programs
from jdecouple.train.config import ConfigError, filled
from jdecouple.train.evaluation import dataset_of
from jdecouple.train.loop import build, train_and_evaluate
from jdecouple.train.parts import prepare

SHORT = {"steps": 6, "eval_every": 3, "checkpoint__every": 3, "data__validation": 0.1}
MODULE = '''
import jax
import optax

def scaled(schedule, rho, wide: bool = False):
    """A learning rate of another name, and an option without a default."""
    return optax.scale_by_learning_rate(lambda count: rho * schedule(count))

def nothing(learning_rate):
    return None
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Path of a module that can be imported."""
    path = tmp_path / "modules" / "my_optimizers.py"
    path.parent.mkdir()
    path.write_text(MODULE)
    monkeypatch.syspath_prepend(path.parent)
    yield path
    sys.modules.pop(path.stem, None)


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch):
    monkeypatch.setattr(command_line, "log_in_short", lambda: None)
    monkeypatch.setattr(programs, "keep", lambda: None)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"corrector__name": "look_ahead", "method__name": "bp"},
            "name is 'look_ahead': by method 'bp' no gradient is late; leave it at 'none'",
        ),
        (
            {"corrector__name": "lookahead", "method__name": "fdg"},
            "name is 'lookahead': allowed are none, weight_prediction, look_ahead, "
            "spike_compensation, error_feedback, rate_scaling; did you mean 'look_ahead'?",
        ),
        (
            {"corrector__name": "spike_compensation", "method__name": "fdg"},
            "name is 'spike_compensation', which makes up for momentum: optimizer "
            "'sgd' has none; set that of sgd",
        ),
        (
            {"corrector": {"name": "weight_prediction", "horizon": 0.0}, "method__name": "fdg"},
            "horizon is 0.0: a finite number above 0 is needed",
        ),
        (
            {"corrector": {"name": "rate_scaling", "horizon": 2.0}, "method__name": "fdg"},
            "horizon is set, but corrector 'rate_scaling' takes only: power, steps",
        ),
    ],
)
def test_correctors_that_cannot_be_had(keys, message):
    config = cheap(**SHORT).to_dict()
    for key, value in keys.items():
        section, _, last = key.partition("__")
        config[section] = {last: value} if last else value
    with pytest.raises(ConfigError) as error:
        prepare(config)
    assert str(error.value) == f"config.corrector.{message}"


@pytest.mark.slow
def test_a_run_with_a_corrector_continues_to_the_bit_and_with_no_other(tmp_path):
    """Its momentum is the optimizer's."""
    values = {"method__name": "fdg", "model__depth": 2, "num_stages": 2, **SHORT}
    values |= {"optimizer__name": "sgd", "corrector__name": "spike_compensation"}
    config = cheap(**values)
    config.optimizer.momentum = 0.8
    train_and_evaluate(config, tmp_path / "run")
    half = shutil.copytree(tmp_path / "run", tmp_path / "half")
    shutil.rmtree(half / "checkpoints" / "6")
    assert train_and_evaluate(config, half)["finished"]
    runs.assert_same_run(half, tmp_path / "run")
    config.corrector.name = "error_feedback"
    with pytest.raises(ConfigError, match=r"holds a run with config\.corrector = name 'spi"):
        train_and_evaluate(config, half)


@pytest.mark.slow
def test_an_imported_optimizer_with_averages_over_batches(module, tmp_path):
    """One command, and from its third step another; then it is loaded."""
    values = {"optimizer__name": "my_optimizers:scaled", "ema": 0.5, "accumulate": 2, **SHORT}
    config = cheap(**values)
    config.optimizer.rho = 0.5
    beside = module.with_name("own.py")
    beside.write_text(f"import runs\n\n\ndef get_config():\n    return runs.cheap(**{SHORT})\n")
    sys.path.remove(str(module.parent))  # it is found as it lies beside the configuration
    keys = ("optimizer.name=my_optimizers:scaled", "optimizer.rho=0.5", "ema=0.5", "accumulate=2")
    given = [f"--config={beside}", *(f"--config.{key}" for key in keys)]
    commands.main(["jdecouple", "train", *given, f"--workdir={tmp_path / 'run'}"])
    half = shutil.copytree(tmp_path / "run", tmp_path / "half")
    shutil.rmtree(half / "checkpoints" / "6")
    assert train_and_evaluate(config, half)["finished"]
    runs.assert_same_run(half, tmp_path / "run")
    step, arrays = runs.final_arrays(half)
    assert step == 6
    averages = {name: x for name, x in arrays.items() if "/ema/" in name}
    assert any(np.any(x != arrays[name.replace("/ema/", "/")]) for name, x in averages.items())
    loaded = jd.load(half, "last")
    for index, (params, stats) in enumerate(zip(loaded.params, loaded.stats, strict=True)):
        for kind, values in (("params", params), ("stats", stats)):
            for name, x in values.items():
                np.testing.assert_array_equal(x, averages[f"block_{index}/ema/{kind}/{name}"])
    content = json.loads((half / "config.json").read_text())
    assert content["parameters"] == sum(x.size for name, x in averages.items() if "params" in name)
    module.unlink()  # evaluation needs no optimizer
    del sys.modules[module.stem]
    assert len(dataset_of(loaded).test) == 20


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"name": "nope:f"}, "name is 'nope:f', which does not work: No module named 'nope'"),
        (
            {"name": "optax:lyon"},
            "name is 'optax:lyon', which does not work: module 'optax' has no attribute 'lyon'",
        ),
        (
            {"name": "my_optimizers:scaled"},
            "name is 'my_optimizers:scaled', which does not work: scaled() missing 1 required "
            "positional argument: 'rho'",
        ),
        (
            {"name": "my_optimizers:nothing"},
            "name is 'my_optimizers:nothing', which does not work: what nothing returns is a "
            "NoneType: a optax GradientTransformation is needed",
        ),
        ({"name": "adm"}, "name is 'adm': allowed are adam, adamw, lars, muon, nadam, nadamw, sgd"),
    ],
)
def test_optimizers_that_cannot_be_had(module, optimizer, message):
    config = cheap(**SHORT).to_dict() | {"optimizer": optimizer}
    with pytest.raises(ConfigError) as caught:
        build(config)
    assert str(caught.value).startswith(f"config.optimizer.{message}")


def test_options_of_an_imported_optimizer(module):
    section = {"name": "my_optimizers:scaled"}
    complete = filled({"optimizer": section}, all_options=True).optimizer
    assert {"rho", "wide", "schedule"} <= set(complete)
    assert complete.get_type("wide") is bool
    with pytest.raises(ConfigError, match="optimizer 'my_optimizers:scaled' takes only: rho, wide"):
        filled({"optimizer": {**section, "momentum": 0.9}})
    assert filled({"optimizer": {"name": "optax:lion", "b1": 0.8}}).optimizer.b1 == 0.8


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ema": 1.0}, "config.ema is 1.0: a number above 0 and below 1 is needed"),
        ({"accumulate": 0}, "config.accumulate is 0: a whole number from 1 to"),
        ({"accumulate": 7, **SHORT}, "config.accumulate is 7: the run has 6 step(s), so that its"),
        (
            {"accumulate": 4, "growth__blocks": (1, 2), "growth__steps": (0, 3), **SHORT},
            "config.accumulate is 4: growth leaves a net 3 step(s), so that its optimizer would",
        ),
        (
            {"accumulate": 2, **runs.delayed("adl")},
            "config.accumulate is 2, and method adl accumulates 4 backward passes of its own",
        ),
        ({"accumulate": 2, "clip_norm": 1.0}, "config.accumulate is 2, which clip_norm does not"),
    ],
)
def test_what_does_not_fit(values, message):
    with pytest.raises(ConfigError) as caught:
        build(cheap(**values))
    assert str(caught.value).startswith(message)


def test_the_schedule_goes_by_batches(monkeypatch):
    """At the same epochs as without accumulation; the optimiser counts its steps."""
    rates = []
    monkeypatch.setattr(jd.optim, "_OPTIMIZERS", {"sgd": lambda rate, **_: rates.append(rate)})
    monkeypatch.setattr("jdecouple.train.memory.check_state", lambda *_: 1 / 0)
    values = {"optimizer__schedule": "cosine", "optimizer__learning_rate": 1.0, "steps": 8}
    with pytest.raises(ZeroDivisionError):
        build(cheap(accumulate=4, **values))
    assert [float(rates[0](n)) for n in range(3)] == pytest.approx([1.0, 0.5, 0.0], abs=1e-6)
