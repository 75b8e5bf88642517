"""Float16 trains with scaled losses: what overflows is left out, and the numbers are float32's."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
from flax.training.dynamic_scale import DynamicScale

import jdecouple as jd
from jdecouple.methods.routes import loss_scale

DATA = nets.batches()
ROUTES = ("bp", "greedy_exit", "fdg")
FAST = ("greedy_exit",)
EACH_ROUTE = pytest.mark.parametrize("name", nets.marked(ROUTES, FAST))


@functools.cache
def half(name: str, **options: Any) -> jd.Trainer:
    """Two stages on one device, in float16, with averages of the weights."""
    given = {"num_stages": 2, "mesh": jd.make_mesh(1), "dtype": jnp.float16, "ema": 0.9}
    options = {**given, **options}
    return nets.build(name, **options)


def begun(trainer: jd.Trainer, *scales: float, good_steps: int = 0) -> Any:
    """An initial state with other scales, of all blocks or of each."""
    arrays = nets.to_arrays(trainer, trainer.init())
    for i in range(len(trainer.model.blocks)):
        scale = np.float32(scales[i if len(scales) > 1 else 0])
        arrays[f"block_{i}/loss_scale/scale"] = scale
        arrays[f"block_{i}/loss_scale/good_steps"] = np.int32(good_steps)
    return trainer.from_arrays(0, arrays)


def of_block(arrays: dict, index: int, *kinds: str) -> dict:
    names = tuple(f"block_{index}/{kind}/" for kind in kinds)
    return {name: value for name, value in arrays.items() if name.startswith(names)}


# --- The rule --------------------------------------------------------------------------------


def test_the_rule_is_flax_s(monkeypatch):
    monkeypatch.setattr(loss_scale, "PERIOD", 5)
    ours = loss_scale.initial()
    theirs = DynamicScale(growth_interval=4, scale=loss_scale.START, minimum_scale=1.0)
    finite = np.random.default_rng(0).random(400) < np.repeat([0.9, 0.3, 0.99, 1.0], 100)

    @jax.jit
    def step(ours, theirs, good):
        factor = jnp.where(good, 1.0, jnp.inf)
        theirs = theirs.value_and_grad(lambda x: factor * x)(1.0).dynamic_scale
        bounded = theirs.replace(scale=jnp.minimum(theirs.scale, loss_scale.MOST))
        return loss_scale.adjusted(ours, good), bounded

    seen = set()
    for good in finite:
        ours, theirs = step(ours, theirs, good)
        assert (ours["scale"], ours["good_steps"]) == (theirs.scale, theirs.fin_steps)
        seen.add(float(ours["scale"]))
    assert {loss_scale.LEAST, loss_scale.MOST} <= seen


# --- Overflow --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", nets.marked((*ROUTES, "fr", "ddg", "adl"), FAST))
def test_an_overflow_leaves_the_step_out_and_halves_the_scale(name):
    """Of the block, of the model, or of the stage and those that its error reaches."""
    trainer = half(name)
    state = begun(trainer, 2.0 ** (10 if name == "greedy_exit" else 24), 2.0**24)
    before = nets.to_arrays(trainer, state)
    skips = {0: [], 1: []}
    for step in range(16):
        state, metrics = trainer.step(state, DATA[step % len(DATA)])
        now = nets.to_arrays(trainer, state)
        for i, found in skips.items():
            owner = "" if name == "bp" else f"block_{i}/"
            used, skipped = (float(metrics[owner + key]) for key in ("loss_scale", "skipped"))
            if math.isnan(used):  # no batch has come so far
                continue
            old, new = (of_block(x, i, "params", "opt", "ema") for x in (before, now))
            good_steps, scale = of_block(now, i, "loss_scale").values()
            assert used == of_block(before, i, "loss_scale")[f"block_{i}/loss_scale/scale"]
            if skipped:
                assert nets.same_bits(old, new)
                assert (scale, good_steps) == (used / 2, 0)
            else:
                assert scale == used
                assert not good_steps or not nets.same_bits(old, new)
            found.append(skipped)
        before = now
    assert sum(skips[1]) >= 2
    assert sum(skips[0]) >= 2 if name != "greedy_exit" else not any(skips[0])
    assert not any(found[-1] for found in skips.values())
    assert all(np.isfinite(value).all() for value in now.values())


@EACH_ROUTE
def test_a_forward_that_overflows_spoils_nothing(name):
    """Running statistics neither: of a batch that float16 cannot hold."""
    trainer = half(name)
    wide = {**DATA[0], "x": DATA[0]["x"] * np.float32(1e5)}
    state, _ = nets.trained(trainer, DATA, 3, begun(trainer, 2.0**8))
    state, (_, first, *_, last) = nets.trained(trainer, [DATA[0], wide, *DATA], 6, state)
    assert not math.isfinite(first["loss"]) or name == "fdg"
    assert math.isfinite(last["loss"])
    arrays = nets.to_arrays(trainer, state)
    assert all(np.isfinite(value).all() for value in arrays.values())
    scales = [float(arrays[f"block_{i}/loss_scale/scale"]) for i in range(2)]
    assert max(scales) < 2**8


@EACH_ROUTE
def test_enough_good_steps_double_the_scale(name):
    trainer = half(name)
    state = begun(trainer, 4.0, good_steps=loss_scale.PERIOD - 3)
    scales = []
    for _ in range(6):
        state, _ = trainer.step(state, DATA[0])
        scales.append([of_block(nets.to_arrays(trainer, state), i, "loss_scale") for i in (0, 1)])
    for i in (0, 1):
        found = [
            (
                float(of[i][f"block_{i}/loss_scale/scale"]),
                int(of[i][f"block_{i}/loss_scale/good_steps"]),
            )
            for of in scales
        ]
        assert found[-1][0] == 8
        assert found[-1][1] < 4


@pytest.mark.slow
def test_one_bad_microbatch_leaves_the_whole_step_out():
    trainer = half("bp", microbatches=2)
    batch = {**DATA[0], "x": DATA[0]["x"].copy()}
    batch["x"][-1] = 1e5
    before = nets.to_arrays(trainer, trainer.init())
    state, metrics = trainer.step(begun(trainer, 2.0**8), batch)
    after = nets.to_arrays(trainer, state)
    assert metrics["skipped"] == 1
    assert nets.same_bits(
        nets.weights(trainer, state), {k: before[k] for k in before if "/params/" in k}
    )
    assert after["block_0/loss_scale/scale"] == 2**7


# --- The numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", nets.marked(jd.methods.names(), ("bp",)))
def test_training_is_that_of_float32(name):
    """To the rounding of float16, about 1e-3, which grows with the steps."""
    trainer, exact = half(name), half(name, dtype=None)
    state, metrics = nets.trained(trainer, DATA[:1], 3, begun(trainer, 2.0**8))
    wanted, expected = nets.trained(exact, DATA[:1], 3)
    found = nets.weights(trainer, state)
    error = nets.largest_error(found, nets.weights(exact, wanted))
    assert 0 < error < 0.05
    late = trainer.latency
    assert metrics[late]["loss"] == pytest.approx(expected[late]["loss"], rel=5e-3)
    assert {value.dtype for value in found.values()} == {np.dtype(np.float32)}
    assert not [key for key in exact.to_arrays(wanted) if "loss_scale" in key]
    _, metrics = nets.trained(trainer, DATA[:1], 20, state)
    assert metrics[-1]["loss"] < 0.95 * expected[late]["loss"]


@pytest.mark.parametrize("name", nets.marked(nets.DELAYED, ("fdg",)))
def test_an_error_meets_the_scale_that_it_was_sent_with(name):
    """Stages have scales of their own, which are no part of the numbers."""
    trainer = half(name)
    weights = []
    for scales in ((2.0**12,), (2.0**9, 2.0**14), (2.0**14, 2.0**9)):
        state, _ = nets.trained(trainer, DATA, 6, begun(trainer, *scales))
        weights.append(nets.weights(trainer, state))
    assert all(nets.largest_error(each, weights[0]) < 2e-3 for each in weights[1:])
    moved = nets.largest_error(weights[0], nets.weights(trainer, trainer.init()))
    assert moved > 0.02


@pytest.mark.slow
def test_an_error_with_its_scale_goes_to_replicas():
    found = []
    for mesh in (jd.make_mesh(1), jd.make_mesh(2, 2)):
        trainer = half("fdg", mesh=mesh)
        state, _ = nets.trained(trainer, DATA, 6, begun(trainer, 2.0**9, 2.0**14))
        found.append(nets.weights(trainer, state))
    assert nets.largest_error(*found) < 2e-3


@pytest.mark.slow
def test_stages_apart_leave_out_the_same_steps():
    """Each has a copy of the scale, and hears of the norm of all."""
    found = []
    for options in ({}, {"mesh": jd.make_mesh(2), "schedule": "1f1b"}):
        trainer = half("bp", **options)
        state, metrics = nets.trained(trainer, DATA, 10, begun(trainer, 2.0**24))
        scales = [(each["loss_scale"], each["skipped"]) for each in metrics]
        found.append((nets.weights(trainer, state), scales))
    (weights, scales), (wanted, expected) = found
    assert scales == expected
    assert {skipped for _, skipped in scales} == {0, 1}
    assert nets.largest_error(weights, wanted) < 0.01


def run(name: str, **options: Any) -> tuple[list, dict]:
    """Scales in every step, and the weights, of a run that begins with an overflow."""
    model, start = nets.user_model(dropout=0.0), 2.0 ** (19 if name == "early_exit" else 24)
    trainer = nets.build(name, model=model, dtype=jnp.float16, **options)
    state, metrics = nets.trained(trainer, DATA, 8, begun(trainer, start))
    scales = [
        {k: v for k, v in each.items() if k.endswith(("loss_scale", "skipped"))} for each in metrics
    ]
    return scales, nets.weights(trainer, state)


reference = functools.cache(run)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("bp", {"num_stages": 2, "schedule": "1f1b"}, marks=pytest.mark.slow),
        pytest.param("bp", {"num_stages": 4, "engine": "spmd"}, marks=pytest.mark.slow),
        pytest.param("bp", {"num_stages": 4, "schedule": "gpipe"}, marks=pytest.mark.slow),
        pytest.param(
            "bp", {"num_stages": 2, "schedule": "interleaved_1f1b"}, marks=pytest.mark.slow
        ),
        pytest.param("bp", {"mesh": (1, 2)}, marks=pytest.mark.slow),
        pytest.param("greedy_exit", {"num_stages": 4, "engine": "spmd"}, marks=pytest.mark.slow),
        pytest.param("greedy_exit", {"num_stages": 2}, marks=pytest.mark.slow),
        pytest.param("early_exit", {"num_stages": 2, "engine": "spmd"}, marks=pytest.mark.slow),
    ],
)
def test_scales_do_not_depend_on_where_things_run(name, options):
    if "mesh" in options:
        options = {**options, "mesh": jd.make_mesh(*options["mesh"])}
    scales, weights = run(name, microbatches=2, **options)
    expected, wanted = reference(name, microbatches=2)
    assert scales == expected
    assert {step["skipped"] for step in expected if "skipped" in step} in ({0, 1}, set())
    assert nets.largest_error(weights, wanted) < 0.01


@EACH_ROUTE
def test_a_state_goes_on_to_the_bit(name):
    trainer = half(name)
    state, _ = nets.trained(trainer, DATA, 3, begun(trainer, 2.0**24))
    arrays = nets.to_arrays(trainer, state)
    restored, _ = nets.trained(trainer, DATA, 3, trainer.from_arrays(3, arrays))
    straight, _ = nets.trained(trainer, DATA, 3, begun(trainer, 2.0**24))
    straight, _ = nets.trained(trainer, DATA, 3, straight)
    found = nets.to_arrays(trainer, straight)
    assert nets.same_bits(nets.to_arrays(trainer, restored), found)
    scales = {key: x.dtype for key, x in found.items() if "/loss_scale/" in key}
    assert {*scales.values()} == {np.dtype(np.float32), np.dtype(np.int32)}


def test_another_dtype_s_state_is_taken_over():
    trainer, exact = half("bp"), half("bp", dtype=None)
    state, _ = nets.trained(exact, DATA, 2)
    taken = trainer.from_arrays(2, exact.to_arrays(state))
    assert nets.same_bits(nets.weights(trainer, taken), nets.weights(exact, state))
    assert float(trainer.to_arrays(taken)["block_1/loss_scale/scale"]) == loss_scale.START
    exact.from_arrays(2, trainer.to_arrays(taken))
