"""Designs of trainings: what a Trainer is, without arrays and without the devices."""

import inspect

import jax
import nets
import numpy as np
import pytest
from flax import nnx

import jdecouple as jd
from jdecouple.pipeline.build import abstract
from jdecouple.pipeline.design import make_design
from jdecouple.pipeline.mesh import described
from jdecouple.pipeline.state import queue_shapes


def make(rngs: nnx.Rngs) -> jd.Model:
    """A net with statistics, dropout and a classifier."""
    model = nets.user_model()
    return jd.Model([*model.blocks, nnx.Linear(12, 12, rngs=rngs)], model.classifier)


@pytest.mark.slow
@pytest.mark.parametrize("name", nets.marked(jd.methods.names(), ("fdg",)))
def test_a_design_without_arrays_is_the_trainers(name):
    """Of the same stages, the same state and the same calls."""
    example = nets.batches(1)[0]
    options = {"num_stages": 3, "mesh": jd.make_mesh(3), "ema": 0.9, "dtype": "bfloat16"}
    method, optimizer = nets.method(name), jd.optim.sgd(0.1, momentum=0.9)
    trainer = jd.Trainer(make(nnx.Rngs(0)), method, optimizer, example=example, **options)
    options["mesh"] = jd.make_mesh(3, devices=described(3))
    before = jax.live_arrays()  # held, so that none of other tests goes meanwhile
    found = make_design(make, method, optimizer, example=abstract(example), **options)
    states = [
        jax.eval_shape(stage.initial)
        | queue_shapes(found.schedule, method.route, found.stages, stage.index)
        for stage in found.stages
    ]
    assert len(jax.live_arrays()) == len(before)
    assert tuple(states) == tuple(trainer.abstract().stages)
    assert [stage.carry for stage in found.stages] == [stage.carry for stage in trainer.stages]
    assert (found.boundaries, found.calls) == (trainer.boundaries, trainer.calls)
    assert found.block_costs() == trainer.block_costs()
    assert found.engine[:3] == trainer.design.engine[:3]


def test_many_devices_need_not_be_there():
    """Nor need weights fit into memory: these are 19 TB."""

    def wide(rngs: nnx.Rngs) -> jd.Model:
        return jd.models.mlp(5, input_size=20, hidden=550_000, depth=19, rngs=rngs)

    example = abstract(nets.batches(1)[0])
    found = make_design(
        wide,
        nets.method("bp"),
        jd.optim.sgd(0.1),
        mesh=jd.make_mesh(16, 2, devices=described(32)),
        boundaries=range(16),
        example=example,
    )
    assert [len(group) for group in found.device_groups] == [2] * 16
    assert len(found.calls) == 2 * 16 - 1
    count = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(found.stages[1].initial)))
    assert count == 550_000**2 + 550_000


def test_engines_are_chosen_for_described_devices():
    options = {
        "method": nets.method("bp"),
        "optimizer": jd.optim.sgd(0.1),
        "num_stages": 3,
        "mesh": jd.make_mesh(3, devices=described(3)),
        "example": abstract(nets.batches(1)[0]),
    }
    even = make_design(lambda rngs: nets.mlp(depth=4), engine="auto", **options).engine
    assert (even.name, even.schedule.name) == ("spmd", "gpipe")
    with pytest.raises(ValueError, match="same devices"):
        make_design(make, fuse=True, **options)


def test_the_arguments_are_the_trainers():
    trainer, design = map(inspect.signature, (jd.Trainer.__init__, make_design))
    defaults = [
        {name: each.default for name, each in signature.parameters.items() if name != "self"}
        for signature in (trainer, design)
    ]
    assert defaults[0] == defaults[1]


def test_labels_are_checked():
    data = nets.batches(1)[0]
    wrong = {**data, "label": np.full_like(data["label"], nets.CLASSES)}
    with pytest.raises(ValueError, match="label 5 is out of range"):
        make_design(make, nets.method("bp"), jd.optim.sgd(0.1), example=wrong)
