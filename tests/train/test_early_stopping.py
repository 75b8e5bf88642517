"""Runs that end because their validation accuracy no longer improves."""

import signal

import nets
import pytest
import runs
from ml_collections import ConfigDict
from runs import cheap, tiny

from jdecouple.checkpoint import Checkpointer
from jdecouple.train.config import ConfigError, validate
from jdecouple.train.early_stopping import EarlyStopping
from jdecouple.train.loop import build, train_and_evaluate
from jdecouple.trainer import Trainer

VALUES = {"steps": 20, "eval_every": 2, "checkpoint__every": 3, "data__validation": 0.1}
VALUES |= {"early_stopping__patience": 3}
# By step: the best of all comes too late, after three evaluations that are none better.
ACCURACY = {2: 0.3, 4: 0.5, 6: 0.5, 8: 0.6, 10: 0.1, 12: 0.6, 14: 0.2, 16: 0.9}
ENDS, BEST = 14, 8
REASON = "none of the last 3 evaluations is above the validation accuracy of step 8, 60.00%"


def test_the_reason_of_a_patience_of_one_evaluation():
    stopping = EarlyStopping(ConfigDict({"patience": 1, "min_delta": 0.1}))
    for step, accuracy in ((2, 0.5), (4, 0.55)):
        stopping.add(step, accuracy)
    wanted = "the last evaluation is not above the validation accuracy of step 2, 50.00%, by more"
    assert stopping.reason == f"{wanted} than 0.1"


def claimed(self, state, batches):
    """In place of `Trainer.evaluate`: the accuracy of the step."""
    values = {"loss": 1.0, "accuracy": ACCURACY.get(state.step, 0.1)}
    return values | {f"exit_1/{name}": value for name, value in values.items()}


@pytest.fixture(autouse=True)
def _claimed(monkeypatch):
    monkeypatch.setattr(Trainer, "evaluate", claimed)


def train(folder, **values):
    return train_and_evaluate(cheap(**{**VALUES, **values}), folder)


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ended")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "evaluate", claimed)
        train(folder)
    return folder


class TestEnded:
    def test_after_so_many_evaluations_for_good(self, ended, tmp_path, capsys):
        folder = runs.copy(ended, tmp_path)
        checkpoints = Checkpointer(folder / "checkpoints", read_only=True)
        assert (checkpoints.latest_step, checkpoints.best_step) == (ENDS, BEST)
        before = runs.fingerprint(folder)
        result = train(folder)
        assert (result["step"], result["finished"], result["reason"]) == (ENDS, True, REASON)
        assert (result["test"]["step"], result["test"]["accuracy"]) == (ENDS, ACCURACY[ENDS])
        assert result["test_at_best_validation"]["step"] == BEST
        printed = capsys.readouterr().out
        assert f"ended at step 14 of 20 by early stopping: {REASON}\n" in printed
        assert "last step: 20.00% at step 14" in printed
        assert "best validation: 60.00% at step 8" in printed
        assert runs.fingerprint(folder) == before

    @pytest.mark.parametrize(
        ("values", "said"),
        [
            ({"steps": 30}, r"config.steps = 20 \(now 30\)"),
            ({"optimizer__learning_rate": 0.5}, r"learning_rate = 0.001 \(now 0.5\)"),
        ],
    )
    def test_other_keys_are_refused(self, ended, values, said):
        before = runs.fingerprint(ended)
        with pytest.raises(ConfigError, match=said) as error:
            train(ended, **values)
        assert str(error.value).endswith("the same values, or more config.early_stopping.patience")
        assert runs.fingerprint(ended) == before

    def test_more_patience_goes_on(self, ended, tmp_path, capsys):
        folder = runs.copy(ended, tmp_path)
        result = train(folder, early_stopping__patience=4)
        assert (result["step"], result["finished"]) == (20, True)
        assert "reason" not in result
        assert result["test_at_best_validation"]["step"] == 16
        told = "config.early_stopping.patience is 4 from step 14 on, 3 before"
        assert told in capsys.readouterr().out

    @pytest.mark.slow
    def test_at_the_last_step_it_is_a_run_like_any_other(self, tmp_path, capsys):
        result = train(tmp_path, steps=ENDS)
        assert (result["step"], result["finished"]) == (ENDS, True)
        assert "reason" not in result
        assert "early stopping" not in capsys.readouterr().out


@pytest.mark.parametrize("step", nets.marked((5, 12, 13), ()))
def test_a_run_that_is_stopped_ends_at_the_same_step(ended, tmp_path, monkeypatch, step):
    """Asked to stop between two evaluations, and at one."""
    train_step = Trainer.step

    def asked(self, state, batch):
        state, metrics = train_step(self, state, batch)
        if state.step == step:
            signal.raise_signal(signal.SIGTERM)
        return state, metrics

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", asked)
        result = train(tmp_path)
    assert (result["step"], result["finished"]) == (step, False)
    assert train(tmp_path)["reason"] == REASON
    runs.assert_same_run(tmp_path, ended)


@pytest.mark.slow
@pytest.mark.parametrize("step", nets.marked((12, ENDS), (ENDS,)))
def test_a_run_that_fails_while_it_evaluates_ends_at_the_same_step(
    ended, tmp_path, monkeypatch, step
):
    def fails(self, state, batches):
        if state.step == step:
            raise RuntimeError("lost")
        return claimed(self, state, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", fails)
        with pytest.raises(RuntimeError, match="lost"):
            train(tmp_path)
    assert Checkpointer(tmp_path / "checkpoints", read_only=True).latest_step == step
    assert train(tmp_path)["reason"] == REASON
    runs.assert_same_run(tmp_path, ended)


@pytest.mark.slow
def test_the_least_improvement(tmp_path):
    result = train(tmp_path, early_stopping__min_delta=0.35)
    assert result["step"] == 8
    assert result["reason"].endswith("accuracy of step 2, 30.00%, by more than 0.35")


@pytest.mark.slow
def test_a_growing_run_counts_once_it_has_all_blocks(tmp_path):
    values = {key: value for key, value in VALUES.items() if key != "data__validation"}
    values |= {"growth__blocks": (1, 2), "growth__steps": (0, 10), "early_stopping__patience": 1}
    config = tiny(**values, method__name="greedy_exit", method__projector=None)
    result = train_and_evaluate(config, tmp_path)
    assert (result["step"], "of step 12," in result["reason"]) == (14, True)


@pytest.mark.slow
def test_without_it_checkpoints_say_nothing_of_it(tmp_path):
    train(tmp_path, early_stopping__patience=None, steps=2)
    (extra,) = Checkpointer(tmp_path / "checkpoints", read_only=True).extras().values()
    assert "early_stopping" not in extra


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"patience": 0}, "config.early_stopping.patience is 0: a whole number from 1"),
        ({"patience": 1, "min_delta": -0.1}, "config.early_stopping.min_delta is -0.1: a finite"),
        ({"min_delta": 0.1}, "min_delta is set, but config.early_stopping.patience is None"),
    ],
)
def test_refused(values, said):
    with pytest.raises(ConfigError, match=said):
        validate({"early_stopping": values})


def test_it_needs_a_validation_split():
    said = "early_stopping.patience is 3: data set 'synthetic' has no validation split"
    with pytest.raises(ConfigError, match=said):
        build(cheap(**{**VALUES, "data__validation": 0.0}))
