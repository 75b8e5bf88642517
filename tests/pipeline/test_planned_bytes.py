"""Bytes that are planned, against those that compiled calls report and that arrays hold."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
from flax import nnx

import jdecouple as jd
from jdecouple.pipeline.build import abstract
from jdecouple.pipeline.design import make_design
from jdecouple.pipeline.mesh import described
from jdecouple.pipeline.plan.device_bytes import DeviceBytes, planned_bytes
from jdecouple.pipeline.plan.graph import graph_of
from jdecouple.pipeline.plan.liveness import needed, temporaries

BLOCKS = "16|16|32,M|32|64,M|64|64,M|64"
MODELS = {
    "vgg": lambda rngs: jd.models.vgg(10, blocks=BLOCKS, image_size=32, rngs=rngs),
    "resnet": lambda rngs: jd.models.resnet(10, depth=20, width=0.5, rngs=rngs),
    "mlp": lambda rngs: jd.models.mlp(10, input_size=3072, hidden=256, depth=4, rngs=rngs),
    "small": lambda rngs: jd.models.vgg(10, blocks="8|8,M|16,M", image_size=16, rngs=rngs),
}
SMALL = [
    pytest.param("bp", "small", 1, {"remat": "blocks"}, marks=pytest.mark.slow),
    pytest.param("fr", "small", 2, {}, marks=pytest.mark.slow),
]
SETUPS = [
    ("bp", "vgg", 1, {"remat": "none"}),
    ("bp", "resnet", 1, {"remat": "elementwise"}),
    ("bp", "resnet", 1, {"remat": "blocks"}),
    ("bp", "resnet", 4, {"microbatches": 4, "schedule": "gpipe"}),
    ("bp", "vgg", 2, {"microbatches": 4, "schedule": "1f1b"}),
    ("early_exit", "resnet", 2, {"remat": "blocks"}),
    ("greedy_exit", "vgg", 2, {"fuse": True, "mesh": jd.make_mesh(devices=jax.devices()[:1])}),
    ("scpl", "mlp", 2, {}),
    ("fdg", "vgg", 4, {}),
    ("ddg", "mlp", 4, {}),
]


def images(side: int, count: int = 64) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, side, side, 3)).astype(np.float32)
    return {"x": x, "label": rng.integers(0, 10, count).astype(np.int32)}


def planned_and_measured(
    name: str, model: str, stages: int, options: dict[str, Any]
) -> tuple[list[int], list[int]]:
    """Bytes of every device, by a plan without arrays and devices, and of the training."""
    batch = images(16 if model == "small" else 32)
    own = {"hidden": 128, "features": 64} if name == "scpl" else {}
    method, optimizer = nets.method(name, **own), jd.optim.sgd(0.1, momentum=0.9)
    options = {"num_stages": stages, "mesh": jd.make_mesh(stages), **options}
    trainer = jd.Trainer(MODELS[model](nnx.Rngs(0)), method, optimizer, example=batch, **options)
    _, measured = jd.diagnostics.measured_memory(trainer, trainer.init(), batch)
    count = len(set(trainer.placements))
    options["mesh"] = jd.make_mesh(min(stages, count), devices=described(count))
    make, example = MODELS[model], abstract(batch)
    before = jax.live_arrays()  # held, so that none of other tests goes meanwhile
    design = make_design(make, method, optimizer, example=example, **options)
    planned = planned_bytes(design)
    assert len(jax.live_arrays()) == len(before)
    found = [measured[placement.devices[0]] for placement in dict.fromkeys(trainer.placements)]
    return [each.total for each in planned], found


@pytest.mark.parametrize(("name", "model", "stages", "options"), SMALL)
def test_small_nets_hold_about_what_is_planned(name, model, stages, options):
    planned, measured = planned_and_measured(name, model, stages, options)
    assert planned == [pytest.approx(size, rel=0.1) for size in measured]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "model", "stages", "options"), SETUPS)
def test_devices_hold_what_is_planned(name, model, stages, options):
    planned, measured = planned_and_measured(name, model, stages, options)
    assert planned == [pytest.approx(size, rel=0.1) for size in measured]


@functools.cache
def planned(name: str, devices: int = 2, **options: Any) -> tuple[DeviceBytes, ...]:
    """Plan of a perceptron of two stages on described devices."""
    design = make_design(
        lambda rngs: nets.mlp(),
        nets.method(name),
        jd.optim.sgd(0.1, momentum=0.9),
        mesh=jd.make_mesh(2, devices // 2, devices=described(devices)),
        example=abstract(nets.batches(1, size=32)[0]),
        **options,
    )
    return planned_bytes(design)


@pytest.mark.slow
def test_state_is_exact_and_queues_are_what_the_schedule_says():
    """The delayed route keeps inputs of as many batches as the schedule says, and an error."""
    first, _ = planned("greedy_exit")
    weights = 4 * (20 * 24 + 24 + 24 * 24 + 24 + 2 * (24 * 5 + 5))
    assert (first.weights, first.optimizer, first.queues) == (weights, weights, 0)
    averaged, _ = planned("greedy_exit", ema=0.9)
    assert averaged.optimizer == 2 * weights
    late, last = planned("fdg")
    assert late.queues > 2 * 32 * 24 * 4
    assert last.queues >= 32 * 24 * 4
    accumulated, _ = planned("adl")  # whose optimiser branches
    assert accumulated.optimizer > late.optimizer


def test_replicas_share_activations_and_not_weights():
    one, two = planned("bp")[0], planned("bp", devices=4)[0]
    assert (one.weights, 2 * two.messages) == (two.weights, one.messages)
    assert two.working < one.working


def bytes_of(function: Any, *shapes: Any, reused: Any = None) -> int:
    closed = jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
    return needed(graph_of(closed, "cpu", temporaries), reused or {})


def test_chains_hold_nothing_and_products_do():
    size, shape = 4 * 64 * 64, (64, 64)
    assert bytes_of(lambda x: jnp.sin(2 * x + 1) * x, shape) == size
    assert bytes_of(lambda x: (x @ x) @ x, shape) == 2 * size
    assert bytes_of(lambda x: jnp.sum(jnp.sin(x) @ x), shape) == 2 * size + 4


def test_a_donated_argument_is_taken_over_or_copied():
    size, shape = 4 * 64 * 64, (64, 64)
    assert bytes_of(lambda w: w - 0.1 * w, shape, reused={0: 0}) == 0
    assert bytes_of(lambda w, x: (w + 1, x @ w), shape, shape, reused={0: 0}) == 2 * size


def test_a_loop_needs_what_its_body_does():
    def step(x, _):
        return x @ x, None

    size, shape = 4 * 64 * 64, (64, 64)
    found = bytes_of(lambda x: jax.lax.scan(step, x, None, length=3)[0], shape)
    assert size <= found <= 3 * size
