"""The delayed methods follow the authors' PyTorch code step by step (golden vectors, float64)."""

from typing import Any

import delayed_nets as dn
import jax
import numpy as np
import pytest

import jdecouple as jd

TOLERANCE = 1e-12
FDG = dn.recorded("fdg")
FEATURES_REPLAY = dn.recorded("features_replay")
BP = dn.recorded("bp_same_mlp")
LABELLED = {"ids": lambda run: f"{run.case}-{run.variant}".rstrip("-")}


pytestmark = pytest.mark.usefixtures("x64", "optimized")


def check(run: dn.Recorded, method: jd.methods.Method, *, num_stages: int, devices: int = 1):
    """Trains on the recorded batches and compares all weights after every iteration."""
    golden, sgd = run.golden, run.sgd
    batches = [dn.batch(*each) for each in zip(golden["in.x"], golden["in.labels"], strict=True)]
    assert len(batches) == golden.settings["iterations"]
    trainer = jd.Trainer(
        dn.model(run.initial()),
        method,
        jd.optim.sgd(sgd.pop("lr"), **sgd),
        num_stages=num_stages,
        mesh=jd.make_mesh(devices, devices=jax.devices()[:devices]),
        example=batches[0],
    )
    state = trainer.init()
    history = [run.initial()]
    errors, losses = [], []
    for iteration, batch in enumerate(batches):
        state, metrics = trainer.step(state, batch)
        history.append(dn.layers_of(trainer, state))
        errors.append(dn.largest_error(run.comparable(history), run.after(iteration)))
        losses.append(float(metrics["loss"]))
    assert max(errors) < TOLERANCE, errors
    np.testing.assert_allclose(losses, run.losses, rtol=2e-7)  # metrics are float32
    assert dn.largest_error(history[-1], run.initial()) > 0.01


def stages(run: dn.Recorded) -> int:
    return run.golden.settings["K"]


def method(run: dn.Recorded) -> jd.methods.Method:
    return jd.methods.get(run.method, **run.arguments)


def pick(runs: list[dn.Recorded], case: str, variant: str) -> dn.Recorded:
    (found,) = (run for run in runs if (run.case, run.variant) == (case, variant))
    return found


def test_all_recordings_are_found():
    assert (len(FDG), len(FEATURES_REPLAY), len(BP)) == (8, 6, 2)
    assert {(run.nesterov, *run.arguments.values()) for run in FEATURES_REPLAY} == {
        (True, 2.0),
        (True, 1.0),
        (False, 1.0),
    }


@pytest.mark.parametrize("run", FDG, **LABELLED)
def test_fdg(run):
    check(run, method(run), num_stages=stages(run))


@pytest.mark.parametrize("run", FEATURES_REPLAY, **LABELLED)
def test_features_replay(run):
    check(run, method(run), num_stages=stages(run))


@pytest.mark.parametrize(
    "run",
    [
        pick(FDG, "fdg__two_linear", "beta0.5.forward_weights"),
        pick(FDG, "fdg__two_linear", "beta1.0.current_weights"),
        pick(FEATURES_REPLAY, "features_replay__two_linear", "main_py"),
    ],
    **LABELLED,
)
def test_stages_on_devices_of_their_own(run):
    check(run, method(run), num_stages=stages(run), devices=stages(run))


@pytest.mark.parametrize("run", BP, **LABELLED)
def test_backpropagation(run):
    check(run, method(run), num_stages=stages(run))


@pytest.mark.parametrize(
    ("name", "arguments"), [("ddg", {}), ("fr", {}), ("fdg", {}), ("adl", {"accumulate": 1})]
)
def test_one_stage_is_backpropagation(name: str, arguments: dict[str, Any]):
    run = pick(BP, "bp_same_mlp__two_linear", "")
    check(run, jd.methods.get(name, **arguments), num_stages=1)
