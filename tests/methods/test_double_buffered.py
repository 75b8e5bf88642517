"""2bw against a naive simulation, which follows PipeDream-2BW's paper (arXiv 2006.09503)."""

import functools
import itertools
from typing import Any, NamedTuple

import delayed_nets as dn
import jax
import nets
import numpy as np
import pytest
from delayed_simulation import Layers, backward, cross_entropy, forward

import jdecouple as jd

TOLERANCE = 1e-12
SIZES = (6, 8, 7, 8, 4)
BATCH = 10  # no width: arrays tell by their shapes what they are
LR, MOMENTUM, DECAY = 0.1, 0.9, 5e-4
BOUNDARIES = {1: (0,), 2: (0, 2), 3: (0, 1, 3), 4: (0, 1, 2, 3)}
DRAINED, STEPS = 14, 22  # within a group, but for groups of one or two

pytestmark = pytest.mark.usefixtures("module_x64")


initial = functools.partial(dn.layers, SIZES)
batches = functools.partial(dn.examples, STEPS, size=BATCH, inputs=SIZES[0], classes=SIZES[-1])


class Simulated(NamedTuple):
    """Every version of the weights of the whole net, and the loss of every batch."""

    versions: list[Layers]
    losses: list[float]


@functools.cache
def simulated(size: int, delay: int) -> Simulated:
    """The paper's section 3.1: m_t = b m_(t-1) + grad f(W(t-1)), W(t+1) = W(t) - r m_t.

    Group t has `size` batches, over which the gradient is averaged; with delay 0 it is that of
    W(t). W(-1) is W(0).
    """
    versions = [[layer for layers in initial() for layer in layers]]
    velocity = [[0 * part for part in layer] for layer in versions[0]]
    losses: list[float] = []
    for t in range(STEPS // size + 1):
        layers = versions[max(t - delay, 0)]
        found = []
        for x, labels in batches()[t * size : (t + 1) * size]:
            outputs = forward(layers, x, is_last=True)
            loss, error = cross_entropy(outputs[-1], labels)
            losses.append(loss)
            found.append(backward(layers, outputs, error, is_last=True)[0])
        if len(found) < size:
            break
        new = []
        for number, layer in enumerate(versions[t]):
            parts = []
            for part, value in enumerate(layer):
                gradient = sum(each[number][part] for each in found) / size + DECAY * value
                velocity[number][part] = MOMENTUM * velocity[number][part] + gradient
                parts.append(value - LR * velocity[number][part])
            new.append((parts[0], parts[1]))
        versions.append(new)
    return Simulated(versions, losses)


class Case(NamedTuple):
    """K stages, batches to a step, and on what."""

    num_stages: int
    size: int
    placed: str = "fused"  # or "apart": compiled apart on one device; "spread": K devices; "data"

    def __str__(self) -> str:
        return f"K{self.num_stages}-M{self.size}-{self.placed}"

    @property
    def delay(self) -> int:
        return 1 if self.num_stages > 1 else 0

    def wanted(self, step: int, drained: int) -> list[Layers]:
        """Layers of every stage after so many batches, of which some have left all stages.

        Stage k goes back on the batch that entered K - 1 - k iterations ago, and steps with every
        `size`-th.
        """
        versions = simulated(self.size, self.delay).versions
        ends = [*BOUNDARIES[self.num_stages], len(SIZES) - 1]
        passes = [max(step - self.num_stages + 1 + k, drained) for k in range(self.num_stages)]
        return [
            versions[count // self.size][start:end]
            for count, (start, end) in zip(passes, itertools.pairwise(ends), strict=True)
        ]


CASES = [
    *(Case(k, size) for k, size in ((1, 1), (1, 3), (2, 1), (2, 4), (3, 2), (4, 3), (4, 4))),
    Case(4, 4, "apart"),
    Case(4, 4, "spread"),
    Case(2, 3, "data"),
]
FAST = [Case(1, 3), Case(2, 1), Case(4, 4)]


@functools.cache
def trainer_of(case: Case) -> jd.Trainer:
    k = case.num_stages
    mesh = {"spread": (k, 1), "data": (k, 2)}.get(case.placed, (1, 1))
    return jd.Trainer(
        dn.model(initial()),
        jd.methods.get("2bw", accumulate=case.size),
        jd.optim.sgd(LR, momentum=MOMENTUM, weight_decay=DECAY),
        num_stages=k,
        boundaries=BOUNDARIES[k],
        mesh=jd.make_mesh(*mesh, devices=jax.devices()[: mesh[0] * mesh[1]]),
        fuse=False if case.placed == "apart" else None,
        example=dn.batch(*batches()[0]),
    )


@pytest.mark.parametrize("case", nets.marked(CASES, FAST), ids=str)
def test_it_follows_the_paper(case):
    """While filling, in the steady state, drained, and after it."""
    trainer = trainer_of(case)
    state, drained = trainer.init(), 0
    errors, losses = [], []
    for step, batch in enumerate(batches(), start=1):
        state, metrics = trainer.step(state, dn.batch(*batch))
        losses.append(float(metrics["loss"]))
        errors.append(dn.largest_error(dn.layers_of(trainer, state), case.wanted(step, drained)))
        if step == DRAINED:
            state, drained = trainer.finish(state), step
            errors.append(
                dn.largest_error(dn.layers_of(trainer, state), case.wanted(step, drained))
            )
    assert max(errors) < TOLERANCE, errors
    np.testing.assert_allclose(losses, simulated(case.size, case.delay).losses, rtol=2e-7)


def test_the_delay_shows():
    """By far more than the tolerance, so that agreement says which of both it is."""
    late, exact = (simulated(4, delay).versions[-1] for delay in (1, 0))
    assert dn.largest_error([late], [exact]) > 1e-3


def test_resumed_in_the_middle_it_goes_on_to_the_bit():
    """With batches in the stages, and the versions and gradients of an unfinished group."""
    case = Case(4, 4)
    trainer, data = trainer_of(case), [dn.batch(*each) for each in batches()]
    state, _ = nets.trained(trainer, data, 11)
    arrays = nets.to_arrays(trainer, state)
    assert {"block_0/previous/block/layers/0/kernel", "stage_0/passes"} <= arrays.keys()
    again = trainer.from_arrays(11, arrays)
    for batch in data[11:17]:
        state, _ = trainer.step(state, batch)
        again, _ = trainer.step(again, batch)
    assert nets.same_bits(nets.to_arrays(trainer, again), nets.to_arrays(trainer, state))


def test_weights_are_kept_twice_and_not_in_the_queues():
    trainer = trainer_of(Case(4, 4))
    for stage in trainer.init().stages[:-1]:
        shapes = {leaf.shape for leaf in jax.tree.leaves(stage["params"])}
        assert {leaf.shape for leaf in jax.tree.leaves(stage["previous"])} == shapes
        waiting = {leaf.shape for leaf in jax.tree.leaves(stage["queues"])}
        assert not waiting & {shape for shape in shapes if len(shape) == 2}


@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_staleness_does_not_grow_with_the_stages(num_stages):
    route = jd.methods.get("2bw", accumulate=8).route
    for k in range(num_stages):
        assert route.staleness(k, num_stages).weights == min(1, num_stages - 1)
        assert route.staleness(k, num_stages).error == (num_stages - 1 - k) / 8


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_stages": 4}, ("accumulate is 2", "4 stages", "3 batches")),
        ({"engine": "spmd"}, ("engine 'spmd'", "given a delayed one")),
    ],
)
def test_what_it_refuses(options, told):
    def build() -> Any:
        method = jd.methods.get("2bw", accumulate=2)
        options_ = {"num_stages": 2, "example": nets.batches(1)[0], **options}
        return jd.Trainer(nets.mlp(), method, jd.optim.sgd(0.1), **options_)

    nets.assert_clear(ValueError, told, build)


def test_forwards_by_other_weights_are_refused():
    words = ("2bw", "forwards", "allowed")
    optimizer = jd.optim.corrected(jd.optim.sgd(0.1, momentum=0.9), "weight_prediction")
    nets.assert_clear(
        ValueError, words, lambda: nets.build("2bw", num_stages=2, optimizer=optimizer)
    )
    nets.build(
        "2bw", num_stages=2, optimizer=jd.optim.corrected(jd.optim.sgd(0.1), "error_feedback")
    )
