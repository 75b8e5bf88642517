"""The SPMD engine trains as the per-stage engine does, in one call for several batches."""

import functools
import gzip
import json
import re
from collections import Counter
from typing import Any

import chex
import jax
import nets
import numpy as np
import pytest
from flax import nnx
from spmd_nets import STEPS, build, setting

import jdecouple as jd

pytestmark = pytest.mark.usefixtures("module_x64")

TOLERANCE = 1e-12
CHANGING = ("microbatches", "clip_norm")  # options that training depends on


def in_groups(trainer: jd.Trainer, data: list, sizes: list[int], state: Any = None) -> tuple:
    """State and metrics of groups of batches, each in one call of `steps`."""
    state = trainer.init() if state is None else state
    metrics = []
    for size in sizes:
        group = [data[(state.step + each) % len(data)] for each in range(size)]
        state, found = trainer.steps(state, group)
        metrics += nets.rows(found)
    return state, metrics


@functools.cache
def reference(name: str, net: str, **options: Any) -> tuple:
    """Arrays and metrics of 20 steps on one device, stage after stage."""
    trainer = build(name, net, engine="mpmd", **options)
    state, metrics = nets.trained(trainer, setting(net)[1], STEPS)
    return nets.to_arrays(trainer, state), metrics


def assert_close(found: tuple, wanted: tuple) -> None:
    assert nets.largest_error(found[0], wanted[0]) < TOLERANCE
    assert len(found[1]) == len(wanted[1])
    for here, there in zip(found[1], wanted[1], strict=True):
        assert here == pytest.approx(there, rel=2e-6, abs=1e-7)  # metrics are float32


def check(name: str, net: str, stages: int, data: int, group: int, **options: Any) -> None:
    trainer = build(name, net, stages, data, **options)
    batches = setting(net)[1]
    whole, rest = divmod(STEPS, group)
    state, metrics = in_groups(trainer, batches, [group] * whole + [rest] * bool(rest))
    assert state.step == STEPS
    changing = {key: value for key, value in options.items() if key in CHANGING}
    assert_close((nets.to_arrays(trainer, state), metrics), reference(name, net, **changing))


@pytest.mark.parametrize(
    ("name", "net", "stages", "data", "group", "microbatches"),
    [
        pytest.param("deinforeg", "dropout", 4, 1, 3, 1, marks=pytest.mark.slow),
        pytest.param("deinforeg", "dropout", 2, 2, 5, 1, marks=pytest.mark.slow),
        pytest.param("deinforeg", "dropout", 1, 2, 5, 1, marks=pytest.mark.slow),
        pytest.param("deinforeg", "vgg", 2, 2, 5, 1, marks=pytest.mark.slow),
        pytest.param("deinforeg", "dropout", 2, 2, 5, 2, marks=pytest.mark.slow),
        pytest.param("deinforeg", "residual", 4, 1, 5, 1, marks=pytest.mark.slow),
        pytest.param("scpl", "norm", 4, 1, 5, 1, marks=pytest.mark.slow),
        ("scpl", "norm", 2, 2, 1, 1),
        pytest.param("bp", "dropout", 4, 1, 3, 1, marks=pytest.mark.slow),
        pytest.param("bp", "vgg", 2, 2, 5, 1, marks=pytest.mark.slow),
        ("bp", "ends", 4, 1, 5, 1),
        pytest.param("bp", "residual", 2, 2, 5, 1, marks=pytest.mark.slow),
        pytest.param("bp", "mlp", 4, 1, 5, 4, marks=pytest.mark.slow),
        pytest.param("bp", "dropout", 2, 2, 5, 2, marks=pytest.mark.slow),
        pytest.param("bp", "dropout", 1, 1, 5, 2, marks=pytest.mark.slow),
    ],
)
def test_training_is_that_of_one_device(name, net, stages, data, group, microbatches):
    """Running statistics move once a microbatch, in order; dropout has a key for each."""
    options = {"microbatches": microbatches} if microbatches > 1 else {}
    check(name, net, stages, data, group, **options)


@pytest.mark.parametrize(
    ("name", "net", "boundaries"),
    [
        ("bp", "ends", (1, 5)),
        pytest.param("bp", "deep", (1, 5), marks=pytest.mark.slow),
        pytest.param("scpl", "deep", (3, 4), marks=pytest.mark.slow),
    ],
)
def test_device_groups_need_not_hold_equally_many_blocks(name, net, boundaries):
    check(name, net, 3, 1, 5, boundaries=boundaries)


@pytest.mark.slow
def test_more_stages_than_device_groups():
    check("scpl", "deep", 2, 1, 5, mesh=jd.make_mesh(2), num_stages=7)


@pytest.mark.parametrize(
    ("net", "options"),
    [
        pytest.param("mlp", {"clip_norm": 0.65}, marks=pytest.mark.slow),
        pytest.param("dropout", {"clip_norm": 2.0}, marks=pytest.mark.slow),
        pytest.param("dropout", {"remat": "stages"}, marks=pytest.mark.slow),
    ],
)
def test_options_of_the_synchronous_route(net, options):
    check("bp", net, 2, 1, 5, microbatches=2, **options)
    if "clip_norm" in options:
        norms = [
            each["gradient_norm"] for each in reference("bp", net, microbatches=2, **options)[1]
        ]
        assert min(norms) < options["clip_norm"] < max(norms)


@pytest.mark.slow
def test_rematerialised_stages_of_a_local_route():
    check("deinforeg", "dropout", 2, 1, 5, remat=("stages", "none"), boundaries=(2,))


# --- The state -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "name", "net"),
    [
        pytest.param("spmd", "mpmd", "bp", "ends", marks=pytest.mark.slow),
        pytest.param("mpmd", "spmd", "deinforeg", "dropout", marks=pytest.mark.slow),
    ],
)
def test_what_one_engine_began_the_other_ends(first, second, name, net):
    """A checkpoint holds names and arrays, which are the same; on other devices, too."""
    batches = setting(net)[1]
    began, ends = build(name, net, 4, engine=first), build(name, net, 2, 2, engine=second)
    state, metrics = in_groups(began, batches, [5, 5])
    arrays = nets.to_arrays(began, state)
    template = ends.to_arrays(ends.abstract())
    chex.assert_trees_all_equal_shapes_and_dtypes(arrays, template)
    sizes = [5, 5] if second == "spmd" else [1] * 10
    state, others = in_groups(ends, batches, sizes, ends.from_arrays(10, arrays))
    assert_close((nets.to_arrays(ends, state), metrics + others), reference(name, net))


@pytest.mark.slow
def test_what_is_read_from_a_state_is_that_of_the_blocks():
    batches = setting("norm")[1]
    found = []
    for engine in ("mpmd", "spmd"):
        trainer = build("scpl", "norm", 2, engine=engine)
        state, _ = in_groups(trainer, batches, [3])
        before = nets.to_arrays(trainer, state)
        values = trainer.evaluate(state, batches)
        modules = [*trainer.modules(state), *trainer.heads(state)]
        states = [jax.tree.leaves(nnx.state(module, nnx.Param)) for module in modules]
        assert nets.same_bits(nets.to_arrays(trainer, state), before)
        state, _ = trainer.step(state, batches[3])  # reading took nothing from it
        found.append((values, states, nets.to_arrays(trainer, state)))
    (values, states, arrays), (wanted, expected, after) = found
    assert values == pytest.approx(wanted)
    assert nets.largest_error(arrays, after) < TOLERANCE
    assert all(states)
    chex.assert_trees_all_close(states, expected, rtol=1e-7, atol=TOLERANCE)


def test_a_device_group_holds_its_own_block_and_room_for_the_ends():
    trainer = build("bp", "ends", 4, boundaries=(0, 2, 3, 4))
    arrays = trainer.init().stages.arrays["params"]
    # Two blocks of the first and the last group, which the ends come on top of.
    shapes = Counter(leaf.shape for leaf in jax.tree.leaves(arrays) if leaf.ndim == 2)
    assert shapes == {(4 * 8, 8): 1, (4 * 2, 8): 1, (4 * 8, nets.CLASSES): 1}
    for leaf in jax.tree.leaves(arrays):
        assert [shard.data.shape[0] * 4 for shard in leaf.addressable_shards] == [len(leaf)] * 4


def test_states_are_donated():
    trainer = build("bp", "mlp", 2)
    state = trainer.init()
    new, _ = trainer.step(state, setting("mlp")[1][0])
    trainer.wait(new)
    leaves = jax.tree.leaves(state.stages)
    assert leaves
    assert all(leaf.is_deleted() for leaf in leaves)


# --- One call ------------------------------------------------------------------------------------


def dispatched(call: Any, folder: Any) -> Counter:
    """Compiled functions that a call dispatches, by name, as JAX's profiler saw them."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(folder, profiler_options=options):
        jax.block_until_ready(call())
    (path,) = folder.glob("**/*.trace.json.gz")
    found: Counter = Counter()
    end = 0.0
    for event in sorted(json.loads(gzip.decompress(path.read_bytes()))["traceEvents"], key=_time):
        match = re.fullmatch(r"PjitFunction\((.*)\)", event.get("name", ""))
        if match and event["ts"] >= end:  # a dispatch may show as one event in another
            found[match[1]] += 1
            end = event["ts"] + event["dur"]
    return found


def _time(event: dict) -> float:
    return event.get("ts", 0)


@pytest.mark.parametrize(
    ("engine", "count"),
    [
        ("spmd", {"spmd": 1, "metrics": 1}),
        pytest.param("mpmd", {f"stage{k}_FBS": 5 for k in range(4)}, marks=pytest.mark.slow),
    ],
)
def test_dispatches(engine, count, tmp_path):
    """Five batches in four stages: one dispatch of the stages, where there are twenty."""
    trainer = build("deinforeg", "dropout", 4, engine=engine)
    batches = [trainer.put(batch) for batch in (*setting("dropout")[1], setting("dropout")[1][0])]

    def train(state):
        if engine == "spmd":
            return trainer.steps(state, batches)[0]
        for batch in batches:
            state, _ = trainer.step(state, batch)
        return state

    state = train(trainer.init())
    assert dispatched(lambda: train(state).stages, tmp_path) == count


@pytest.mark.slow
def test_placed_batches_and_a_step_are_the_same_training():
    trainer = build("scpl", "mlp", 2)
    batches = setting("mlp")[1]
    state, wanted = in_groups(trainer, batches, [3])
    again, found = trainer.steps(trainer.init(), [trainer.put(batches[0]), *batches[1:3]])
    alone, metrics = nets.trained(trainer, batches, 3)
    for other in (again, alone):
        assert (
            nets.largest_error(nets.to_arrays(trainer, state), nets.to_arrays(trainer, other))
            < 1e-14
        )
    for rows in (nets.rows(found), metrics):
        for here, there in zip(rows, wanted, strict=True):
            assert here == pytest.approx(there, rel=1e-6)


def test_metrics_are_scalars_of_a_step_and_arrays_of_a_list():
    trainer = build("bp", "mlp", 2)
    batch = setting("mlp")[1][0]
    _, single = trainer.step(trainer.init(), batch)
    for count in (1, 2):
        _, metrics = trainer.steps(trainer.init(), [batch] * count)
        assert metrics.keys() == single.keys()
        assert all(isinstance(column, jax.Array) for column in metrics.values())
        chex.assert_shape(list(metrics.values()), (count,))
        first = {name: column[0] for name, column in metrics.items()}
        chex.assert_trees_all_equal_shapes_and_dtypes(first, dict(single))
        chex.assert_trees_all_close(first, dict(single), rtol=1e-6)


@pytest.mark.slow
def test_weights_are_kept_once_for_all_ticks():
    """And with `remat` activations inside a stage not at all."""
    kept = []
    for remat in ("none", "stages"):
        trainer = build("bp", "mlp", 2, microbatches=4, remat=remat)
        carries = trainer.put(setting("mlp")[1][0]).parts
        states = trainer.init().stages.arrays
        call = trainer._engine.program.call
        text = str(call.trace(states, carries, np.int32(0)).jaxpr)
        assert "f64[24,24]" in text
        assert "f64[5,24,24]" not in text  # 4 + 2 - 1 ticks
        kept.append(text.count("f64[5,4,24]"))
    assert kept[0] > kept[1] > 0


# --- What fits -----------------------------------------------------------------------------------
