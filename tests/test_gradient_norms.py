"""The norms of gradients among the metrics: right on every route, and free of side effects."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import nets
import numpy as np
import optax
import pytest
import spmd_nets
from flax import nnx

import jdecouple as jd

pytestmark = pytest.mark.usefixtures("module_x64")

DATA = nets.batches(dtype=np.float64)
RATE = 0.01


def build(name: str, **options: Any) -> jd.Trainer:
    """Two blocks in float64, by plain steps, so that a step is the gradient."""
    model = nets.mlp(depth=2, param_dtype=jnp.float64)
    given = {"model": model, "example": DATA[0], "optimizer": optax.sgd(RATE)}
    return nets.build(name, **{**given, "gradient_norms": True, **options})


def moved(trainer: jd.Trainer, steps: int = 4, data: list[dict] = DATA) -> tuple[list, list]:
    """Metrics of some steps, and how far each has moved the blocks, as norms of gradients."""
    state = trainer.init()
    before = nets.weights(trainer, state)
    rows, norms = [], []
    for step in range(steps):
        state, metrics = trainer.step(state, data[step % len(data)])
        rows.append({name: float(value) for name, value in metrics.items()})
        after = nets.weights(trainer, state)
        squares: dict[str, float] = {}
        for name, value in after.items():
            block = name.split("/")[0]
            squares[block] = squares.get(block, 0) + ((before[name] - value) ** 2).sum() / RATE**2
        norms.append({block: square**0.5 for block, square in squares.items()})
        before = after
    return rows, norms


def assert_told(rows: list[dict], norms: list[dict]) -> None:
    for row, expected in zip(rows, norms, strict=True):
        told = {block: row[f"{block}/gradient_norm"] for block in expected}
        absent = {block for block, value in told.items() if math.isnan(value)}
        assert absent == {block for block, value in expected.items() if value == 0}
        whole = sum(value**2 for value in expected.values()) ** 0.5
        if absent:
            assert math.isnan(row["gradient_norm"])
        else:
            assert row["gradient_norm"] == pytest.approx(whole, rel=1e-6)
        there = expected.keys() - absent
        assert [told[each] for each in there] == pytest.approx(
            [expected[each] for each in there], rel=1e-6
        )


APART = {"num_stages": 2, "mesh": jd.make_mesh(1), "fuse": False}
FUSED = {"num_stages": 2, "mesh": jd.make_mesh(1)}
SPMD = {"mesh": jd.make_mesh(2), "engine": "spmd", "microbatches": 2}
FAST = [
    ("bp", {**APART, "microbatches": 4, "schedule": "1f1b"}),
    ("greedy_exit", {**APART, "frozen": [0]}),
    ("fdg", FUSED),
]
SLOW = [
    ("bp", SPMD),
    ("greedy_exit", FUSED),
    ("fr", APART),
    ("greedy_exit", SPMD),
    ("bp", {**APART, "microbatches": 2, "schedule": "gpipe"}),
    ("bp", {"mesh": jd.make_mesh(2, 2), "microbatches": 2}),
    ("early_exit", FUSED),
    ("greedy_exit", {"mesh": jd.make_mesh(2, 2), "microbatches": 4}),
    ("ddg", APART),
    ("fdg", {"mesh": jd.make_mesh(2)}),
]


@pytest.mark.parametrize(
    ("name", "options"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_a_norm_is_that_of_the_gradient_that_a_step_uses(name, options):
    if options.get("engine") == "spmd":
        options = {**options, "model": nets.mlp(depth=4, param_dtype=jnp.float64)}
    rows, norms = moved(build(name, **options))
    if "frozen" in options:
        assert {norm.pop("block_0") for norm in norms} == {0}
        assert "block_0/gradient_norm" not in rows[0]
    assert all(norm["block_1"] > 0.01 for norm in norms[2:])
    assert_told(rows, norms)


def plain(x: Any, label: Any, *modules: nnx.Module) -> jax.Array:
    for module in modules:
        x = module(x)
    return optax.softmax_cross_entropy_with_integer_labels(x, label).mean()


def norm_of(loss: Any, module: Any) -> float:
    """Norm of jax.grad of a loss of a module."""
    definition, params = nnx.split(module)
    gradient = jax.jit(jax.grad(lambda p: loss(nnx.merge(definition, p))))
    return float(optax.tree.norm(gradient(params)))


@pytest.mark.parametrize("name", nets.marked(["bp", "greedy_exit", "fr"], ["bp", "fr"]))
def test_norms_are_those_of_jax_grad(name):
    """Of backpropagation, of each block's own loss, and of a late error on current weights."""
    trainer = build(name, **APART)
    state, metrics = trainer.step(trainer.init(), DATA[0])
    first = trainer.gather_metrics(metrics)
    parts = [first["block_0/gradient_norm"], first["block_1/gradient_norm"]]
    assert first["gradient_norm"] == pytest.approx(math.hypot(*parts), nan_ok=True)
    initial = trainer.init()
    (one, two, *readout), heads = trainer.modules(initial), trainer.heads(initial)
    x, label = DATA[0]["x"], DATA[0]["label"]
    middle = one(x)
    last = nnx.List([two, readout[0]])
    found = {"block_1": norm_of(lambda m: plain(middle, label, *m), last)}
    if name == "bp":
        found["block_0"] = norm_of(lambda m: plain(x, label, m, *last), one)
    elif name == "greedy_exit":
        parts = nnx.List([one, heads[0].classifier])
        found["block_0"] = norm_of(lambda m: plain(x, label, *m), parts)
    else:  # the second step brings the first one's error down
        error = jax.jit(jax.grad(lambda h: plain(h, label, *last)))(middle)
        now = trainer.modules(state)[0]
        found["block_0"] = norm_of(lambda m: (m(x) * error).sum(), now)
        first |= {
            "block_0/gradient_norm": nets.trained(trainer, DATA[1:], 1, state)[1][0][
                "block_0/gradient_norm"
            ]
        }
    for block, norm in found.items():
        assert first[f"{block}/gradient_norm"] == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("name", nets.marked(("bp", "greedy_exit", "fdg"), ("greedy_exit",)))
def test_they_change_no_weight_and_no_other_metric(name):
    runs = []
    for asked in (False, True):
        trainer = build(name, **APART, gradient_norms=asked)
        state, rows = nets.trained(trainer, DATA, 6)
        runs.append((nets.to_arrays(trainer, state), rows))
    (without, rows), (with_norms, told) = runs
    assert nets.largest_error(with_norms, without) < 1e-12
    names = rows[-1].keys()
    assert not [each for each in names if "gradient_norm" in each]
    assert told[-1].keys() - names == {
        "gradient_norm",
        "block_0/gradient_norm",
        "block_1/gradient_norm",
    }
    assert [row["loss"] for row in told[1:]] == pytest.approx([row["loss"] for row in rows[1:]])


@functools.cache
def on_engine(name: str, engine: str, **options: Any) -> list[dict]:
    trainer = spmd_nets.build(name, "ends", 3, engine=engine, gradient_norms=True, **options)
    state = trainer.init()
    return nets.rows(trainer.steps(state, spmd_nets.setting("ends")[1])[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bp", "greedy_exit"])
def test_engines_tell_the_same_in_one_call_for_several_batches(name):
    if name == "bp":  # without its stages fused, mpmd takes one batch a call
        trainer = spmd_nets.build(name, "ends", 3, engine="mpmd", gradient_norms=True)
        wanted = nets.trained(trainer, spmd_nets.setting("ends")[1], 4)[1]
    else:
        wanted = on_engine(name, "mpmd")
    found = on_engine(name, "spmd")
    for here, there in zip(found, wanted, strict=True):
        assert here.keys() == there.keys()
        for metric in (each for each in here if "gradient_norm" in each):
            assert here[metric] == pytest.approx(there[metric], rel=2e-6), metric


def test_clipping_comes_later():
    """The whole is what `clip_norm` tells, which is tested against optax."""
    [row], [norms] = moved(build("bp", **APART, clip_norm=1e-3), 1)
    parts = row["block_0/gradient_norm"], row["block_1/gradient_norm"]
    assert math.hypot(*parts) == pytest.approx(row["gradient_norm"], rel=1e-6)
    assert row["gradient_norm"] > 0.1
    assert math.hypot(*norms.values()) == pytest.approx(1e-3)


def test_accumulation_comes_later():
    """Two steps of the same batch move the weights by its gradient, at the second."""
    trainer = build("greedy_exit", **FUSED, accumulate=2)
    rows, norms = moved(trainer, 2, DATA[:1])
    assert norms[0] == {"block_0": 0, "block_1": 0}
    assert_told(rows[1:], norms[1:])
    for name in (each for each in rows[0] if "gradient_norm" in each):
        assert rows[0][name] == pytest.approx(rows[1][name])


@pytest.mark.parametrize("name", nets.marked(("bp", "greedy_exit", "fdg"), ("bp",)))
def test_scaled_losses_do_not_scale_them(name):
    """In float16; a step that is left out for an overflow has no finite norm."""
    data = nets.batches()
    options = {"example": data[0], "model": nets.mlp(depth=2), **APART}
    rows, norms = moved(build(name, **options, dtype=jnp.float16), 12, data)
    made = {True: 0, False: 0}
    for row, expected in zip(rows, norms, strict=True):
        for block, norm in expected.items():
            told = row[f"{block}/gradient_norm"]
            made[norm > 0] += math.isfinite(told)
            if norm > 0:
                assert told == pytest.approx(norm, rel=1e-3)
    assert made[True] >= 6
    if name == "bp":  # its scale, 2**24, is too much to begin with, of the whole model
        assert rows[0]["skipped"] == 1
        assert not math.isfinite(rows[0]["gradient_norm"])


def test_anything_but_a_truth_value_is_refused():
    nets.assert_clear(
        ValueError,
        ("gradient_norms", "1", "True or False"),
        lambda: nets.build("bp", gradient_norms=1),
    )
