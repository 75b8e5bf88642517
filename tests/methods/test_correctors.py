"""Correctors of late gradients against simulations in NumPy, and in a training."""

import functools
import itertools
from typing import Any, NamedTuple

import delayed_nets as dn
import jax
import jax.numpy as jnp
import nets
import numpy as np
import optax
import pytest
from corrected_simulation import CorrectedSimulation
from delayed_simulation import Layers, Settings

import jdecouple as jd

TOLERANCE = 1e-12
SIZES = (5, 6, 5, 6, 4, 5, 3)
BLOCKS = len(SIZES) - 1
BOUNDARIES = {1: (0,), 2: (0, 3), 4: (0, 2, 3, 5), 6: tuple(range(BLOCKS))}
BATCH = 4
FILLED, AGAIN = 14, 5  # batches before the stages are drained, and after it
OPTIONS = {
    "weight_prediction": {},
    "look_ahead": {"momentum": 0.8},
    "spike_compensation": {"momentum": 0.9},
    "error_feedback": {"strength": 0.5},
    "rate_scaling": {"steps": 6},
}
FORWARDS = ("weight_prediction", "look_ahead")  # change what a forward computes with
MIXED = (
    *("rate_scaling", "spike_compensation", "look_ahead", "error_feedback", "weight_prediction"),
    "none",
)


class Case(NamedTuple):
    """A corrector of a method on K stages; "mixed" is another in every stage.

    `placed` as in the tests of the delayed methods; `arguments` are the method's.
    """

    corrector: str
    options: tuple[tuple[str, Any], ...] = ()
    method: str = "fdg"
    num_stages: int = 4
    arguments: tuple[tuple[str, Any], ...] = ()
    placed: str = "fused"

    @property
    def settings(self) -> Settings:
        return Settings(0.05, momentum=0.9, **dict(self.arguments))

    @property
    def correctors(self) -> tuple[str, ...]:
        return MIXED if self.corrector == "mixed" else (self.corrector,) * self.num_stages

    def options_of(self, corrector: str) -> dict[str, Any]:
        return OPTIONS.get(corrector, {}) | dict(self.options)

    def __str__(self) -> str:
        words = [f"{k}={v}" for k, v in (*self.options, *self.arguments)]
        return "-".join([self.corrector, self.method, f"K{self.num_stages}", *words, self.placed])


FAST = [
    Case("mixed", num_stages=6),
    Case("weight_prediction", (), "fr", 2, (("first_stage_lr_scale", 2.0),)),
    Case("weight_prediction", num_stages=2, placed="spread"),
]
ALL = [
    *FAST,
    *(Case(name, (), "fdg", k) for name in OPTIONS for k in (2, 4)),
    *(Case(name, (), method) for name in FORWARDS for method in ("ddg", "fr")),
    *(Case(name, placed="apart") for name in FORWARDS),
    Case("spike_compensation", (), "ddg"),
    Case("weight_prediction", (), "adl", 4, (("accumulate", 2),)),
    Case("error_feedback", (), "adl", 2, (("accumulate", 3),)),
    Case("weight_prediction", (("horizon", 2.0),), "fdg", 4, (("current_weights", True),)),
    Case("rate_scaling", (("steps", 0), ("power", 0.5))),
]


initial = functools.partial(dn.layers, SIZES)
batches = functools.partial(
    dn.examples, FILLED + AGAIN, size=BATCH, inputs=SIZES[0], classes=SIZES[-1]
)


def trainer_of(case: Case, optimizer: Any = None, **options: Any) -> jd.Trainer:
    k = case.num_stages
    if optimizer is None:
        sgd = jd.optim.sgd(case.settings.lr, momentum=case.settings.momentum)
        delays = [
            jd.methods.get(case.method, **dict(case.arguments)).route.delay(i, k) for i in range(k)
        ]
        by_delay = dict(zip(delays, case.correctors, strict=True))

        def optimizer(delay: float) -> Any:
            name = by_delay[delay]
            return jd.optim.corrected(sgd, name, **case.options_of(name))(delay)

    count = k if case.placed == "spread" else 1
    return jd.Trainer(
        dn.model(initial()),
        jd.methods.get(case.method, **dict(case.arguments)),
        optimizer,
        num_stages=k,
        boundaries=BOUNDARIES[k],
        mesh=jd.make_mesh(count, devices=jax.devices()[:count]),
        fuse=False if case.placed == "apart" else None,
        example=dn.batch(*batches()[0]),
        **options,
    )


def simulation_of(case: Case) -> CorrectedSimulation:
    ends = (*BOUNDARIES[case.num_stages], BLOCKS)
    stages = [
        [layer for block in initial()[start:end] for layer in block]
        for start, end in itertools.pairwise(ends)
    ]
    options = {name: case.options_of(name) for name in OPTIONS}
    return CorrectedSimulation(case.method, stages, case.settings, case.correctors, options)


def history(case: Case) -> list[list[Layers]]:
    """Weights after every batch of a simulation that is drained once between and at the end."""
    simulation, found = simulation_of(case), []
    for part in (batches()[:FILLED], batches()[FILLED:]):
        for batch in part:
            simulation.step(*batch)
            found.append(list(simulation.weights))
        simulation.finish()
        found.append(list(simulation.weights))
    return found


@pytest.mark.parametrize("case", nets.marked(ALL, FAST), ids=str)
def test_weights_are_the_simulations(case):
    """While the stages fill, are full, are drained, and fill again."""
    wanted, errors = iter(history(case)), []
    with jax.enable_x64(True):
        trainer = trainer_of(case)
        state = trainer.init()
        for part in (batches()[:FILLED], batches()[FILLED:]):
            for batch in part:
                state, _ = trainer.step(state, dn.batch(*batch))
                errors.append(dn.largest_error(dn.layers_of(trainer, state), next(wanted)))
            state = trainer.finish(state)
            errors.append(dn.largest_error(dn.layers_of(trainer, state), next(wanted)))
    assert len(errors) == FILLED + AGAIN + 2
    assert max(errors) < TOLERANCE, errors


def test_correctors_differ_by_far_more_than_the_tolerance():
    ends = [history(Case(name))[-1] for name in ("none", *OPTIONS)]
    for one, other in itertools.combinations(ends, 2):
        assert dn.largest_error(one, other) > 1e-4


def directions(name: str) -> Any:
    """The updates of an optimiser for some weights and gradients, and what is expected ahead."""
    rng = np.random.default_rng(2)
    weights, *gradients = ({"w": jnp.asarray(rng.normal(size=(4, 3)))} for _ in range(4))
    return weights, gradients, getattr(jd.optim, name)(0.01)


def test_prediction_goes_where_adam_goes(x64):
    """XPipe's: as many of Adam's steps as the gradient is late."""
    weights, gradients, adam = directions("adam")
    predicted = jd.optim.weight_prediction(adam, 3.0)
    state = predicted.init(weights)
    first, second = 0.0, 0.0
    assert not np.any(state.trail.ahead_by(weights)["w"])
    for t, gradient in enumerate(gradients, start=1):
        updates, state = predicted.update(gradient, state, weights)
        weights = optax.apply_updates(weights, updates)
        g = np.asarray(gradient["w"])
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
        adams = first / (1 - 0.9**t) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
        np.testing.assert_allclose(
            state.trail.ahead_by(weights)["w"], -3.0 * 0.01 * adams, rtol=1e-10
        )


@pytest.mark.parametrize("name", jd.optim.correctors.names())
def test_without_delay_an_optimiser_is_itself(name):
    sgd = jd.optim.sgd(0.1, momentum=0.9)
    assert jd.optim.corrected(sgd, name)(delay=0.0) is sgd


def test_a_run_continues_to_the_bit(x64):
    """Two correctors at once, with all that they keep."""

    def optimizer(delay: float) -> Any:
        fed = jd.optim.error_feedback(jd.optim.adam(0.01), delay)
        return jd.optim.weight_prediction(fed, delay)

    trainer = trainer_of(Case("", num_stages=2), optimizer)
    data = [dn.batch(*batch) for batch in batches()]
    state, _ = nets.trained(trainer, data, 9)
    saved = nets.to_arrays(trainer, state)
    state, _ = nets.trained(trainer, data[9:], 4, state)
    wanted = nets.to_arrays(trainer, state)
    state, _ = nets.trained(trainer, data[9:], 4, trainer.from_arrays(9, saved))
    found = nets.to_arrays(trainer, state)
    assert any("trail/previous" in name for name in wanted)
    assert nets.same_bits(found, wanted)


def test_stages_are_told_their_delay():
    """Steps of a stage, so that accumulation counts."""
    delays = {}
    for method, arguments in (
        ("fdg", {}),
        ("ddg", {}),
        ("fr", {}),
        ("adl", {"accumulate": 2}),
        ("bp", {}),
    ):
        route = jd.methods.get(method, **arguments).route
        delays[method] = [route.delay(k, 4) for k in range(4)]
    assert delays == {
        "fdg": [5, 3, 1, 0],
        "ddg": [3, 2, 1, 0],
        "fr": [3, 2, 1, 0],
        "adl": [2.5, 1.5, 0.5, 0],
        "bp": [0, 0, 0, 0],
    }
    told = []

    def optimizer(delay: float) -> Any:
        told.append(delay)
        return jd.optim.sgd(0.1 / (1 + delay))

    trainer_of(Case("", num_stages=2), optimizer)
    assert {*told} == {1.0, 0.0}
    told.clear()
    trainer_of(Case("", num_stages=2), optimizer, accumulate=4)
    assert {*told} == {0.25, 0.0}


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (jd.optim.sgd, "optimizer is a function: a optax GradientTransformation is needed"),
        (lambda delay: delay, "what optimizer returns is a float: a optax GradientTransf"),
    ],
)
def test_what_is_no_optimiser(optimizer, message):
    with pytest.raises(TypeError, match=f"^{message}"):
        trainer_of(Case(""), optimizer)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nesterov", {}, "unknown corrector 'nesterov': allowed are none, weight_prediction"),
        ("weight_prediction", {"horizon": 0}, "horizon is 0: a finite number above 0 is needed"),
        ("look_ahead", {"momentum": 1.0}, r"momentum is 1.0: a number in \[0, 1\) is needed"),
        ("spike_compensation", {"momentum": -1}, r"momentum is -1: a number in \[0, 1\) is needed"),
        ("error_feedback", {"strength": -1}, "strength is -1: a finite number of at least 0"),
        ("rate_scaling", {"steps": 0.5}, "steps is 0.5: a whole number of at least 0 is needed"),
    ],
)
def test_bad_options_get_one_clear_line(name, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        jd.optim.corrected(jd.optim.sgd(0.1), name, **options)(delay=2.0)
