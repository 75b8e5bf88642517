"""Runs that begin with the weights of another run."""

import json
import shutil

import numpy as np
import pytest
import runs
from runs import arrays_at, finished_here, tiny

import jdecouple as jd
from jdecouple.data.inputs import ImageInputs, TextInputs
from jdecouple.train import hosts
from jdecouple.train.config import ConfigError, validate
from jdecouple.train.initial import _check_words, _place_and_step, begin
from jdecouple.train.loop import train_and_evaluate
from jdecouple.train.lr_finder import find_lr
from jdecouple.train.run import build


@pytest.fixture(scope="module")
def other():
    """A run of deinforeg: two blocks, each with a projector and a classifier."""
    return finished_here(epochs=2, checkpoint__every=9)


def begun(place, capsys, **values):
    """Arrays that a run begins with, those of fresh weights, and what it says."""
    run = build(tiny(**values))
    fresh = run.trainer.to_arrays(run.trainer.init())
    run.config.init_from = str(place)
    state = begin(run, run.trainer, hosts.SingleProcess())
    assert state.step == 0
    (told,) = capsys.readouterr().out.splitlines()
    return run.trainer.to_arrays(state), fresh, told


def refused(place, **values):
    run = build(tiny(**values, init_from=str(place)))
    with pytest.raises(ConfigError) as error:
        begin(run, run.trainer, hosts.SingleProcess())
    assert "\n" not in str(error.value)
    prefix = f"config.init_from is {str(place)!r}: "
    assert str(error.value).startswith(prefix)
    return str(error.value).removeprefix(prefix)


def assert_equal(found, wanted, names):
    for name in names:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name, strict=True)


class TestTaken:
    def test_all_that_fits(self, other, capsys):
        step = jd.load(other).step
        found, fresh, told = begun(other, capsys, optimizer__learning_rate=0.1, seed=7)
        assert told == (
            f"begins with checkpoint {step} of {other}; taken: block 0-1, classifier 0-1, "
            "projector 0-1; fresh: optimizer"
        )
        wanted = arrays_at(other, step)
        weights = [name for name in found if "/opt/" not in name]
        assert {"params", "stats"} == {name.split("/")[1] for name in weights}
        assert_equal(found, wanted, weights)
        assert_equal(found, fresh, found.keys() - {*weights})

    def test_another_number_of_classes(self, other, capsys):
        found, fresh, told = begun(f"{other}@9", capsys, data__num_classes=4)
        assert told == (
            f"begins with checkpoint 9 of {other}; taken: block 0-1, projector 0-1; "
            "fresh: classifier 0-1, optimizer"
        )
        wanted = arrays_at(other, 9)
        taken = {n for n in found if "/opt/" not in n and "/classifier/" not in n}
        assert_equal(found, wanted, taken)
        assert_equal(found, fresh, found.keys() - taken)

    def test_another_method(self, other, capsys):
        values = {"method__name": "bp", "method__projector": None, "num_stages": 2}
        found, fresh, told = begun(f"{other}@last", capsys, **values)
        assert told == (
            f"begins with checkpoint 18 of {other}; taken: block 0-1; "
            "fresh: classifier 1, optimizer"
        )
        taken = {name for name in found if "/block/" in name and "/opt/" not in name}
        assert_equal(found, arrays_at(other, 18), taken)
        assert_equal(found, fresh, found.keys() - taken)

    @pytest.mark.slow
    def test_averages(self, tmp_path, capsys):
        """Those of the other run are taken, and its own begin there."""
        values = {"method__name": "bp", "method__projector": None, "num_stages": 2, "ema": 0.5}
        train_and_evaluate(tiny(**values, steps=2), tmp_path)
        wanted = arrays_at(tmp_path, 2)
        capsys.readouterr()
        found, _, told = begun(tmp_path, capsys, **values)
        assert "taken: block 0-1, classifier 1;" in told
        averages = [name for name in found if "/ema/" in name]
        assert averages
        assert_equal(found, wanted, averages)
        for name in averages:
            np.testing.assert_array_equal(found[name.replace("/ema/", "/")], wanted[name])
        assert any((wanted[name] != wanted[name.replace("/ema/", "/")]).any() for name in averages)

    @pytest.mark.slow
    def test_a_rate_is_found_for_these_weights(self, other, tmp_path, capsys):
        find_lr(tiny(init_from=f"{other}@18"), tmp_path, low=1e-6, high=1e-5, steps=10)
        assert f"begins with checkpoint 18 of {other}; taken: block 0-1" in capsys.readouterr().out

    @pytest.mark.slow
    def test_what_version_0_1_has_saved(self, capsys):
        old = runs.REPOSITORY / "tests" / "checkpoints_0.1" / "deinforeg"
        config = json.loads((old / "config.json").read_text())["config"]
        run = build({**config, "init_from": str(old)})
        state = begin(run, run.trainer, hosts.SingleProcess())
        step, wanted = runs.final_arrays(old)
        assert f"checkpoint {step} of " in capsys.readouterr().out
        found = run.trainer.to_arrays(state)
        assert_equal(found, wanted, [name for name in found if "/opt/" not in name])


@pytest.fixture(scope="module")
def tuned(other, tmp_path_factory):
    """A run that began so, with its source."""
    folder = tmp_path_factory.mktemp("tuned")
    source = runs.copy(other, folder)
    config = tiny(steps=2, checkpoint__every=1, init_from=f"{source}@18")
    train_and_evaluate(config, folder / "run")
    return folder


class TestRuns:
    def test_trains_from_there(self, tuned):
        config = json.loads((tuned / "run" / "config.json").read_text())["config"]
        assert config["init_from"] == f"{tuned / 'copy'}@18"
        before, after = runs.lines(tuned / "copy"), runs.lines(tuned / "run")
        assert after[0]["step"] == 1
        assert after[0]["loss"] < before[0]["loss"]

    @pytest.mark.slow
    def test_goes_on_without_it(self, tuned, tmp_path, capsys):
        folder = tmp_path / "run"
        shutil.copytree(tuned / "run", folder)
        source = tuned / "copy"
        source.rename(tmp_path / "gone")
        try:
            config = tiny(steps=3, checkpoint__every=1, init_from=f"{source}@18")
            assert train_and_evaluate(config, folder)["step"] == 3
        finally:
            (tmp_path / "gone").rename(source)
        printed = capsys.readouterr().out
        assert "begins with" not in printed
        assert "continuing from step 2 of 3" in printed

    @pytest.mark.parametrize("value", [None, "elsewhere"])
    def test_another_value_is_another_run(self, tuned, value):
        before = runs.fingerprint(tuned / "run")
        said = f"a run with config.init_from = {tuned / 'copy'}@18, now {value}: choose another"
        with pytest.raises(ConfigError, match=said):
            train_and_evaluate(tiny(steps=3, init_from=value), tuned / "run")
        assert runs.fingerprint(tuned / "run") == before

    def test_without_it_a_run_is_what_it_was(self, other):
        info = json.loads((other / "checkpoints" / "18" / "info" / "metadata").read_text())
        extra = info["document"]["extra"]
        assert "init_from" not in extra["identity"]
        assert "init_from" not in extra["settings"]


class TestRefused:
    @pytest.mark.parametrize(
        ("values", "said"),
        [
            (
                {"model__hidden": 8},
                "checkpoint 9 holds float32[16] as 'block_0/params/block/layers/1/bias', this "
                "network float32[8]",
            ),
            ({"model__depth": 3}, "holds nothing as 'block_2/params/block/"),
            ({"model__depth": 1, "mesh__stages": 1}, "as 'block_1/params/block/"),
            ({"model__cut": 1}, "; its config.model.cut is 'units', here '1'"),
        ],
    )
    def test_blocks_that_do_not_fit(self, other, values, said):
        assert said in refused(f"{other}@9", **values)

    def test_no_such_run_or_checkpoint(self, other, tmp_path):
        assert refused(tmp_path / "nowhere").startswith("there is no run in ")
        assert refused(f"{other}@5").startswith("no checkpoint 5 in ")
        assert refused("ftp://host/run").startswith("'ftp://host/run' is no folder: one of this")

    def test_growth(self):
        given = {"init_from": "runs/a", "growth": {"blocks": (1, 2), "steps": (0, 1)}}
        with pytest.raises(ConfigError, match=r"leave config\.growth\.blocks at None"):
            validate(given)

    def test_other_words(self):
        words = ("[padding]", "[unknown]", "a", "film")
        inputs = TextInputs(words, max_length=4)
        for before in (inputs, TextInputs(words, max_length=9)):
            _check_words(inputs, {"inference": {"inputs": before.to_json()}})
        _check_words(inputs, {})
        images = ImageInputs((8, 8, 1), mean=(0.5,), std=(0.25,))
        for before in (TextInputs(words[:-1], max_length=4), images):
            with pytest.raises(ValueError, match="its words have other numbers"):
                _check_words(inputs, {"inference": {"inputs": before.to_json()}})


def test_a_workdir_may_have_an_at_sign(tmp_path):
    folder = str(tmp_path / "a@b")
    assert _place_and_step(folder) == (folder, "best")
    assert _place_and_step(f"{folder}@7") == (folder, 7)
    assert _place_and_step(f"{folder}@last") == (folder, "last")
    (tmp_path / "a@7").mkdir()
    assert _place_and_step(str(tmp_path / "a@7")) == (str(tmp_path / "a@7"), "best")
