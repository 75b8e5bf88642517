"""The delayed methods against a naive simulation, which follows the authors' code itself."""

import functools
import itertools
from fractions import Fraction
from typing import Any, NamedTuple

import delayed_nets as dn
import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
from delayed_simulation import Settings, Simulation

import jdecouple as jd

TOLERANCE = 1e-12
SIZES = (6, 8, 7, 8, 4)
BATCH = 6
BLOCKS = len(SIZES) - 1
SGD = {"momentum": 0.9, "weight_decay": 5e-4}
BOUNDARIES = {1: (0,), 2: (0, 2), 3: (0, 1, 3), 4: (0, 1, 2, 3)}  # one stage of two blocks at 3


class Case(NamedTuple):
    """A method on K stages; `placed` says on what, as arguments of the Trainer."""

    name: str
    num_stages: int
    arguments: tuple[tuple[str, Any], ...] = ()
    placed: str = "fused"  # or "apart": compiled apart on one device; "spread": K devices; "data"
    lr: Any = 0.1
    nesterov: bool = False

    @property
    def settings(self) -> Settings:
        return Settings(self.lr, nesterov=self.nesterov, **SGD, **dict(self.arguments))

    @property
    def method(self) -> jd.methods.Method:
        return jd.methods.get(self.name, **dict(self.arguments))

    def __str__(self) -> str:
        words = [f"{key}={value}" for key, value in self.arguments]
        words += ["schedule"] if callable(self.lr) else []
        words += ["nesterov"] if self.nesterov else []
        return "-".join([self.name, f"K{self.num_stages}", *words, self.placed])


def variant(name: str, **arguments: Any) -> tuple[str, tuple[tuple[str, Any], ...]]:
    return name, tuple(arguments.items())


def fading(count: Any) -> Any:
    """A learning rate that differs at every update."""
    return 0.1 * 0.9**count


MAIN = [
    *(variant("ddg"), variant("fr"), variant("fdg"), variant("adl", accumulate=2)),
    variant("dsp"),
]
OTHERS = [
    variant("fr", first_stage_lr_scale=2.0),
    variant("fdg", beta=0.5),
    variant("fdg", current_weights=True),
    variant("fdg", current_weights=True, beta=0.5),
    variant("adl", accumulate=1),
    variant("adl", accumulate=3),
    variant("adl", accumulate=3, accumulate_mean=True),
    variant("adl", accumulate=2, beta=0.5),
    variant("ddg", current_weights=True),
    variant("adl", accumulate=2, current_weights=True),
]
CURRENT = [each for each in OTHERS if ("current_weights", True) in each[1]]
CASES = [
    *(Case(name, k, arguments) for name, arguments in MAIN for k in (1, 2, 3, 4)),
    *(Case(name, 3, arguments) for name, arguments in OTHERS),
    *(Case(name, 4, arguments, "apart") for name, arguments in MAIN),
    *(Case(name, 4, arguments, "spread") for name, arguments in MAIN),
    Case("fdg", 2, placed="data"),
    Case("ddg", 3, nesterov=True),
    *(Case(name, 3, arguments, lr=fading) for name, arguments in MAIN),
]
# Each method on four stages in one call; of what may differ else, some.
FAST = [
    *(Case(name, 4, arguments) for name, arguments in MAIN),
    *(Case(name, 3, arguments) for name, arguments in (*OTHERS[:2], OTHERS[6])),
    Case("fdg", 4, placed="spread"),
    Case("fdg", 2, placed="data"),
    Case("adl", 3, MAIN[3][1], lr=fading),
]
EVERY_CASE = pytest.mark.parametrize("case", nets.marked(CASES, FAST), ids=str)


# --- The simulation itself ------------------------------------------------------------------


@pytest.mark.parametrize(
    "run",
    [*dn.recorded("fdg"), *dn.recorded("features_replay"), *dn.recorded_by_layer()],
    ids=lambda run: f"{run.case}-{run.variant}",
)
def test_simulation_follows_the_authors_code(run):
    simulation = Simulation(run.method, run.initial(), Settings(**run.sgd, **run.arguments))
    history = [run.initial()]
    updates = [list(simulation.updates)]
    errors, losses = [], []
    for iteration, batch in enumerate(run.batches):
        losses.append(simulation.step(*batch))
        history.append(list(simulation.weights))
        updates.append(list(simulation.updates))
        errors.append(dn.largest_error(run.comparable(history), run.after(iteration)))
    assert max(errors) < TOLERANCE, errors
    assert dn.largest_error(history[-1], run.initial()) > 0.01
    if run.losses is None:
        return
    np.testing.assert_allclose(losses, run.losses, rtol=TOLERANCE)
    # Neither decay nor momentum moves anything before the first gradient.
    found = np.diff(updates, axis=0)
    if run.method == "fdg":  # whose last module is recorded one iteration late
        found[:, -1] = [0, *found[:-1, -1]]
    np.testing.assert_array_equal(found, run.golden[f"{run.prefix}.updated_at_iter"])


initial = functools.partial(dn.layers, SIZES)
batches = functools.partial(dn.examples, size=BATCH, inputs=SIZES[0], classes=SIZES[-1])


def simulation_of(case: Case) -> Simulation:
    """With the blocks of a stage joined to one list of layers."""
    stages = [
        [layer for block in initial()[start:end] for layer in block]
        for start, end in itertools.pairwise([*BOUNDARIES[case.num_stages], BLOCKS])
    ]
    return Simulation(case.name, stages, case.settings)


def test_the_cases_differ_by_far_more_than_the_tolerance():
    """So that agreement says which method it is."""
    ends = {}
    for name, arguments in [*MAIN, *OTHERS]:
        if arguments == (("accumulate", 1),):  # ADL that accumulates nothing is FDG
            continue
        simulation = simulation_of(Case(name, 3, arguments))
        for batch in batches(FIRST):
            simulation.step(*batch)
        ends[name, arguments] = simulation.weights
    for one in ends:
        for other in ends:
            if one != other:
                assert dn.largest_error(ends[one], ends[other]) > 1e-4, (one, other)


# --- Staleness ------------------------------------------------------------------------------


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [*MAIN, *CURRENT, *(variant("adl", accumulate=m) for m in (1, 3, 5))],
)
def test_staleness_is_what_the_backward_used(name, arguments, num_stages):
    """In the steady state, over whole periods of accumulation."""
    case = Case(name, num_stages, arguments)
    simulation = simulation_of(case)
    period = case.settings.accumulate
    for batch in batches(2 * num_stages + 4 * period + 8):
        simulation.step(*batch)
    for k in range(num_stages):
        uses = [use for use in simulation.uses if use.stage == k][-2 * period :]
        weights = Fraction(sum(use.weights for use in uses), len(uses))
        error = Fraction(sum(use.error for use in uses), len(uses))
        found = case.method.route.staleness(k, num_stages)
        assert found.weights == pytest.approx(float(weights), abs=1e-12)
        assert found.error == pytest.approx(float(error), abs=1e-12)
        assert len(found) == 2


# --- The library ----------------------------------------------------------------------------

FIRST, SECOND = 15, 8  # iterations before the first draining, and between it and the second


@functools.cache
def trainer_of(case: Case) -> jd.Trainer:
    k = case.num_stages
    mesh = {
        "fused": (1, 1),
        "apart": (1, 1),
        "spread": (k, 1),
        "data": (k, 2),
    }[case.placed]
    count = mesh[0] * mesh[1]
    return jd.Trainer(
        dn.model(initial()),
        case.method,
        jd.optim.sgd(case.lr, nesterov=case.nesterov, **SGD),
        num_stages=k,
        boundaries=BOUNDARIES[k],
        mesh=jd.make_mesh(*mesh, devices=jax.devices()[:count]),
        fuse=False if case.placed == "apart" else None,
        example=dn.batch(*batches(FIRST)[0]),
    )


class Comparison:
    """Library and simulation side by side."""

    def __init__(self, case: Case):
        self.trainer = trainer_of(case)
        self.state = self.trainer.init()
        self.simulation = simulation_of(case)
        self.losses: list[tuple[float, float]] = []

    def step(self, batch: tuple[np.ndarray, np.ndarray]) -> float:
        """One iteration of both; the largest error of any weight."""
        self.state, metrics = self.trainer.step(self.state, dn.batch(*batch))
        self.losses.append((float(metrics["loss"]), self.simulation.step(*batch)))
        return self.error()

    def finish(self) -> float:
        """Drains both; the largest error of any weight."""
        self.state = self.trainer.finish(self.state)
        self.simulation.finish()
        return self.error()

    def error(self) -> float:
        found = dn.layers_of(self.trainer, self.state)
        return dn.largest_error(found, self.simulation.weights)


class Errors(NamedTuple):
    """Of a run that trains, drains, trains on and drains again."""

    first: list[float]
    finish: float
    second: list[float]
    finish_again: float
    losses: list[tuple[float, float]]


@functools.cache
def errors(case: Case) -> Errors:
    data = batches(FIRST + SECOND)
    with jax.enable_x64(True):
        both = Comparison(case)
        return Errors(
            [both.step(batch) for batch in data[:FIRST]],
            both.finish(),
            [both.step(batch) for batch in data[FIRST:]],
            both.finish(),
            both.losses,
        )


@EVERY_CASE
def test_weights_after_every_iteration(case):
    found = errors(case).first
    assert max(found) < TOLERANCE, found


@EVERY_CASE
def test_losses_after_every_iteration(case):
    """Those of refilling included: NaN until a batch has reached the end."""
    found, wanted = zip(*errors(case).losses, strict=True)
    np.testing.assert_allclose(found, wanted, rtol=2e-7)  # metrics are float32


@EVERY_CASE
def test_finish_applies_what_is_queued(case):
    assert errors(case).finish < TOLERANCE


@EVERY_CASE
def test_training_goes_on_after_finish(case):
    found = errors(case)
    assert max(found.second) < TOLERANCE, found.second
    assert found.finish_again < TOLERANCE


@pytest.mark.parametrize("fed", [0, 1, 2, 3])
@pytest.mark.parametrize("placed", nets.marked(["fused", "spread"], ["fused"]))
@pytest.mark.parametrize(("name", "arguments"), MAIN)
def test_finish_of_a_pipeline_that_is_not_full(name, arguments, placed, fed):
    with jax.enable_x64(True):
        both = Comparison(Case(name, 4, arguments, placed))
        for batch in batches(FIRST)[:fed]:
            both.step(batch)
        assert both.finish() < TOLERANCE
        assert both.simulation.updates == [fed // both.simulation.settings.accumulate] * 4
        assert both.finish() < TOLERANCE  # nothing is left
        assert both.step(batches(FIRST)[fed]) < TOLERANCE


# --- BatchNorm and dropout, which the simulation lacks -----------------------------------------


@functools.cache
def with_frozen_weights(name: str, num_stages: int, arguments: tuple) -> dict[str, np.ndarray]:
    """Momentum and statistics after seven batches and draining, at a vanishing learning rate."""
    with jax.enable_x64(True):
        data = nets.batches(dtype=np.float64)
        trainer = jd.Trainer(
            nets.user_model(depth=3, param_dtype=jnp.float64),
            jd.methods.get(name, **dict(arguments)),
            jd.optim.sgd(1e-200, momentum=0.9),
            num_stages=num_stages,
            mesh=jd.make_mesh(1, devices=jax.devices()[:1]),
            example=data[0],
        )
        state, _ = nets.trained(trainer, data, 7)
        arrays = nets.to_arrays(trainer, trainer.finish(state))
    return {key: value for key, value in arrays.items() if "/stats/" in key or "trace" in key}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        pytest.param(*variant("ddg"), marks=pytest.mark.slow),
        pytest.param(*variant("fr"), marks=pytest.mark.slow),
        pytest.param(*variant("fdg"), marks=pytest.mark.slow),
        pytest.param(*variant("fdg", current_weights=True), marks=pytest.mark.slow),
        pytest.param(*variant("adl", accumulate=1), marks=pytest.mark.slow),
    ],
)
def test_where_weights_stand_still_nothing_is_late(name, arguments):
    """Then staleness has no effect: every gradient, and all statistics, are backpropagation's.

    Dropout's mask must be the same in a replayed forward, and statistics must move once a batch.
    """
    wanted = with_frozen_weights("bp", 1, ())
    assert nets.largest_error(with_frozen_weights(name, 3, arguments), wanted) < TOLERANCE
    assert any("/stats/" in key for key in wanted)
    moved = [key for key in wanted if "trace" in key and np.abs(wanted[key]).max() > 1e-3]
    assert {key.split("/")[0] for key in moved} == {"block_0", "block_1", "block_2"}
