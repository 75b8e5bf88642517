"""The loop with a delayed method: what it writes, keeps and refuses; the learning rates it sets."""

import json
from typing import Any

import jax.numpy as jnp
import nets
import numpy as np
import pytest
from ml_collections import ConfigDict
from runs import cheap, lines

from jdecouple.train.loop import NonFiniteError, build, train_and_evaluate
from jdecouple.trainer import Trainer


def delayed(name: str = "fdg", **values: Any) -> ConfigDict:
    """As `cheap`, by a delayed method in three stages."""
    return cheap(**{"method__name": name, "model__depth": 3, "num_stages": 3, **values})


@pytest.fixture(scope="module")
def delayed_run(tmp_path_factory):
    """Workdir and result of two epochs by FDG."""
    workdir = tmp_path_factory.mktemp("delayed")
    return workdir, train_and_evaluate(delayed(epochs=2), workdir)


def of_train(folder):
    return [line for line in lines(folder) if line["split"] == "train"]


class TestADelayedRun:
    GAUGES = ("examples_per_second", "input_wait", "learning_rate", "process_memory_peak")
    EMPTY = ({"step", "split", *GAUGES},) * 2

    def test_metrics_begin_with_the_first_batch_that_reaches_the_end(self, delayed_run):
        train = of_train(delayed_run[0])
        assert [line["step"] for line in train] == list(range(1, 19))
        assert (*map(set, train[:2]),) == self.EMPTY
        block = {"block_2/loss", "block_2/cross_entropy", "block_2/accuracy"}
        for line in train[2:]:
            assert set(line) == self.EMPTY[0] | {"loss", "accuracy"} | block
            assert line["loss"] == line["block_2/loss"]
        assert all(value is not None for line in lines(delayed_run[0]) for value in line.values())

    def test_curves_and_result(self, delayed_run):
        workdir, result = delayed_run
        assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert (result["step"], result["finished"]) == (18, True)
        assert np.isfinite(result["test"]["loss"])
        assert {"test_at_best_validation", "best_test"} < set(result)

    def test_config(self, delayed_run):
        assert json.loads((delayed_run[0] / "config.json").read_text())["boundaries"] == [0, 1, 2]

    @pytest.mark.slow
    @pytest.mark.parametrize("every", nets.marked((2, 3, 5), (3,)))
    def test_means_are_of_the_steps_that_have_a_loss(self, delayed_run, tmp_path, every):
        train_and_evaluate(delayed(steps=9, checkpoint__every=4, log_every=every), tmp_path)
        each = {line["step"]: line.get("loss") for line in of_train(delayed_run[0])}
        train = of_train(tmp_path)
        assert train[0]["step"] == every
        for start, line in zip([0, *(line["step"] for line in train)], train, strict=False):
            steps = range(start + 1, line["step"] + 1)
            known = [each[step] for step in steps if each[step] is not None]
            assert line.get("loss") == (pytest.approx(np.mean(known)) if known else None)

    @pytest.mark.slow
    def test_shorter_than_the_way_through_the_stages(self, tmp_path, capfd):
        result = train_and_evaluate(delayed(steps=2), tmp_path)
        assert result["finished"]
        assert (*map(set, of_train(tmp_path)),) == self.EMPTY
        assert (tmp_path / "curves.png").is_file()
        printed = capfd.readouterr()
        assert "last step" in printed.out
        assert "nan" not in (printed.out + printed.err).lower()

    def test_stops_where_the_loss_is_not_finite(self, tmp_path):
        config = delayed(optimizer__learning_rate=3e38, checkpoint__every=9)
        with pytest.raises(NonFiniteError) as error:
            train_and_evaluate(config, tmp_path)
        # The last stage trains on the third step's batch; the fourth's loss shows what it became.
        assert "the loss of block_2 is" in str(error.value)
        assert "at step 4; no checkpoint was saved" in str(error.value)

    @pytest.mark.slow
    def test_what_waits_and_is_not_finite_is_not_saved(self, tmp_path, monkeypatch):
        step = Trainer.step

        def poisoned(self, state, batch):
            state, metrics = step(self, state, batch)
            if state.step == 8:
                arrays = self.to_arrays(state)
                name = "stage_1/waiting/errors/0"
                state = self.from_arrays(8, {**arrays, name: arrays[name] * np.inf})
            return state, metrics

        monkeypatch.setattr(Trainer, "step", poisoned)
        with pytest.raises(NonFiniteError) as error:
            train_and_evaluate(delayed(), tmp_path)
        said = "stage_1/waiting/errors/0 is not finite after step 8; the last good checkpoint is 4"
        assert said in str(error.value)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", nets.marked(("ddg", "fr", "adl"), ("adl",)))
    def test_the_other_methods(self, tmp_path, name):
        own = {"method__accumulate": 2} if name == "adl" else {}
        result = train_and_evaluate(delayed(name, epochs=1, **own), tmp_path)
        assert result["finished"]
        known = ["loss" in line for line in of_train(tmp_path)]
        assert known == ([False] * 2 + [True] * 7 if name == "adl" else [True] * 9)


def rates(config, passes):
    """What the optimiser subtracts for a gradient of 1, after each backward pass."""
    optimizer = build(config).trainer.stages[0].optimizer
    weight = jnp.zeros(())
    state, found = optimizer.init(weight), []
    for _ in range(passes):
        update, state = optimizer.update(jnp.ones(()), state, weight)
        found.append(-float(update))
    return found


STEPPED = {
    "optimizer__learning_rate": 1.0,
    "optimizer__schedule": "step_decay",
    "optimizer__decay_epochs": (1,),  # of nine steps each
}
WARM = {"optimizer__warmup_epochs": 5 / 9, "optimizer__warmup_start": 0.5}


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({}, [1] * 9 + [0.1] * 3),
        (WARM, [0.6, 0.7, 0.8, 0.9, 1, 1, 1, 1, 1, 0.1, 0.1, 0.1]),
        (
            {"optimizer__warmup_epochs": 1.5, "optimizer__warmup_start": 0.0},  # 13.5 steps: 14
            [*(n / 14 for n in range(1, 10)), 1 / 14, 1.1 / 14, 1.2 / 14],
        ),
        ({"optimizer__warmup_epochs": 1e-3}, [1] * 9 + [0.1] * 3),  # one step, which is warm
    ],
)
def test_learning_rate_of_every_step(values, wanted):
    assert rates(cheap(**STEPPED, **values), 12) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({}, [1, 1, 1, 1, 1, 0.1]),
        (WARM, [0.6, 0.8, 1, 1, 1, 0.1]),
        ({"optimizer__decay_epochs": (8 / 9,)}, [1, 1, 1, 1, 0.1, 0.1]),
    ],
)
@pytest.mark.parametrize("mean", nets.marked((True, False), (True,)))
def test_learning_rate_of_an_accumulating_method_is_that_of_its_passes(values, wanted, mean):
    """Update n has the rate of pass 2n: what it sums has the length of its two gradients."""
    own = {"method__accumulate": 2, "method__accumulate_mean": mean}
    found = rates(delayed("adl", **{**STEPPED, **values, **own}), 12)
    assert found[::2] == [0] * 6
    assert found[1::2] == pytest.approx([rate * (1 if mean else 2) for rate in wanted])


@pytest.mark.slow
def test_published_split_of_a_model(tmp_path):
    resnet = {"name": "resnet", "depth": 8, "width": 1 / 16, "hidden": None}
    resnet = {f"model__{key}": value for key, value in resnet.items()}
    train_and_evaluate(delayed(**resnet, num_stages=2, split="fr", steps=2), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["boundaries"] == [0, 2]
