"""Several batches in one compiled call are as many single steps."""

import functools
import itertools
import json
import signal
from typing import Any

import chex
import jax
import jax.numpy as jnp
import nets
import pytest
import runs

import jdecouple as jd
from jdecouple import data
from jdecouple.train.config import ConfigError
from jdecouple.train.loop import build, train_and_evaluate

TOLERANCE = 1e-12
STEPS = 10
LOCAL = nets.LOCAL
OTHERS = [name for name in jd.methods.names() if name not in LOCAL]


@functools.cache
def trainer(name: str, stages: int = 1, devices: int = 1, replicas: int = 1, **options: Any) -> Any:
    """Blocks with BatchNorm and dropout on augmented images, a rate that moves, momentum."""
    with jax.enable_x64(True):
        return jd.Trainer(
            nets.user_model(64, hidden=8, depth=max(2, stages), param_dtype=jnp.float64),
            nets.method(name),
            jd.optim.sgd(jd.optim.cosine(0.05, 0.0, STEPS), momentum=0.9),
            mesh=jd.make_mesh(stages, replicas, devices=jax.devices()[:devices]),
            example=nets.images(1)[0],
            transform=jd.data.augment.get("basic", mean=[0.5], std=[0.25]),
            **options,
        )


def groups(size: int) -> list[list[dict]]:
    """Ten batches in lists of `size`; the last may be shorter."""
    batches = list(itertools.islice(itertools.cycle(nets.images()), STEPS))
    return [batches[first : first + size] for first in range(0, STEPS, size)]


def run(size: int | None, *arguments: Any, **options: Any) -> tuple[dict, list[dict]]:
    """Arrays and metrics of ten batches in chunks; None is `step` alone."""
    with jax.enable_x64(True):
        engine = trainer(*arguments, **options)
        state, found = engine.init(), []
        for group in groups(size or 1):
            if size is None:
                state, metrics = engine.step(state, group[0])
                found.append({name: float(value) for name, value in metrics.items()})
            else:
                state, metrics = engine.steps(state, group)
                found += nets.rows(metrics)
        assert state.step == STEPS
        return nets.to_arrays(engine, state), found


single = functools.cache(functools.partial(run, None))


def assert_close(found: tuple, wanted: tuple) -> None:
    assert nets.largest_error(found[0], wanted[0]) < TOLERANCE
    assert len(found[1]) == len(wanted[1]) == STEPS
    for here, there in zip(found[1], wanted[1], strict=True):
        # Metrics are float32, and nan before a delayed pipeline is full.
        assert here == pytest.approx(there, rel=2e-6, abs=1e-7, nan_ok=True)


@pytest.mark.parametrize(
    ("name", "devices"),
    [
        pair
        if pair == ("scpl", 1)  # on two devices below
        else pytest.param(*pair, marks=pytest.mark.slow)
        for pair in itertools.product(LOCAL, (1, 2))
        if pair[1] == 1 or pair[0] not in nets.FOLLOWING
    ],
)
def test_local_methods_are_those_of_single_steps(name, devices):
    """In chunks of 3, 3, 3 and 1."""
    assert_close(run(3, name, 2, devices), single(name, 2, devices))


@pytest.mark.parametrize(
    ("stages", "devices", "replicas", "options"),
    [
        pytest.param(4, 1, 1, {"fuse": False}, marks=pytest.mark.slow),
        pytest.param(4, 2, 1, {}, marks=pytest.mark.slow),
        pytest.param(4, 4, 1, {}, marks=pytest.mark.slow),
        pytest.param(2, 4, 2, {}, marks=pytest.mark.slow),
    ],
    ids=["apart on one device", "two of four a device", "four devices", "two replicas"],
)
def test_placement_changes_nothing(stages, devices, replicas, options):
    where = ("scpl", stages, devices, replicas)
    assert_close(run(3, *where, **options), single(*where, **options))


@pytest.mark.parametrize("name", nets.marked(OTHERS, ("fdg",)))
def test_fused_stages_are_those_of_single_steps(name):
    """Queues of delayed methods go from batch to batch and from chunk to chunk."""
    assert_close(run(4, name, 2, 1), single(name, 2, 1))


@pytest.mark.parametrize(
    ("name", "stages", "options"),
    [
        pytest.param(
            *("bp", 2, {"schedule": "gpipe", "microbatches": 2, "clip_norm": 0.5}),
            marks=pytest.mark.slow,
        ),
        pytest.param("bp", 1, {"fuse": False}, marks=pytest.mark.slow),
        pytest.param("fdg", 1, {"fuse": False}, marks=pytest.mark.slow),
        pytest.param("scpl", 2, {"fuse": False, "microbatches": 2}, marks=pytest.mark.slow),
        pytest.param("scpl", 2, {"remat": "stages"}, marks=pytest.mark.slow),
    ],
    ids=["clipped gpipe", "one stage", "one stage of fdg", "microbatches", "rematerialised"],
)
def test_other_options(name, stages, options):
    assert_close(run(5, name, stages, **options), single(name, stages, **options))


@pytest.mark.parametrize(
    "options", nets.marked([{"fuse": False}, {}], [{}]), ids=["apart", "fused"]
)
def test_a_chunk_of_one_batch_is_a_step_to_the_bit(options):
    arrays, metrics = run(1, "scpl", 2, 1, **options)
    wanted, values = single("scpl", 2, 1, **options)
    assert nets.same_bits(arrays, wanted)
    assert metrics == values


@pytest.mark.slow
def test_chunks_and_steps_may_alternate(x64):
    engine = trainer("scpl", 4, 2)
    state = engine.init()
    first, *others = groups(3)
    state, _ = engine.steps(state, first)
    for batch in itertools.chain(*others):
        state, _ = engine.step(state, batch)
    wanted, _ = single("scpl", 4, 2)
    assert nets.largest_error(nets.to_arrays(engine, state), wanted) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["placed", "device arrays", "mixed", "placed list"])
def test_batches_may_lie_anywhere(kind, x64):
    engine = trainer("scpl", 2, 4, 2)
    batches = groups(3)[0]
    there = [jax.tree.map(jnp.asarray, batch) for batch in batches]
    given = {
        "placed": lambda: [engine.put(batch) for batch in batches],
        "device arrays": lambda: there,
        "mixed": lambda: [engine.put(batches[0]), there[1], batches[2]],
        "placed list": lambda: engine.put(batches),
    }[kind]()
    found, _ = engine.steps(engine.init(), given)
    wanted, _ = engine.steps(engine.init(), batches)
    assert nets.same_bits(nets.to_arrays(engine, found), nets.to_arrays(engine, wanted))


@pytest.mark.parametrize(
    ("name", "stages", "options", "calls"),
    [
        pytest.param("scpl", 2, {"fuse": False}, 2, marks=pytest.mark.slow),
        pytest.param("scpl", 4, {"fuse": False}, 4, marks=pytest.mark.slow),
        pytest.param("scpl", 2, {"fuse": False, "microbatches": 2}, 2, marks=pytest.mark.slow),
        pytest.param("scpl", 4, {}, 1, marks=pytest.mark.slow),
        ("fdg", 2, {}, 1),
    ],
)
def test_a_stage_is_called_once_for_all_batches(name, stages, options, calls, monkeypatch):
    engine = trainer(name, stages, 1, **options)
    ran = []
    counted = [
        lambda *given, scan=scan: ran.append(scan) or scan(*given)
        for scan in engine._engine._several._scans
    ]
    monkeypatch.setitem(vars(engine._engine._several), "_scans", counted)
    with jax.enable_x64(True):
        _, metrics = engine.steps(engine.init(), groups(5)[0])
    assert len(ran) == calls
    assert len(metrics["loss"]) == 5


def test_state_is_donated(x64):
    engine = trainer("scpl", 2, 1)
    before = engine.init()
    state, _ = engine.steps(before, groups(3)[0])
    engine.wait(state)
    leaves = jax.tree.leaves(before.stages)
    assert sum(leaf.is_deleted() for leaf in leaves) > 0.9 * len(leaves)


@pytest.mark.parametrize(
    ("devices", "count"),
    [
        (1, 3),
        pytest.param(2, 3, marks=pytest.mark.slow),
        pytest.param(2, 1, marks=pytest.mark.slow),
    ],
)
def test_metrics_are_arrays(devices, count, x64):
    engine = trainer("scpl", 2, devices)
    _, metrics = engine.steps(engine.init(), engine.put(groups(count)[0]))
    _, single = engine.step(engine.init(), groups(1)[0][0])
    assert list(metrics) == list(single)
    assert all(isinstance(column, jax.Array) for column in metrics.values())
    chex.assert_shape(list(metrics.values()), (count,))
    first = {name: column[0] for name, column in metrics.items()}
    chex.assert_trees_all_equal_shapes_and_dtypes(first, dict(single))
    chex.assert_trees_all_close(first, dict(single), rtol=1e-6)


# --- What is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "devices", "options"),
    [("bp", 2, {}), ("fdg", 2, {}), ("fr", 1, {"fuse": False})],
)
def test_stages_that_need_each_other_are_refused(name, devices, options, x64):
    engine = trainer(name, 2, devices, **options)
    words = ("a chunk of 2", "local method", "fused", f"{name} has 2 stages apart")
    nets.assert_clear(ValueError, words, lambda: engine.steps(engine.init(), groups(2)[0]))
    nets.assert_clear(ValueError, words, lambda: engine.check_steps(2))


def test_bad_batches_are_refused():
    engine = trainer("bp")
    state, good = engine.init(), groups(1)[0][0]
    bad = {**good, "label": good["label"] + nets.CLASSES}
    nets.assert_clear(ValueError, ("empty", "at least one"), lambda: engine.steps(state, []))
    nets.assert_clear(TypeError, ("dict", "list of batches"), lambda: engine.steps(state, good))
    nets.assert_clear(ValueError, ("out of range",), lambda: engine.steps(state, [good, bad]))
    smaller = {key: value[:8] for key, value in good.items()}
    nets.assert_clear(ValueError, ("uint8[8,",), lambda: engine.steps(state, [good, smaller]))
    one, two = engine.put(good), engine.put([good, good])
    words = ("holds a list of 2", "a single batch")
    nets.assert_clear(ValueError, words, lambda: engine.step(state, two))
    nets.assert_clear(ValueError, words, lambda: engine.steps(state, [good, two]))
    nets.assert_clear(TypeError, ("list of batches",), lambda: engine.steps(state, one))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"chunk": 0}, ("config.chunk is 0", "of at least 1")),
        ({"chunk": 2, "profile": 3}, ("config.profile", "config.chunk at 1")),
        ({"chunk": 2, "mesh__stages": 2}, ("a chunk of 2", "local method", "bp has 2 stages")),
    ],
)
def test_configurations_are_refused(values, words):
    nets.assert_clear(ConfigError, words, lambda: build(runs.cheap(**values)))


# --- The loop --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        ((0, 10, 4), [4, 4, 2]),
        ((0, 10, 1), [1] * 10),
        ((0, 10, 4, 5), [4, 1, 4, 1]),
        ((6, 20, 4, 9, 4), [2, 1, 3, 4, 2, 2]),
        ((9, 9, 4), []),
    ],
)
def test_groups_end_where_something_happens(arguments, sizes):
    assert list(data.group_sizes(*arguments)) == sizes


def test_chunks_write_the_lines_and_checkpoints_of_single_steps(tmp_path):
    """27 steps, evaluated every 9 and saved every 4; a line a step, in a chunk's middle too."""
    values = {"model__hidden": 8, "steps": 27}
    train_and_evaluate(runs.cheap(**values), tmp_path / "one")
    train_and_evaluate(runs.cheap(chunk=4, **values), tmp_path / "four")
    found, wanted = (runs.without_timing(runs.lines(tmp_path / each)) for each in ("four", "one"))
    assert len(found) == len(wanted) == 33
    for here, there in zip(found, wanted, strict=True):
        assert here.pop("split") == there.pop("split")
        assert here == pytest.approx(there, rel=1e-4)  # float32
    checkpoints = [
        sorted(path.name for path in (tmp_path / each / "checkpoints").iterdir())
        for each in ("one", "four")
    ]
    assert checkpoints[0] == checkpoints[1]
    step, arrays = runs.final_arrays(tmp_path / "four")
    assert step == 27
    assert nets.largest_error(arrays, runs.final_arrays(tmp_path / "one")[1]) < 1e-4
    for line in runs.lines(tmp_path / "four"):
        if line["split"] == "train":
            assert line["examples_per_second"] > 0
            assert 0 <= line["input_wait"] <= 1


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_bit(tmp_path):
    """SIGTERM saves after the chunk; the rest falls into the chunks that it would have."""
    values = {"model__hidden": 8, "chunk": 4, "log_every": 2, "method__name": "bp"}
    values["method__projector"] = "None"
    whole = runs.server().run(*runs.arguments(tmp_path / "whole", **values))
    assert whole.returncode == 0, whole.stderr
    workdir = tmp_path / "stopped"
    stopped = runs.server().start(*runs.arguments(workdir, **values))
    runs.wait_for(lambda: len(runs.lines(workdir)) > 2, stopped)
    stopped.signal(signal.SIGTERM)
    stopped.wait()
    again = runs.server().run(*runs.arguments(workdir, **values))
    assert again.returncode == 0, again.stderr
    runs.assert_same_run(workdir, tmp_path / "whole")
    assert json.loads((workdir / "config.json").read_text())["config"]["chunk"] == 4
