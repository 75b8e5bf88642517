"""`jax_debug_nans` finds what is wrong, and nothing where all is well."""

import chex
import jax
import nets
import numpy as np
import pytest

import jdecouple as jd
from jdecouple.pipeline.diagnostics import SufficientDirection

DATA = nets.batches(3)


@pytest.fixture(autouse=True)
def _debug_nans():
    with jax.debug_nans(True):
        yield


def make(name: str, **options):
    mesh = jd.make_mesh(2, devices=jax.devices()[:1])
    options = {"mesh": mesh, "example": DATA[0], "num_classes": nets.CLASSES, **options}
    return jd.Trainer(nets.mlp(depth=2), nets.method(name), jd.optim.sgd(0.05), **options)


def losses(trainer, steps: int = 3) -> list[float]:
    state, found = trainer.init(), []
    for number in range(steps):
        state, metrics = trainer.step(state, DATA[number])
        found.append(float(metrics["loss"]))
    return found


@pytest.mark.parametrize("name", nets.marked(jd.methods.names(), ("deinforeg", "fdg")))
def test_every_method_trains(name):
    late = [np.nan] if name in ("fdg", "adl", "dsp", "petra") else []
    found = losses(make(name))
    assert [np.isnan(loss) for loss in found] == [*map(np.isnan, late), *[False] * (3 - len(late))]


@pytest.mark.slow
def test_no_loss_is_known_while_the_stages_fill():
    """Apart, in one call, in one call of several batches, after `finish`, and from arrays."""
    trainer = make("fdg", fuse=False)
    state, metrics = trainer.step(trainer.init(), DATA[0])
    assert all(np.isnan(value) for name, value in metrics.items() if name != "block_0/loss")
    state, metrics = trainer.steps(state, [DATA[1]])
    assert np.isfinite(metrics["loss"]).tolist() == [True]
    state = trainer.finish(state)
    state = trainer.from_arrays(state.step, trainer.to_arrays(state))
    state, metrics = trainer.steps(state, [DATA[2]])
    assert np.isnan(metrics["loss"]).tolist() == [True]
    state, metrics = trainer.step(state, DATA[0])
    assert np.isfinite(metrics["loss"])

    fused = make("fdg", fuse=True)
    _, metrics = fused.steps(fused.init(), DATA)
    assert np.isfinite(metrics["loss"]).tolist() == [False, True, True]


def test_sufficient_direction_is_measured():
    trainer = make("fr", fuse=False)
    state, _ = trainer.step(trainer.init(), DATA[0])
    measure = SufficientDirection(trainer)
    chex.assert_tree_all_finite(measure(state))
    found = measure(trainer.finish(state))
    assert len(found) == 2
    assert np.isnan(jax.device_get(list(found.values()))).all()


@pytest.mark.parametrize("name", ["bp", "fdg"])
def test_what_is_wrong_is_found(name):
    trainer = make(name)
    arrays = {
        key: np.full_like(value, np.nan) if "/params/" in key else value
        for key, value in jax.device_get(trainer.to_arrays(trainer.init())).items()
    }
    with jax.debug_nans(False):
        state = trainer.from_arrays(0, arrays)
    with pytest.raises(FloatingPointError):
        trainer.step(state, DATA[0])
