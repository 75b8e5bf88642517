"""petra against a naive simulation, which follows the paper (arXiv 2406.02052); what it keeps."""

import functools
import itertools
from typing import Any, NamedTuple

import delayed_nets as dn
import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
import token_nets
from delayed_simulation import Layer, cross_entropy
from flax import nnx

import jdecouple as jd
from jdecouple.models.reversible import ReversibleUnit

TOLERANCE = 1e-12
BATCH, WIDTH, CLASSES = 6, 8, 4
LR, MOMENTUM, DECAY = 0.1, 0.9, 5e-4
FIRST, SECOND = 15, 8  # iterations before the first draining, and between it and the second

pytestmark = pytest.mark.usefixtures("module_x64")


# --- The simulation -------------------------------------------------------------------------------


class Block(NamedTuple):
    """A dense layer: tanh behind it ("dense"), none ("end"), or the branch of a "pair".

    A pair (a, b) of streams becomes (b + tanh(a W + c), a).
    """

    kind: str
    layer: Layer


def run(block: Block, x: np.ndarray) -> np.ndarray:
    kernel, bias = block.layer
    if block.kind == "pair":
        first, second = np.split(x, 2, axis=1)
        return np.hstack([second + np.tanh(first @ kernel + bias), first])
    z = x @ kernel + bias
    return z if block.kind == "end" else np.tanh(z)


def undo(block: Block, y: np.ndarray) -> np.ndarray:
    assert block.kind == "pair"
    kernel, bias = block.layer
    total, first = np.split(y, 2, axis=1)
    return np.hstack([first, total - np.tanh(first @ kernel + bias)])


def pull(block: Block, x: np.ndarray, error: np.ndarray) -> tuple[Layer, np.ndarray]:
    """The gradient of a block at an input, and the error there."""
    kernel, bias = block.layer
    kept = np.zeros_like(x)
    if block.kind == "pair":
        (x, _), (error, passed) = np.split(x, 2, axis=1), np.split(error, 2, axis=1)
        kept = np.hstack([passed, error])
    z = x @ kernel + bias
    inner = error if block.kind == "end" else error * (1 - np.tanh(z) ** 2)
    back = inner @ kernel.T
    if block.kind == "pair":
        back = np.hstack([back, 0 * back])
    return (x.T @ inner, inner.sum(axis=0)), kept + back


class Simulation:
    """Algorithm 1 for every stage, with messages by (stage, batch); SGD as PyTorch's.

    Attributes:
        stages: current blocks of every stage.
        losses: by batch.
        inputs: by (stage, batch), the input of the stage that it sent back.
    """

    def __init__(self, stages: list[list[Block]], accumulate: int):
        self.stages = [list(blocks) for blocks in stages]
        self.accumulate = accumulate
        self.velocity: list[Any] = [[(0 * w, 0 * b) for _, (w, b) in s] for s in stages]
        self.pending: list[list[list[Layer]]] = [[] for _ in stages]
        self.batches: list[tuple[np.ndarray, np.ndarray]] = []
        self.time = self.first = 0
        self.losses: dict[int, float] = {}
        self.inputs: dict[tuple[int, int], np.ndarray] = {}
        self._sent: dict[tuple[int, int], np.ndarray] = {}
        self._errors: dict[tuple[int, int], np.ndarray] = {}
        self._buffers: dict[tuple[int, int], np.ndarray] = {}

    def step(self, x: np.ndarray, labels: np.ndarray) -> float:
        self.batches.append((x, labels))
        known = len(self.losses)
        self._tick()
        return list(self.losses.values())[-1] if len(self.losses) > known else np.nan

    def finish(self) -> None:
        for _ in range(2 * (len(self.stages) - 1)):
            self._tick()
        self.first = self.time = len(self.batches)

    def _tick(self) -> None:
        """Batch b enters in tick b, and is at stage k in tick b + k; on its way back in the ticks
        after, one a stage. Whatever a stage does in a tick, it does by the weights before it."""
        last = len(self.stages) - 1
        exists = range(self.first, len(self.batches))
        for k in range(last + 1):
            up, down = self.time - k, self.time - 2 * last + k
            if up in exists:
                x = self._sent[k - 1, up] if k else self.batches[up][0]
                self._forward(k, up, x)
            if down in exists and k < last:
                self._backward(k, down, self._errors[k + 1, down])
        self.time += 1

    def _forward(self, k: int, batch: int, x: np.ndarray) -> None:
        y = x
        for block in self.stages[k]:
            y = run(block, y)
        self._sent[k, batch] = y
        if not self._reversible(k):
            self._buffers[k, batch] = x
        if k == len(self.stages) - 1:
            self.losses[batch], error = cross_entropy(y, self.batches[batch][1])
            self._backward(k, batch, error)

    def _reversible(self, k: int) -> bool:
        return all(block.kind == "pair" for block in self.stages[k])

    def _backward(self, k: int, batch: int, error: np.ndarray) -> None:
        blocks = self.stages[k]
        if self._reversible(k):
            x = self.inputs[k + 1, batch]
            for block in reversed(blocks):
                x = undo(block, x)
        else:
            x = self._buffers.pop((k, batch))
        self.inputs[k, batch] = x
        outputs = [*itertools.accumulate(blocks, lambda x, block: run(block, x), initial=x)]
        gradients = []
        for block, received in zip(reversed(blocks), reversed(outputs[:-1]), strict=True):
            gradient, error = pull(block, received, error)
            gradients.insert(0, gradient)
        self._errors[k, batch] = error
        self.pending[k].append(gradients)
        if len(self.pending[k]) == self.accumulate:
            self._update(k)

    def _update(self, k: int) -> None:
        for number, (kind, layer) in enumerate(self.stages[k]):
            parts, velocities = [], []
            for part, value in enumerate(layer):
                found = [gradients[number][part] for gradients in self.pending[k]]
                gradient = sum(found) / self.accumulate + DECAY * value
                velocities.append(MOMENTUM * self.velocity[k][number][part] + gradient)
                parts.append(value - LR * velocities[-1])
            self.stages[k][number] = Block(kind, (parts[0], parts[1]))
            self.velocity[k][number] = tuple(velocities)
        self.pending[k] = []


# --- The library ----------------------------------------------------------------------------------


class Case(NamedTuple):
    """K stages, batches to a step, and on what."""

    num_stages: int
    accumulate: int = 1
    stem: bool = True
    placed: str = "fused"  # or "spread": K devices

    def __str__(self) -> str:
        return f"K{self.num_stages}-M{self.accumulate}-{self.placed}-{'stem' * self.stem}"


BOUNDARIES = {1: (0,), 2: (0, 3), 3: (0, 2, 3), 4: (0, 1, 3, 5)}


@functools.cache
def blocks(stem: bool) -> list[Block]:
    """A stem or a pair, four pairs and the end."""
    rng = np.random.default_rng(0)

    def layer(inputs: int, outputs: int) -> Layer:
        return rng.normal(size=(inputs, outputs)) / inputs**0.5, rng.normal(size=outputs) / 5

    pairs = [Block("pair", layer(WIDTH // 2, WIDTH // 2)) for _ in range(5)]
    first = Block("dense", layer(WIDTH, WIDTH)) if stem else pairs[4]
    return [first, *pairs[:4], Block("end", layer(WIDTH, CLASSES))]


batches = functools.partial(dn.examples, FIRST + SECOND, size=BATCH, inputs=WIDTH, classes=CLASSES)


def module(block: Block) -> nnx.Module:
    stack = dn.Stack([block.layer], linear_end=block.kind == "end")
    return ReversibleUnit(stack) if block.kind == "pair" else stack


@functools.cache
def trainer_of(case: Case) -> jd.Trainer:
    k = case.num_stages
    count = k if case.placed == "spread" else 1
    return jd.Trainer(
        jd.Model([module(block) for block in blocks(case.stem)]),
        jd.methods.get("petra", accumulate=case.accumulate),
        jd.optim.sgd(LR, momentum=MOMENTUM, weight_decay=DECAY),
        num_stages=k,
        boundaries=BOUNDARIES[k],
        mesh=jd.make_mesh(count, devices=jax.devices()[:count]),
        example=dn.batch(*batches()[0]),
    )


def simulation_of(case: Case) -> Simulation:
    ends = itertools.pairwise([*BOUNDARIES[case.num_stages], len(blocks(case.stem))])
    return Simulation([blocks(case.stem)[start:end] for start, end in ends], case.accumulate)


def layers_of(trainer: jd.Trainer, state: Any) -> list[list[Layer]]:
    stacks = [getattr(block, "branch", block) for block in trainer.modules(state)]
    return [
        [(np.asarray(x.kernel[...]), np.asarray(x.bias[...]))] for s in stacks for x in s.layers
    ]


CASES = [
    *(Case(k) for k in (1, 2, 3, 4)),
    *(Case(4, stem=False), Case(4, 2), Case(4, 3, stem=False), Case(4, placed="spread")),
]
FAST = [Case(1), Case(4)]


@pytest.mark.parametrize("case", nets.marked(CASES, FAST), ids=str)
def test_it_follows_the_paper(case):
    """While filling, in the steady state, drained, and after it."""
    trainer, simulation = trainer_of(case), simulation_of(case)
    state = trainer.init()
    errors, losses = [], []

    def error() -> float:
        wanted = [[block.layer for block in stage] for stage in simulation.stages]
        return dn.largest_error(layers_of(trainer, state), wanted)

    for step, batch in enumerate(batches(), start=1):
        state, metrics = trainer.step(state, dn.batch(*batch))
        losses.append((float(metrics["loss"]), simulation.step(*batch)))
        errors.append(error())
        if step in (FIRST, FIRST + SECOND):
            state = trainer.finish(state)
            simulation.finish()
            errors.append(error())
    assert max(errors) < TOLERANCE, errors
    found, wanted = zip(*losses, strict=True)
    np.testing.assert_allclose(found, wanted, rtol=2e-7)


def test_the_inputs_that_it_makes_are_not_those_that_were():
    """Weights move meanwhile, so that agreement says that inputs were rebuilt by current ones."""
    simulation = simulation_of(Case(4))
    for batch in batches():
        simulation.step(*batch)
    made, was = simulation.inputs[1, 10], simulation._sent[0, 10]
    assert np.abs(made - was).max() > 1e-3


def test_resumed_in_the_middle_it_goes_on_to_the_bit():
    trainer, data = trainer_of(Case(4)), [dn.batch(*each) for each in batches()]
    state, _ = nets.trained(trainer, data, 9)
    arrays = nets.to_arrays(trainer, state)
    again = trainer.from_arrays(9, arrays)
    for batch in data[9:13]:
        state, _ = trainer.step(state, batch)
        again, _ = trainer.step(again, batch)
    assert nets.same_bits(nets.to_arrays(trainer, again), nets.to_arrays(trainer, state))


# --- What stages keep, and how exactly inputs are rebuilt -----------------------------------------


def held(name: str, num_stages: int) -> list[int]:
    """Bytes that wait in every stage but the last between two batches; a pair of layers each."""
    rng = nnx.Rngs(0)
    units = [
        ReversibleUnit(nnx.Linear(WIDTH // 2, WIDTH // 2, rngs=rng)) for _ in range(num_stages)
    ]
    trainer = jd.Trainer(
        jd.Model(units, nnx.Linear(WIDTH, CLASSES, rngs=rng)),
        jd.methods.get(name),
        jd.optim.sgd(0.1),
        num_stages=num_stages,
        mesh=jd.make_mesh(1, devices=jax.devices()[:1]),
        example=dn.batch(*batches()[0]),
    )
    queues = [stage["queues"] for stage in trainer.abstract().stages[:-1]]
    return [sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(queue)) for queue in queues]


def test_what_a_stage_keeps_does_not_grow_with_the_stages():
    """An activation on its way up, one on its way down, an error: that of dsp grows."""
    first, *others = held("petra", 3)
    assert {*held("petra", 5)[1:]} == {*others}
    assert held("petra", 5)[0] == first == 2 * BATCH * WIDTH * 8  # nothing comes from below
    assert others == [first + BATCH * (WIDTH * 8 + 4)]  # and labels
    assert held("dsp", 5)[0] > 1.5 * held("dsp", 3)[0]


@pytest.mark.parametrize("name", nets.marked(["mlp", "revnet"], ["mlp"]))
def test_an_input_is_rebuilt(name):
    """Through stages of a reversible net with BatchNorm, by weights that stand still."""
    data = [{**batch, "x": batch["x"] / 255} for batch in nets.images(6)]
    options = {"image_size": 8, "channels": 1, "param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
    if name == "mlp":
        own = {"hidden": 12, "depth": 3, "batch_norm": True, "reversible": True}
    else:
        own = {"depth": 14, "width": 1 / 4}
    model = jd.models.get(name)(nets.CLASSES, **own, **options)
    trainer = jd.Trainer(
        model,
        jd.methods.get("petra"),
        jd.optim.sgd(1e-200),
        num_stages=3,
        boundaries=(0, 1, 2),
        mesh=jd.make_mesh(1, devices=jax.devices()[:1]),
        example=data[0],
    )
    assert [stage.rebuilds_input for stage in trainer.stages] == [False, True, False]
    state, _ = nets.trained(trainer, data, 6)
    # What has come back to stage 1, which makes its input of it in iteration 6.
    stem, unit = model.blocks[:2]
    for block in (stem, unit):
        block.train()
    x = stem(jnp.asarray(data[6 - 3]["x"]))
    returned = state.stages[1]["queues"]["errors"][0]["input"]
    np.testing.assert_allclose(returned, unit(x), rtol=0, atol=1e-10)
    np.testing.assert_allclose(unit.inverse(returned), x, rtol=0, atol=1e-10)


def language_model(dropout: float) -> jd.Model:
    """Two reversible layers behind an embedding."""
    options = {"dropout": dropout, "param_dtype": jnp.float64}
    return token_nets.model("reversible", **options)


def test_layers_of_a_language_model_drop_the_same_in_their_inverse():
    trainer = token_nets.trainer("petra", model=language_model(0.5), num_stages=3)
    stage = trainer.stages[1]
    assert stage.rebuilds_input
    (params, stats), key = stage.units[0].initial(), jax.random.key(1)
    rng = np.random.default_rng(0)
    begins = jnp.asarray(rng.integers(0, 2, (4, token_nets.CONTEXT)), jnp.float64)
    x = {"h": jnp.asarray(rng.normal(size=(*begins.shape, 8))), "begins": begins}
    y, other = (
        stage.units[0].train(params, stats, {"x": x}, key)[0] for key in (key, jax.random.key(2))
    )
    assert np.abs(y["h"] - other["h"]).max() > 0.1
    found = stage.units[0].invert(params, stats, y, key)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-10), found, x)


def test_a_language_model_learns_by_the_gradient_where_weights_stand_still():
    """All but still; the same batch again and again, until its errors have come down."""
    rate, moved = 1e-9, {}
    for name in ("bp", "petra"):
        options = {"optimizer": jd.optim.sgd(rate), "num_stages": 3 if name == "petra" else 1}
        trainer = token_nets.trainer(name, model=language_model(0.0), **options)
        state, _ = nets.trained(trainer, token_nets.batches(1) * 5, 5)
        before = nets.to_arrays(trainer, state)
        state, _ = trainer.step(state, token_nets.batches(1)[0])
        after = nets.to_arrays(trainer, state)
        names = [name for name in after if "/params/" in name]
        moved[name] = {name: (after[name] - before[name]) / rate for name in names}
    assert len(moved["bp"]) == len(moved["petra"]) > 20
    for name, gradient in moved["bp"].items():
        np.testing.assert_allclose(moved["petra"][name], gradient, rtol=1e-4, atol=1e-6)


def test_a_wire_is_refused():
    case = trainer_of(Case(4))

    def build() -> Any:
        return jd.Trainer(
            jd.Model([module(block) for block in blocks(True)]),
            case.method,
            jd.optim.sgd(0.1),
            num_stages=4,
            boundaries=BOUNDARIES[4],
            example=dn.batch(*batches()[0]),
            wire="int8",
        )

    nets.assert_clear(ValueError, ("wire is 'int8'", "petra", "not rounded"), build)
