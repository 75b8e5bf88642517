"""The delayed methods follow the authors' PyTorch code step by step (golden vectors, float64)."""

from typing import Any

import delayed_nets as dn
import jax
import nets
import numpy as np
import pytest

import jdecouple as jd

TOLERANCE = 1e-12
FDG = dn.recorded("fdg")
FEATURES_REPLAY = dn.recorded("features_replay")
ADL_AND_DDG = dn.recorded_by_layer()
BP = dn.recorded("bp_same_mlp")
LABELLED = {"ids": lambda run: f"{run.case}-{run.variant}".rstrip("-")}
FAST = {
    ("fdg__two_linear", "beta0.5.current_weights"),
    ("features_replay__two_linear", "main_py"),
    ("bp_same_mlp__two_linear", ""),
    *(("delayed__adl_ddg", variant) for variant in ("adl_M2_b0.5", "ddg")),
}
"""Cases and variants that stand for the others, which are slow."""


pytestmark = pytest.mark.usefixtures("x64")


def marked(runs: list[dn.Recorded]) -> list[Any]:
    return nets.marked(runs, [run for run in runs if (run.case, run.variant) in FAST])


def check(run: dn.Recorded, method: jd.methods.Method, *, num_stages: int, devices: int = 1):
    """Trains on the recorded batches and compares all weights after every iteration."""
    sgd, batches = run.sgd, [dn.batch(*each) for each in run.batches]
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
    if run.losses is not None:
        np.testing.assert_allclose(losses, run.losses, rtol=2e-7)  # metrics are float32
    assert dn.largest_error(history[-1], run.initial()) > 0.01


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
    assert {len(run.batches) for run in (*FDG, *FEATURES_REPLAY, *BP)} == {12}
    assert [run.variant for run in ADL_AND_DDG] == [
        *(f"adl_M{accumulate}_b{beta}" for accumulate in (1, 2, 4) for beta in (0.5, 1.0)),
        "ddg",
    ]
    assert {len(run.batches) for run in ADL_AND_DDG} == {16}


@pytest.mark.parametrize("run", marked(FDG), **LABELLED)
def test_fdg(run):
    check(run, method(run), num_stages=run.num_stages)


@pytest.mark.parametrize("run", marked(FEATURES_REPLAY), **LABELLED)
def test_features_replay(run):
    check(run, method(run), num_stages=run.num_stages)


@pytest.mark.parametrize("run", marked(ADL_AND_DDG), ids=lambda run: run.variant)
def test_adl_and_ddg(run):
    """With current weights, by which their released code goes back."""
    check(run, method(run), num_stages=run.num_stages)


APART = [
    pick(FDG, "fdg__two_linear", "beta0.5.forward_weights"),
    pick(FDG, "fdg__two_linear", "beta1.0.current_weights"),
    pick(FEATURES_REPLAY, "features_replay__two_linear", "main_py"),
]


@pytest.mark.parametrize("run", nets.marked(APART, APART[:1]), **LABELLED)
def test_stages_on_devices_of_their_own(run):
    check(run, method(run), num_stages=run.num_stages, devices=run.num_stages)


@pytest.mark.parametrize("run", marked(BP), **LABELLED)
def test_backpropagation(run):
    check(run, method(run), num_stages=run.num_stages)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        pytest.param("fr", {}, marks=pytest.mark.slow),
        ("fdg", {}),
        pytest.param("ddg", {}, marks=pytest.mark.slow),
        pytest.param("adl", {"accumulate": 1}, marks=pytest.mark.slow),
    ],
)
def test_one_stage_is_backpropagation(name: str, arguments: dict[str, Any]):
    run = pick(BP, "bp_same_mlp__two_linear", "")
    check(run, jd.methods.get(name, **arguments), num_stages=1)
