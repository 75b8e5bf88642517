"""Schedules of the synchronous route: one gradient, whatever the order of work; and its options."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import nets
import numpy as np
import optax
import pytest
from flax import nnx

import jdecouple as jd
from jdecouple.methods.routes import Synchronous
from jdecouple.pipeline.mpmd.stage_fns import calls_of
from jdecouple.schedules import Kind

pytestmark = pytest.mark.usefixtures("module_x64")

STEPS = 20
CLIP = 0.65  # some of the gradients are longer, some shorter
SCHEDULES = Synchronous.schedules
DATA = nets.batches(dtype=np.float64)
SIZES = [*itertools.product((1, 2, 4), (1, 2, 4, 8))]
# On two stages interleaved_1f1b is 1f1b, and zbv has one device.
FAST = [((2, 2), schedule, None) for schedule in ("gpipe", "zbv")]
FAST += [((2, 2), "zb_h1", CLIP), ((4, 8), "interleaved_1f1b", CLIP)]


def build(stages: int = 1, microbatches: int = 1, **options: Any) -> jd.Trainer:
    """BP of a perceptron without BatchNorm, on as many devices as stages."""
    options = {"mesh": jd.make_mesh(stages), **options}
    return jd.Trainer(
        options.pop("model", None) or nets.mlp(param_dtype=jnp.float64),
        nets.method("bp"),
        jd.optim.sgd(0.1, momentum=0.9),
        num_stages=stages,
        microbatches=microbatches,
        example=DATA[0],
        **options,
    )


@functools.cache
def run(*sizes: int, **options: Any) -> tuple[dict[str, np.ndarray], list[dict[str, float]]]:
    trainer = build(*sizes, **options)
    state, metrics = nets.trained(trainer, DATA, STEPS)
    return nets.to_arrays(trainer, state), metrics


@pytest.mark.parametrize(
    ("sizes", "schedule", "clip_norm"),
    [
        case if case in FAST else pytest.param(*case, marks=pytest.mark.slow)
        for case in itertools.product(SIZES, SCHEDULES, (None, CLIP))
    ],
)
def test_every_schedule_trains_as_one_stage_on_the_whole_batch(sizes, schedule, clip_norm):
    """For so many stages and microbatches."""
    arrays, metrics = run(*sizes, schedule=schedule, clip_norm=clip_norm)
    wanted, expected = run(clip_norm=clip_norm)
    assert nets.largest_error(arrays, wanted) < 1e-12
    for here, there in zip(metrics, expected, strict=True):
        assert here == pytest.approx(there, rel=2e-6)


@functools.cache
def with_batch_norm(stages: int, schedule: str) -> dict[str, np.ndarray]:
    """Arrays after three steps of two microbatches."""
    model = nets.user_model(depth=2, param_dtype=jnp.float64)
    trainer = build(stages, 2, schedule=schedule, model=model)
    state, _ = nets.trained(trainer, DATA, 3)
    return nets.to_arrays(trainer, state)


@pytest.mark.parametrize("schedule", nets.marked(SCHEDULES, ()))
def test_batch_statistics_are_those_of_the_microbatches(schedule):
    """Running statistics move once for every microbatch, in order, whatever the schedule."""
    found = with_batch_norm(2, schedule)
    wanted = with_batch_norm(1, "sequential")
    assert nets.largest_error(found, wanted) < 1e-12
    assert np.abs(found["block_0/stats/block/norm/mean"]).max() > 0.01


# --- Clipping ------------------------------------------------------------------------------------


def test_clipping_is_that_of_optax_on_the_whole_gradient():
    """Against plain JAX and optax.clip_by_global_norm."""
    model = nets.mlp(param_dtype=jnp.float64)
    modules = nnx.List([*model.blocks, model.classifier])
    definition, params = nnx.split(modules)
    tx = optax.chain(optax.clip_by_global_norm(CLIP), jd.optim.sgd(0.1, momentum=0.9))
    opt = tx.init(params)
    norms = []

    @jax.jit
    @jax.grad
    def gradient(params, x, label):
        for module in nnx.merge(definition, params):
            x = module(x)
        return optax.softmax_cross_entropy_with_integer_labels(x, label).mean()

    for step in range(STEPS):
        batch = DATA[step % len(DATA)]
        found = gradient(params, batch["x"], batch["label"])
        norms.append(float(optax.tree.norm(found)))
        updates, opt = tx.update(found, opt, params)
        params = optax.apply_updates(params, updates)
    arrays, metrics = run(4, 8, schedule="interleaved_1f1b", clip_norm=CLIP)
    assert min(norms) < CLIP < max(norms)
    assert [each["gradient_norm"] for each in metrics] == pytest.approx(norms, rel=1e-6)
    blocks = nnx.merge(definition, params)
    kernel = blocks[0].layers[1].kernel[...]
    np.testing.assert_allclose(arrays["block_0/params/block/layers/1/kernel"], kernel, atol=1e-12)
    head = "block_3/params/head/classifier/kernel"
    np.testing.assert_allclose(arrays[head], blocks[-1].kernel[...], atol=1e-12)


@pytest.mark.parametrize(
    "name",
    nets.marked(
        each for each in jd.methods.names() if not isinstance(nets.method(each).route, Synchronous)
    ),
)
def test_stages_that_do_not_wait_cannot_be_clipped_together(name):
    nets.assert_clear(
        ValueError, ("clip_norm", name, "synchronous"), lambda: nets.build(name, clip_norm=1.0)
    )


@pytest.mark.parametrize("clip_norm", [0, -1.0, float("nan"), float("inf"), "1", True])
def test_bad_bounds_are_refused(clip_norm):
    nets.assert_clear(ValueError, ("clip_norm", "above 0"), lambda: build(clip_norm=clip_norm))


# --- Memory --------------------------------------------------------------------------------------

WIDTHS = (11, 13, 17, 19)


class Block(nnx.Module):
    """Its width is its own, and its backward needs a mask: so it can be told in memory."""

    def __init__(self, size: int, width: int, rngs: nnx.Rngs):
        self.dense = nnx.Linear(size, width, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.dense(x))


def live_microbatches(schedule: str, stages: int, microbatches: int, **options: Any) -> list[int]:
    """Most microbatches whose activations a stage held between two calls, counted in memory."""
    sizes = (nets.FEATURES, *WIDTHS)
    rngs = nnx.Rngs(0)
    model = jd.Model(
        [Block(size, width, rngs) for size, width in itertools.pairwise(sizes)],
        nnx.Linear(WIDTHS[-1], nets.CLASSES, param_dtype=jnp.float64, rngs=rngs),
    )
    options = {"schedule": schedule, "model": model, "remat": "none", **options}
    trainer = build(stages, microbatches, **options)
    state, _ = trainer.step(trainer.init(), DATA[0])
    trainer.wait(state)
    engine = trainer._engine._executor
    peak = [0] * stages
    per_stage = len(WIDTHS) // stages

    def counting(call: Any) -> Any:
        def counted(*arguments: Any) -> Any:
            out = call(*arguments)
            del arguments
            for stage in range(stages):
                width = WIDTHS[stage * per_stage]
                shape = (16 // microbatches, width)
                masks = [a for a in jax.live_arrays() if (a.dtype, a.shape) == (bool, shape)]
                peak[stage] = max(peak[stage], len(masks))
            return out

        return counted

    for key, call in engine._compiled.items():
        engine._compiled[key] = counting(call)
    state, _ = trainer.step(state, DATA[1])
    trainer.wait(state)
    return peak


@pytest.mark.slow
@pytest.mark.parametrize("microbatches", nets.marked((2, 4, 8), (4,)))
def test_live_activations_are_those_of_the_schedule(microbatches):
    """gpipe holds M microbatches, 1f1b min(M, K - k); the last call of a stage frees its own."""
    stages = 4
    assert live_microbatches("gpipe", stages, microbatches)[:-1] == [microbatches] * (stages - 1)
    assert live_microbatches("1f1b", stages, microbatches)[:-1] == [
        min(microbatches, stages - k) for k in range(stages - 1)
    ]


@pytest.mark.parametrize(
    ("remat", "large"),
    [
        ("none", ["bool"] * 2 + ["float64"] * 6),
        ("elementwise", ["float64"] * 4),
        ("blocks", ["float64"] * 2),
        ("stages", ["float64"]),
        ("offload", ["float64"] * 4),
    ],
)
def test_what_a_stage_keeps(remat, large):
    """Types of the residuals that are as large as its input."""
    trainer = build(2, 2, schedule="gpipe", remat=remat)
    stage = trainer.stages[1]
    kept = jax.eval_shape(
        lambda s, m, t: trainer.method.route.forward(stage, s, m, t)[2],
        jax.eval_shape(stage.initial),
        stage.carry,
        jax.ShapeDtypeStruct((2,), jnp.int32),
    )
    found = [leaf for leaf in jax.tree.leaves(kept) if leaf.ndim == 2 and leaf.shape[0] == 8]
    assert sorted(str(leaf.dtype) for leaf in found) == large


@pytest.mark.parametrize(
    "remat", nets.marked(("none", "elementwise", "blocks", "stages", "offload"), ("elementwise",))
)
def test_what_a_stage_keeps_changes_no_numbers(remat):
    arrays, _ = run(2, 2, schedule="gpipe", remat=remat)
    assert nets.largest_error(arrays, run()[0]) < 1e-12


@pytest.mark.slow
def test_rematerialisation_of_some_stages():
    arrays, _ = run(2, 2, schedule="1f1b", remat=("stages", "none"))
    assert nets.largest_error(arrays, run()[0]) < 1e-12
    nets.assert_clear(
        ValueError, ("remat has 3", "2 stages"), lambda: build(2, remat=("none",) * 3)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", nets.marked(("deinforeg", "fdg"), ("fdg",)))
def test_rematerialisation_changes_no_numbers(name):
    found = []
    for remat in ("none", "stages"):
        model = nets.user_model(depth=2, param_dtype=jnp.float64)
        trainer = nets.build(name, model=model, num_stages=2, remat=remat, example=DATA[0])
        state, _ = nets.trained(trainer, DATA, 4)
        found.append(nets.weights(trainer, state))
    assert nets.largest_error(*found) < 1e-12


# --- Placement -----------------------------------------------------------------------------------


def test_chunks_of_a_device_go_round():
    trainer = build(4, 4, schedule="interleaved_1f1b", mesh=jd.make_mesh(2))
    first, second = jax.devices()[:2]
    assert [placement.devices for placement in trainer.placements] == [(first,), (second,)] * 2


@pytest.mark.slow
def test_uneven_replicas_train_the_same():
    mesh = jd.make_mesh(replicas=(2, 1, 1))
    arrays, _ = run(3, 2, schedule="1f1b", mesh=mesh)
    assert nets.largest_error(arrays, run()[0]) < 1e-12
    trainer = build(3, 2, mesh=mesh)
    assert [len(placement.devices) for placement in trainer.placements] == [2, 1, 1]
    state = trainer.init()
    odd = {key: value[:5] for key, value in DATA[1].items()}
    assert trainer.evaluate(state, [DATA[0], odd]) == pytest.approx(
        build().evaluate(build().init(), [DATA[0], odd])
    )


@pytest.mark.parametrize(
    ("replicas", "words"),
    [
        ((), ("replicas are ()",)),
        ((2, 0), ("replicas are (2, 0)", "at least 1")),
        ((1.5, 1), ("1.5", "whole number")),
        ((8, 1), ("need 9 devices", "8")),
    ],
)
def test_bad_replicas_are_refused(replicas, words):
    nets.assert_clear(ValueError, words, lambda: jd.make_mesh(replicas=replicas))


# --- Measuring every call ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "schedule", "microbatches"),
    [
        ("bp", "1f1b", 4),
        pytest.param("deinforeg", "auto", 2, marks=pytest.mark.slow),
        pytest.param("fdg", "auto", 1, marks=pytest.mark.slow),
        pytest.param("fr", "auto", 1, marks=pytest.mark.slow),
    ],
)
def test_measuring_trains_as_a_step_does(name, schedule, microbatches):
    model = nets.user_model(depth=2, param_dtype=jnp.float64)
    trainer = nets.build(
        name,
        model=model,
        num_stages=2,
        microbatches=microbatches,
        schedule=schedule,
        example=DATA[0],
    )
    state, _ = nets.trained(trainer, DATA, 3)
    measured, found = trainer.measure(
        trainer.from_arrays(3, nets.to_arrays(trainer, state)), DATA[3]
    )
    state, _ = trainer.step(state, DATA[3])
    assert nets.same_bits(nets.to_arrays(trainer, measured), nets.to_arrays(trainer, state))
    assert [call for call, _ in found] == list(trainer.schedule.calls())
    assert all(seconds > 0 for _, seconds in found)


def test_measuring_needs_calls():
    trainer = build()
    nets.assert_clear(ValueError, ("fuse=False",), lambda: trainer.measure(trainer.init(), DATA[0]))


def test_steps_that_wait_for_a_norm_come_last():
    schedule = jd.schedules.build("1f1b", 2, 2)
    calls = calls_of(schedule, needs_norm=True)
    assert [call.kinds for call in calls[-2:]] == [(Kind.STEP,)] * 2
    assert all(Kind.STEP not in call.kinds for call in calls[:-2])
