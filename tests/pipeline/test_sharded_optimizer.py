"""An optimiser's state that is cut over the replicas of a stage: the same numbers, fewer bytes."""

import functools
import re
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest

import jdecouple as jd
from jdecouple.pipeline.plan.device_bytes import planned_bytes
from jdecouple.pipeline.state import take_queues

pytestmark = pytest.mark.usefixtures("module_x64")

ADAM, LARS = jd.optim.adam(1e-2), jd.optim.lars(0.2)
STEPS = 4


class Case(NamedTuple):
    """A training.

    `replicas` are those of each stage; `chunk` are the batches of its one call, where it is not 1.
    """

    method: str
    optimizer: Any
    replicas: tuple[int, ...]
    options: Mapping[str, Any] = MappingProxyType({})
    chunk: int = 1
    steps: int = STEPS


CASES = {
    # The norm of a gradient that waits between calls, in parts.
    "bp": Case("bp", ADAM, (2, 2), {"microbatches": 2, "clip_norm": 0.1}),
    # Norms of whole arrays, in the optimiser; and accumulated gradients.
    "deinforeg": Case("deinforeg", LARS, (2,), {"ema": 0.9, "accumulate": 2}),
    "fdg": Case("fdg", ADAM, (2, 2)),
    "four": Case("greedy_exit", ADAM, (4,), chunk=4),
    "spmd": Case("greedy_exit", ADAM, (2, 2), {"engine": "spmd"}),
    "fr": Case("fr", ADAM, (4, 4)),
    "uneven": Case("scpl", ADAM, (2, 1)),
    "split": Case("bp", ADAM, (2, 2), {"microbatches": 4, "schedule": "zb_h1"}),
    # Its first steps are left out, until the scale of the loss fits.
    "half": Case("bp", ADAM, (2, 2), {"dtype": jnp.float16, "gradient_norms": True}, steps=16),
    "spmd-bp": Case("bp", LARS, (2, 2), {"engine": "spmd", "microbatches": 2, "clip_norm": 0.1}),
}
FAST = ("deinforeg",)
EVERY = pytest.mark.parametrize("name", nets.marked(CASES, FAST))


def build(case: Case, shard: bool, **options: Any) -> jd.Trainer:
    stages, count = len(case.replicas), sum(case.replicas)
    mesh = jd.make_mesh(replicas=case.replicas, devices=jax.devices()[:count])
    return nets.build(
        case.method,
        model=nets.mlp(depth=2 * stages, param_dtype=jnp.float64),
        optimizer=case.optimizer,
        example=nets.batches(1, dtype=np.float64)[0],
        shard_optimizer=shard,
        **{"mesh": mesh, **case.options, **options},
    )


def go_on(case: Case, trainer: jd.Trainer, state: Any) -> Any:
    """The state after the steps of a training."""
    data = nets.batches(STEPS, dtype=np.float64)
    if case.chunk > 1:
        return trainer.steps(state, data[: case.chunk])[0]
    return nets.trained(trainer, data, case.steps, state)[0]


@functools.cache
def trained(name: str, shard: bool) -> tuple[jd.Trainer, Any]:
    trainer = build(CASES[name], shard)
    return trainer, go_on(CASES[name], trainer, trainer.init())


def held(state: Any, part: str) -> Counter:
    """Bytes of a part of the state on every device."""
    found: Counter[jax.Device] = Counter()
    for stage in state.stages:
        for leaf in jax.tree.leaves(stage[part]):
            found.update({shard.device: shard.data.nbytes for shard in leaf.addressable_shards})
    return found


@EVERY
def test_the_numbers_are_those_of_whole_states(name):
    (sharded, state), (whole, wanted) = (trained(name, shard) for shard in (True, False))
    arrays = nets.to_arrays(sharded, state), nets.to_arrays(whole, wanted)
    assert nets.largest_error(*arrays) < 1e-12
    moved = nets.largest_error(nets.weights(whole, wanted), nets.weights(whole, whole.init()))
    assert moved > 1e-3


@EVERY
def test_a_replica_holds_its_part_of_the_optimizer_and_all_weights(name):
    state, whole = (trained(name, shard)[1] for shard in (True, False))
    assert held(state, "params") == held(whole, "params")
    parts, wanted = held(state, "opt"), held(whole, "opt")
    assert len(parts) == sum(CASES[name].replicas)
    devices = iter(jax.devices())
    for count in CASES[name].replicas:
        for device in (next(devices) for _ in range(count)):
            # Biases of the five classes and counts stay whole.
            assert wanted[device] / count <= parts[device] < wanted[device] / count * 1.05


@pytest.mark.slow
def test_the_plan_knows_the_parts():
    for shard in (False, True):
        trainer, state = trained("bp", shard)
        planned = [device for each in planned_bytes(trainer.design) for device in each.devices]
        assert [held(state, "opt")[device] for device in planned] == [
            each.optimizer for each in planned_bytes(trainer.design) for _ in each.devices
        ]


def collectives(trainer: jd.Trainer) -> Counter:
    """What a fused step sends between replicas: (operation, shape) of every array."""
    executor, batch = trainer._engine._executor, nets.batches(1, dtype=np.float64)[0]
    cores, queues = take_queues(executor.schedule, trainer.init().stages.arrays)
    step_ids = executor.step_ids(executor.calls, 0)
    text = executor._fused.lower(cores, queues, trainer.put(batch).parts, step_ids)
    found: Counter[tuple[str, str]] = Counter()
    lines = re.findall(r"= (.*?) ([a-z-]+)\(", text.compile().as_text())
    for shapes, operation in lines:
        if operation in ("all-reduce", "all-gather", "collective-permute", "all-to-all"):
            found.update((operation, shape) for shape in re.findall(r"\w+\[[\d,]+\]", shapes))
    return found


def test_only_updates_are_gathered():
    """Forward and backward are not cut otherwise than they were."""
    sharded, whole = (build(Case("bp", ADAM, (2,)), shard) for shard in (True, False))
    more = collectives(sharded) - collectives(whole)
    cut = [
        f"f64[{','.join(map(str, leaf.shape))}]"
        for leaf in jax.tree.leaves(sharded.init().stages[0]["params"])
        if any(size % 2 == 0 for size in leaf.shape)
    ]
    assert more == Counter(("all-gather", shape) for shape in cut)
    assert not collectives(whole) - collectives(sharded)


@pytest.mark.parametrize("name", nets.marked(("bp", "deinforeg", "fdg", "four", "spmd"), ("bp",)))
def test_a_run_goes_on_to_the_bit(name, tmp_path):
    trainer, state = trained(name, True)
    trainer.save(state, tmp_path)
    ends = [go_on(CASES[name], trainer, each) for each in (trainer.restore(tmp_path), state)]
    trained.cache_clear()  # its state is used up
    assert nets.same_bits(*(nets.to_arrays(trainer, end) for end in ends))


@pytest.mark.slow
def test_a_saved_state_does_not_know_of_it(tmp_path):
    """It goes on without, and with other numbers of replicas, by the same numbers."""
    data = nets.batches(dtype=np.float64)
    (sharded, state), (whole, other) = (trained("fdg", shard) for shard in (True, False))
    wanted, accuracy = nets.to_arrays(sharded, state), sharded.evaluate(state, data)
    sharded.save(state, tmp_path / "sharded")
    whole.save(other, tmp_path / "whole")
    four = build(CASES["fdg"]._replace(replicas=(4, 4)), True)
    ends = []
    for trainer, folder in ((whole, "sharded"), (four, "sharded"), (sharded, "whole")):
        restored = trainer.restore(tmp_path / folder)
        if folder == "sharded":
            assert nets.same_bits(nets.to_arrays(trainer, restored), wanted)
            assert trainer.evaluate(restored, data) == pytest.approx(accuracy, rel=1e-6)
        ends.append(nets.to_arrays(trainer, go_on(CASES["fdg"], trainer, restored)))
    assert nets.largest_error(ends[1], ends[0]) < 1e-12
    assert nets.largest_error(ends[2], ends[0]) < 1e-12


def test_one_replica_has_all():
    trainer = build(Case("bp", ADAM, (1, 1)), True)
    assert not any(placement.shard_optimizer for placement in trainer.placements)


def test_another_value_is_refused():
    words = ("shard_optimizer is 1", "True or False")
    nets.assert_clear(ValueError, words, lambda: nets.build("bp", shard_optimizer=1))
