"""Memory of compiled steps, by XLA's own count."""

import functools
from typing import Any

import jax
import nets
import numpy as np
import pytest
from flax import nnx

import jdecouple as jd
from jdecouple.methods.routes.ordering import after

BATCH = 32
IMAGES = {
    "x": np.random.default_rng(0).normal(size=(BATCH, 16, 16, 3)).astype(np.float32),
    "label": np.arange(BATCH, dtype=np.int32) % 10,
}
BLOCKS = "8,8,8,M|16,16|16,16|16,16"


@functools.cache
def temporaries(name: str, **options: Any) -> list[int]:
    """Bytes of every compiled call of a step beside what it takes and gives."""
    trainer = jd.Trainer(
        jd.models.vgg(10, blocks=BLOCKS, image_size=16, rngs=nnx.Rngs(0)),
        nets.method(name),
        jd.optim.sgd(0.1, momentum=0.9),
        mesh=jd.make_mesh(devices=jax.devices()[:1]),
        example=IMAGES,
        **options,
    )
    return [call.temp_size_in_bytes for call in analyses(trainer, IMAGES)]


def analyses(trainer: jd.Trainer, batch: Any) -> list[Any]:
    """XLA's count of a step's one call, or of one a stage under a local method."""
    executor, state = trainer._engine._executor, trainer.init()
    parts = trainer.put(batch).parts
    ids = executor.step_ids(executor.calls, 0)
    if executor.fuse:
        lowered = [executor._fused.lower(state.stages.arrays, dict(EMPTY), parts, ids)]
    else:
        carries = [parts[0], *(stage.carry for stage in trainer.stages[1:])]
        calls = zip(executor.calls, state.stages.arrays, carries, strict=True)
        lowered = [
            executor._compiled[call.stage, call.kinds].lower(
                own, None, None, carry, None, ids[:3], None
            )
            for call, own, carry in calls
        ]
    return [call.compile().memory_analysis() for call in lowered]


EMPTY: dict[str, dict] = {"carries": {}, "residuals": {}, "errors": {}}


@pytest.mark.parametrize("name", nets.marked(("greedy_exit", "deinforeg", "dgl"), ()))
@pytest.mark.parametrize("stages", nets.marked((1, 4), (1,)))
def test_a_local_program_needs_what_its_largest_block_does(name, stages):
    apart = temporaries(name, num_stages=4, fuse=False)
    message = BATCH * 8 * 8 * 8 * 4  # from the first block, the largest
    assert max(apart) == apart[0]
    (together,) = temporaries(name, num_stages=stages, fuse=True)
    assert together <= 1.1 * (apart[0] + message)


@pytest.mark.slow
def test_backpropagation_needs_more_unless_it_repeats():
    (bp,), (blocks,) = (temporaries("bp", remat=remat) for remat in ("none", "blocks"))
    (local,) = temporaries("greedy_exit", num_stages=1, fuse=True)
    assert max(blocks, local) < 0.9 * bp


def test_order_is_told_and_changes_nothing():
    first = {"a": np.float32([-1, 2]), "b": np.float32([-np.inf]), "c": np.int32([3])}
    tree = {"x": np.float32([np.nan, -0.0, 3]), "n": np.int32([7])}
    found = jax.jit(after)(first, tree)
    for key, array in tree.items():
        assert found[key].tobytes() == array.tobytes()


def held(trainer: jd.Trainer, batch: Any) -> list[int]:
    """Bytes of every device in a step, which trains as any other does."""
    first, found = jd.diagnostics.measured_memory(trainer, trainer.init(), batch)
    second, _ = trainer.step(trainer.init(), batch)
    assert first.step == second.step
    arrays, others = trainer.to_arrays(first), trainer.to_arrays(second)
    assert all(np.array_equal(arrays[name], others[name]) for name in others)
    return [found[device] for device in sorted(found, key=lambda device: device.id)]


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "calls"), [(1, 1), (2, 2)])
def test_devices_hold_what_their_calls_need(devices, calls):
    """Other arrays of the process do not count."""
    other = jax.numpy.ones((500, 500))
    data = nets.batches(1)[0]
    mesh = jd.make_mesh(devices=jax.devices()[:devices], stages=devices)
    trainer = nets.build("deinforeg", num_stages=2, mesh=mesh)
    found = analyses(trainer, data)
    assert len(found) == calls
    assert held(trainer, data) == [
        call.argument_size_in_bytes
        + call.output_size_in_bytes
        - call.alias_size_in_bytes
        + call.temp_size_in_bytes
        for call in found
    ]
    assert not other.is_deleted()


@pytest.mark.slow
def test_devices_hold_what_waits():
    """Activations of all microbatches until the first error comes, or of one."""
    data = nets.batches(1, size=256)[0]
    most = {}
    for schedule in ("gpipe", "sequential"):
        trainer = nets.build(
            "bp",
            model=nets.mlp(depth=2),
            mesh=jd.make_mesh(2),
            microbatches=4,
            schedule=schedule,
            example=data,
        )
        most[schedule] = held(trainer, data)
    kept = [stage.carry["x"].size * 4 for stage in trainer.stages]
    for more, less, carry in zip(*most.values(), kept, strict=True):
        assert more >= less + 3 * carry


@pytest.mark.parametrize("engine", ["mpmd", pytest.param("spmd", marks=pytest.mark.slow)])
def test_replicas_and_one_program_hold_as_much_on_every_device(engine):
    data = nets.batches(1)[0]
    mesh = jd.make_mesh(data=2) if engine == "mpmd" else jd.make_mesh(2)
    trainer = nets.build("greedy_exit", model=nets.mlp(), engine=engine, mesh=mesh, example=data)
    first, second = held(trainer, data)
    assert first == second > 0
