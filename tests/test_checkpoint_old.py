"""Runs that version 0.1.0 began, and the changes since, go on from their checkpoints."""

import json
import shutil
from pathlib import Path

import chex
import jax
import nets
import numpy as np
import pytest
import runs
from ml_collections import ConfigDict

from jdecouple.checkpoint import Checkpointer
from jdecouple.train import config as configuration
from jdecouple.train.config import ConfigError
from jdecouple.train.loop import build, train_and_evaluate

OLD = Path(__file__).resolve().parent / "checkpoints_0.1"
METHODS = ("deinforeg", "fdg")


def old_config(method: str, steps: int = 4) -> ConfigDict:
    """What the old runs were made with, in four steps; one device, whatever there are."""
    config = configuration.default()
    config.method.name = method
    if method == "fdg":
        config.num_stages = 2
        config.remat = "none"  # the one value that there was
    else:
        config.method.projector = "8-4"
    config.model.name = "mlp"
    config.model.hidden = 8
    config.model.depth = 2
    config.data.name = "digits"
    config.optimizer.name = "sgd"
    config.optimizer.momentum = 0.9
    config.optimizer.learning_rate = 0.05
    config.batch_size = 16
    config.steps = steps
    config.eval_every = 4
    config.checkpoint.every = 2
    config.checkpoint.keep = 1
    config.log_every = 2
    config.mesh.stages = 1
    return config


def assert_close(workdir: Path, reference: Path) -> None:
    (step, arrays), (wanted_step, wanted) = map(runs.final_arrays, (workdir, reference))
    assert step == wanted_step
    chex.assert_trees_all_close(arrays, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_every_array_is_restored(method):
    trainer = build(old_config(method)).trainer
    checkpoints = Checkpointer(OLD / method / "checkpoints", read_only=True)
    restored = checkpoints.restore(trainer.to_arrays(trainer.abstract()))
    assert restored.step == checkpoints.best_step == 4
    assert all(np.any(array) for name, array in restored.arrays.items() if "kernel" in name)


def test_queues_hold_what_remat_says(tmp_path):
    shutil.copytree(OLD / "fdg", tmp_path / "old")
    config = old_config("fdg", 8)
    config.remat = "auto"
    told = "JAX version|remat = None, now elementwise, elementwise"
    with pytest.raises(ConfigError, match=told):
        train_and_evaluate(config, tmp_path / "old")


@pytest.mark.parametrize("method", nets.marked(METHODS, ()))
def test_training_goes_on(method, tmp_path):
    """A run of today, stopped and continued at the same step, comes to the same weights."""
    shutil.copytree(OLD / method, tmp_path / "old")
    written_by = json.loads((OLD / method / "config.json").read_text())["versions"]["jax"]
    if method == "fdg" and jax.__version__ != written_by:  # its queues may look otherwise
        with pytest.raises(ConfigError, match=f"JAX version = {written_by}, now "):
            train_and_evaluate(old_config(method, 8), tmp_path / "old")
        return
    train_and_evaluate(old_config(method), tmp_path / "new")
    assert_close(tmp_path / "old", tmp_path / "new")
    for name in ("old", "new"):
        assert train_and_evaluate(old_config(method, 8), tmp_path / name)["step"] == 8
    assert_close(tmp_path / "old", tmp_path / "new")
    losses = [line["loss"] for line in runs.lines(tmp_path / "old")]
    wanted = [line["loss"] for line in runs.lines(tmp_path / "new")]
    assert losses == pytest.approx(wanted, rel=1e-5)
