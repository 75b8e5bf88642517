"""Backwards in two parts: the error now, the weights' gradient later."""

import functools
import weakref
from collections import Counter, defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
from flax import nnx

import jdecouple as jd
from jdecouple.methods.routes.splitting import defer
from jdecouple.models import layers
from jdecouple.pipeline.plan.graph import size_of

pytestmark = pytest.mark.usefixtures("module_x64")

DATA = nets.batches(dtype=np.float64)
IMAGES = {"x": np.zeros((8, 8, 8, 1), np.uint8), "label": np.zeros(8, np.int32)}


# --- The split -----------------------------------------------------------------------------------


def products(jaxpr: Any) -> Counter:
    """Products of two matrices and convolutions, on CPUs, in a function and all that it calls."""
    found: Counter = Counter()
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            found[name] += min(np.prod(v.aval.shape[:-1]) for v in equation.invars) > 1
        elif name == "conv_general_dilated":
            found[name] += 1
        bodies = params.get("branches", ())[:1] or [params.get("jaxpr", params.get("call_jaxpr"))]
        for body in bodies:
            if body is not None:
                found += products(getattr(body, "jaxpr", body))
    return found


def parts(trainer: jd.Trainer) -> tuple[Counter, Counter, Counter, Any, Any]:
    """Products of the last stage's whole backward, of its two parts; what is kept for each."""
    stage, route = trainer.stages[-1], trainer.method.route
    state, step_id = jax.eval_shape(stage.initial), jax.ShapeDtypeStruct((2,), jnp.int32)
    forward = functools.partial(route.forward, stage)
    residuals = jax.eval_shape(forward, state, stage.carry, step_id)[2]
    backward = functools.partial(route.backward, stage)
    arguments = state, residuals, None, step_id
    whole = jax.make_jaxpr(backward)(*arguments)
    now, (_, later) = jax.make_jaxpr(functools.partial(defer, backward), return_shape=True)(
        *arguments
    )
    rest = jax.make_jaxpr(lambda later: later())(later)
    return *(products(each.jaxpr) for each in (whole, now, rest)), residuals, later


def size(tree: Any) -> int:
    return sum(map(size_of, jax.tree.leaves(tree)))


def convolutions() -> jd.Model:
    rngs = nnx.Rngs(0)

    def block(before: int) -> nnx.Module:
        conv = layers.conv(before, 4, rngs=rngs)
        return nnx.Sequential(conv, layers.BatchNorm(4, rngs=rngs), nnx.relu)

    head = nnx.Sequential(layers.GlobalAveragePool(), nnx.Linear(4, nets.CLASSES, rngs=rngs))
    return jd.Model([block(1), block(4), block(4), block(4)], head)


@pytest.mark.parametrize(
    ("remat", "repeated"),
    [
        ("none", 0),
        pytest.param("elementwise", 0, marks=pytest.mark.slow),
        ("blocks", 3),
        pytest.param("stages", 3, marks=pytest.mark.slow),
    ],
)
def test_no_product_is_computed_twice(remat, repeated):
    """Of two dense layers and a classifier each has an error and a gradient."""
    trainer = nets.build("bp", model=nets.mlp(), num_stages=2, remat=remat)
    whole, now, later, *_ = parts(trainer)
    assert later == {"dot_general": 3}
    assert now == {"dot_general": 3 + repeated}
    assert now + later == whole


REPEATED = (("elementwise", 0), ("blocks", 2))


@pytest.mark.parametrize(
    ("remat", "repeated"),
    [("none", 0), *(pytest.param(*case, marks=pytest.mark.slow) for case in REPEATED)],
)
def test_convolutions_keep_their_inputs_and_the_errors_of_their_outputs(remat, repeated):
    trainer = nets.build("bp", model=convolutions(), num_stages=2, remat=remat, example=IMAGES)
    whole, now, later, _, kept = parts(trainer)
    assert now + later == whole
    assert later == {"conv_general_dilated": 2, "dot_general": 1}
    assert now["conv_general_dilated"] == 2 + repeated
    large = [leaf.shape for leaf in jax.tree.leaves(kept) if leaf.ndim == 4]
    assert large == [(*IMAGES["x"].shape[:3], 4)] * 4  # nothing for BatchNorm and activations
    assert size(kept) < 1.05 * sum(4 * np.prod(shape) for shape in large)


class TestDefer:
    def test_both_results_are_those_of_the_function(self):
        """Also from another compiled call; with all kinds of leaves."""
        table = jnp.arange(3.0)

        @jax.checkpoint
        def layer(weights, x):
            return jnp.tanh(x @ weights) * table

        def both(weights, x, index, key, nothing):
            y, pullback = jax.vjp(layer, weights, x)
            by_weights, by_x = pullback(y + jax.random.normal(key, y.shape))
            return {"w": by_weights, "x": x, "i": index, "none": nothing, "1": 1.0}, (by_x, index)

        arguments = jnp.eye(3), jnp.ones((4, 3)), jnp.arange(2), jax.random.key(0), None
        wanted, expected = jax.jit(both)(*arguments)
        now, later = jax.jit(functools.partial(defer, both))(*arguments)
        found = jax.jit(lambda later: later())(later)
        assert jax.tree.structure(found) == jax.tree.structure(wanted)
        for one, other in zip(
            jax.tree.leaves((found, now)), jax.tree.leaves((wanted, expected)), strict=True
        ):
            np.testing.assert_array_equal(one, other)

    def test_nothing_is_computed_where_nothing_is_needed_now(self):
        jaxpr = jax.make_jaxpr(functools.partial(defer, lambda x: (x @ x + x, None)))(jnp.eye(2))
        assert not jaxpr.eqns

    def test_sums_are_done_at_once_where_that_keeps_less(self):
        """Both arrays stand in two sums, and go when both are done."""

        def sums(x):
            y = x * jnp.arange(4.0)
            return (x.sum(0), (x * y).sum(0)), jnp.tanh(y)

        later = jax.eval_shape(functools.partial(defer, sums), jnp.ones((8, 4)))[1]
        assert [leaf.shape for leaf in jax.tree.leaves(later)] == [(4,), (4,)]

    def test_a_loop_stays_whole(self):
        def loop(x):
            return jax.lax.scan(lambda c, _: (c @ x, c + x), x, None, 2)

        now, later = defer(loop, jnp.eye(2))
        np.testing.assert_array_equal(later(), jnp.eye(2))
        np.testing.assert_array_equal(now, [2 * jnp.eye(2)] * 2)


# --- Trainings -----------------------------------------------------------------------------------


def live_microbatches(schedule: str, stages: int, microbatches: int) -> list[int]:
    """Most microbatches of which a stage held an array between two calls."""
    trainer = nets.build(
        "bp",
        model=nets.mlp(param_dtype=jnp.float64),
        num_stages=stages,
        microbatches=microbatches,
        schedule=schedule,
        fuse=False,
        mesh=jd.make_mesh(1),
        example=DATA[0],
    )
    executor = trainer._engine._executor
    held: dict[int, list[list]] = defaultdict(list)  # arrays of every microbatch
    peak = [0] * stages

    def watched(stage: int, call: Any) -> Any:
        def watch(*arguments: Any) -> Any:
            for k in range(stages):
                peak[k] = max(peak[k], sum(any(map(alive, own)) for own in held[k]))
            taken = {id(leaf) for leaf in jax.tree.leaves(arguments[2])}
            out = call(*arguments)
            left = [weakref.ref(leaf) for leaf in jax.tree.leaves(out.get("residuals"))]
            own = [each for each in held[stage] if taken & {id(ref()) for ref in each}]
            if taken and own:
                own[0] += left
            elif left:
                held[stage].append(left)
            return out

        return watch

    def alive(ref: Any) -> bool:
        return ref() is not None

    for (stage, kinds), call in executor._compiled.items():
        if kinds:
            executor._compiled[stage, kinds] = watched(stage, call)
    trainer.step(trainer.init(), DATA[0])
    return peak


@pytest.mark.parametrize(
    ("schedule", "stages", "microbatches"),
    [
        ("zb_h1", 2, 4),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("zb_h1", 4, 8), ("zbv", 4, 4), ("dualpipe_v", 4, 8), ("1f1b", 4, 8)]
        ),
    ],
)
def test_live_activations_are_those_of_the_schedule(schedule, stages, microbatches):
    """The weights' gradient ends what a forward begins."""
    table = jd.schedules.build(schedule, stages, microbatches)
    wanted = list(jd.schedules.simulate(table, jd.schedules.Costs(1.0, 1.0, weight=1.0)).peak_live)
    if not table.splits:
        wanted[-1] = 0  # forward and backward are one call
    assert live_microbatches(schedule, stages, microbatches) == wanted


def delayed(name: str, schedule: str, **options: Any) -> jd.Trainer:
    return nets.build(
        name,
        model=nets.mlp(depth=2, batch_norm=True, param_dtype=jnp.float64),
        num_stages=2,
        schedule=schedule,
        example=DATA[0],
        mesh=jd.make_mesh(1),
        **options,
    )


@functools.cache
def six_steps(name: str) -> dict[str, np.ndarray]:
    trainer = delayed(name, nets.method(name).route.schedules[0])
    return nets.to_arrays(trainer, nets.trained(trainer, DATA, 6)[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", nets.marked(nets.DELAYED, ("fdg",)))
def test_a_delayed_method_resumes_with_early_errors(name):
    """To the last bit, where all stages are one call."""
    plain, early = nets.method(name).route.schedules
    trainer = delayed(name, early)
    half = nets.to_arrays(trainer, nets.trained(trainer, DATA, 4)[0])
    other = delayed(name, plain)
    state = other.from_arrays(4, half)
    for step in (4, 5):
        state, _ = other.step(state, DATA[step % len(DATA)])
    assert nets.same_bits(nets.to_arrays(other, state), six_steps(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", nets.DELAYED)
def test_early_errors_of_stages_apart(name):
    trainer = delayed(name, nets.method(name).route.schedules[1], fuse=False)
    found = nets.to_arrays(trainer, nets.trained(trainer, DATA, 6)[0])
    assert nets.largest_error(found, six_steps(name)) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["zb_h1", "zbv", "dualpipe_v"])
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": jnp.float16, "gradient_norms": True},
        {"remat": "blocks", "ema": 0.9, "clip_norm": 0.5},
        {"remat": "none", "mesh": jd.make_mesh(2, 2)},
        {"remat": ("none", "stages", "elementwise", "none"), "optimizer": jd.optim.sgd(0.05)},
    ],
    ids=["float16", "averages", "replicas", "remat"],
)
def test_options(schedule, options):
    """Against 1f1b, four stages apart."""
    found = []
    for name in ("1f1b", schedule):
        trainer = nets.build(
            "early_exit",
            model=nets.user_model(),
            num_stages=4,
            microbatches=4,
            schedule=name,
            example=nets.batches(1)[0],
            **{"fuse": False, "mesh": jd.make_mesh(4), **options},
        )
        state, metrics = nets.trained(trainer, nets.batches(), 16)
        found.append((nets.to_arrays(trainer, state), metrics))
    (arrays, metrics), (wanted, expected) = found
    tolerance = 5e-3 if "dtype" in options else 1e-5
    assert nets.largest_error(arrays, wanted) < tolerance
    assert metrics[-1] == pytest.approx(expected[-1], rel=10 * tolerance)
    assert metrics[-1]["loss"] < metrics[0]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["zb_h1", "zbv"])
def test_convolutions_train_alike(schedule):
    found = []
    for name in ("1f1b", schedule):
        trainer = nets.build(
            "bp",
            model=convolutions(),
            num_stages=4,
            microbatches=4,
            schedule=name,
            mesh=jd.make_mesh(2),
            example=nets.images(1)[0],
        )
        state, _ = nets.trained(trainer, nets.images(), 5)
        found.append(nets.to_arrays(trainer, state))
    assert nets.largest_error(*found) < 1e-5
