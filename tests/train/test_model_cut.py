"""The cut into local modules as a key of a configuration: typed, checked, saved and read again."""

import json

import numpy as np
import pytest
import runs

import jdecouple as jd
from jdecouple.train import cli
from jdecouple.train.config import ConfigError, filled, identity
from jdecouple.train.loop import train_and_evaluate
from jdecouple.train.run import build


def parsed(*arguments, preset="equal:digits,mlp,deinforeg"):
    return cli.parse(["jdecouple train", "--config", preset, *arguments])[0]


@pytest.mark.parametrize(
    ("argument", "given"),
    [
        *(("4", 4), ("dgl:3", "dgl:3"), ("(0, 3, 7)", (0, 3, 7)), ("(0, 3, 7)", [0, 3, 7])),
        *(("0,3,7", (0, 3, 7)), ("[0,3, 7]", [0, 3, 7])),
    ],
)
def test_a_command_line_and_a_file_say_the_same(argument, given):
    """A number, a name, and boundaries, as JSON has them too."""
    from_file = filled({"model": {"name": "resnet110", "cut": given}})
    assert filled(json.loads(from_file.to_json())) == from_file
    typed = parsed("--config.model.name=resnet110", f"--config.model.cut={argument}")
    assert identity(typed)["model"]["cut"] == identity(from_file)["model"]["cut"]


@pytest.mark.slow
def test_growing_counts_modules():
    config = runs.tiny(
        model__depth=4, model__cut=(0, 1, 3), growth__blocks=(2, 3), growth__epochs=(0, 1)
    )
    found = [len(phase.trainer.model.blocks) for phase in build(config).phases]
    assert found == [2, 3]


@pytest.mark.parametrize(
    ("cut", "said"),
    [
        ("papers", "config.model.cut is 'papers': allowed are units, a number"),
        ("3", "config.model.cut is 3: cuts into 1, 2 modules are known"),
        ("(0, 2)", "config.model.cut is (0, 2): modules begin at increasing unit indices"),
        (1.5, "config.model.cut is 1.5: a value of type str is needed"),
        (True, "config.model.cut is True: a value of type str is needed"),
    ],
)
def test_bad_cuts_get_one_clear_line(cut, said):
    with pytest.raises(ConfigError) as error:
        build({**runs.tiny().to_dict(), "model": {"name": "mlp", "depth": 2, "cut": cut}})
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_loaded_run_has_the_modules(tmp_path):
    values = {"method__name": "greedy_exit", "model__depth": 3, "num_stages": 2, "epochs": 1}
    train_and_evaluate(runs.cheap(**values, model__cut=(0, 2)), tmp_path)
    run = jd.load(tmp_path)
    assert run.exits == (0, 1)
    assert len(run.units) == 2
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), np.uint8)
    assert run.predict(images).logits.shape == (2, 5, 10)
    with pytest.raises(ConfigError, match=r"config\.model = cut '\(0, 2\)' \(now '\(0, 1\)'\)"):
        train_and_evaluate(runs.cheap(**values, model__cut=(0, 1)), tmp_path)
