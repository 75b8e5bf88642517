"""Partition of blocks over stages, and of devices over the mesh."""

import functools
import itertools

import jax
import nets
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

import jdecouple as jd
from jdecouple.pipeline.mesh import as_stage_mesh, assign_devices
from jdecouple.pipeline.partition import balance, check_boundaries


def largest(costs, starts):
    return max(sum(costs[a:b]) for a, b in itertools.pairwise((*starts, len(costs))))


@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("seed", range(4))
def test_balance_has_the_smallest_maximum(blocks, seed):
    costs = np.random.default_rng(seed).integers(0 if seed else 1, 20, blocks).tolist()
    for stages in range(1, blocks + 1):
        starts = balance(costs, stages)
        assert len(starts) == stages
        assert starts[0] == 0
        assert all(a < b for a, b in itertools.pairwise((*starts, blocks)))
        every = itertools.combinations(range(1, blocks), stages - 1)
        assert largest(costs, starts) == min(largest(costs, (0, *cut)) for cut in every)


@pytest.mark.parametrize(
    ("costs", "stages", "starts"),
    [
        ([1, 1, 1, 1], 2, (0, 2)),
        ([9, 1, 1, 1], 2, (0, 1)),
        ([1, 1, 1, 9], 2, (0, 3)),
        ([3, 3, 6, 2, 2, 2], 3, (0, 2, 3)),
    ],
)
def test_balance_by_hand(costs, stages, starts):
    assert balance(costs, stages) == starts


@pytest.mark.parametrize("stages", [0, -1, 4])
def test_more_stages_than_blocks_are_refused(stages):
    with pytest.raises(ValueError) as error:
        balance([1, 2, 3], stages)
    assert str(error.value) == (
        f"num_stages is {stages}: between 1 and the model's 3 blocks is allowed"
    )


@pytest.mark.parametrize(
    ("given", "stages", "starts"),
    [
        ((0, 2), 2, (0, 2)),
        ((2,), 2, (0, 2)),
        ([1, 3], 3, (0, 1, 3)),
        ((), 1, (0,)),
        ((0,), 1, (0,)),
    ],
)
def test_boundaries(given, stages, starts):
    assert check_boundaries(given, stages, 4) == starts


@pytest.mark.parametrize(
    ("given", "stages"),
    [((3, 1), 3), ((2, 2), 3), ((4,), 2), ((-1,), 2), ((0, 1, 2), 2), ((1,), 3), ((), 2)],
)
def test_bad_boundaries_get_one_clear_line(given, stages):
    with pytest.raises(ValueError) as error:
        check_boundaries(given, stages, 4)
    message = str(error.value)
    assert "\n" not in message
    assert str(given) in message
    assert f"{stages - 1} increasing block indices between 1 and 3" in message


def wide_first() -> jd.Model:
    """Four blocks of which the first does nearly all the work."""
    rngs = nnx.Rngs(0)
    sizes = [(nets.FEATURES, 400, 8), (8, 8, 8), (8, 8, 8), (8, 8, 8)]
    blocks = [
        nnx.Sequential(nnx.Linear(a, b, rngs=rngs), nnx.tanh, nnx.Linear(b, c, rngs=rngs))
        for a, b, c in sizes
    ]
    return jd.Model(blocks, nnx.Linear(8, nets.CLASSES, rngs=rngs))


@pytest.mark.parametrize("name", nets.marked(jd.methods.names(), ("bp",)))
def test_trainer_balances_by_the_work_of_the_blocks(name):
    (batch,) = nets.batches(1)
    options = {"num_stages": 2, "example": batch}
    optimizer = jd.optim.sgd(0.1)
    method = nets.method(name, **({"depth": 1} if name == "auglocal" else {}))  # else a pyramid
    even = jd.Trainer(nets.mlp(depth=4), method, optimizer, **options)
    uneven = jd.Trainer(wide_first(), method, optimizer, **options)
    assert even.boundaries == (0, 2)
    assert uneven.boundaries == (0, 1)


def test_given_boundaries_set_the_stages():
    (batch,) = nets.batches(1)
    trainer = jd.Trainer(
        nets.mlp(), nets.method("bp"), jd.optim.sgd(0.1), boundaries=[3], example=batch
    )
    assert trainer.boundaries == (0, 3)
    assert [len(stage.units) for stage in trainer.stages] == [3, 1]


@functools.cache
def resnet20() -> jd.Model:
    return jd.models.get("resnet20")(
        nets.CLASSES, width=1 / 16, image_size=8, channels=1, rngs=nnx.Rngs(0)
    )


def cut(boundaries, model=None, **options) -> jd.Trainer:
    (batch,) = nets.images(1)
    return jd.Trainer(
        resnet20() if model is None else model,
        nets.method("fdg"),
        jd.optim.sgd(0.1),
        boundaries=boundaries,
        example={**batch, "x": batch["x"] / np.float32(255)},
        **options,
    )


@pytest.mark.parametrize(
    ("options", "starts", "blocks"),
    [
        ({"num_stages": 2}, (0, 5), [5, 5]),
        ({"num_stages": 3}, (0, 4, 7), [4, 3, 3]),
        ({"mesh": jd.make_mesh(3, devices=jax.devices()[:1])}, (0, 4, 7), [4, 3, 3]),
    ],
)
def test_a_published_split_by_its_name(options, starts, blocks):
    trainer = cut("fdg", **options)
    assert trainer.boundaries == starts
    assert [len(stage.units) for stage in trainer.stages] == blocks


@pytest.mark.parametrize(
    ("name", "num_stages", "words"),
    [
        ("bogus", 2, ("no split 'bogus'", "allowed are infopro, dgl, fr, fdg")),
        ("", 2, ("no split ''", "allowed are infopro, dgl, fr, fdg")),
        ("fdg", 4, ("split 'fdg'", "4 stages", "allowed are 2, 3")),
        ("fdg", None, ("split 'fdg'", "1 stages", "allowed are 2, 3")),
    ],
)
def test_a_split_that_the_model_lacks_gets_one_clear_line(name, num_stages, words):
    nets.assert_clear(ValueError, words, lambda: cut(name, num_stages=num_stages))


def test_a_model_without_splits_says_so():
    model = jd.models.mlp(nets.CLASSES, input_size=64, depth=2, rngs=nnx.Rngs(0))
    nets.assert_clear(
        ValueError, ("no split 'fdg'", "it has none"), lambda: cut("fdg", model, num_stages=2)
    )


@pytest.mark.parametrize(
    ("stages", "data", "devices", "wanted"),
    [
        (1, 1, 8, [[0]]),
        (2, 1, 8, [[0], [1]]),
        (2, 2, 8, [[0, 1], [2, 3]]),
        (1, 4, 8, [[0, 1, 2, 3]]),
        (4, 1, 2, [[0], [0], [1], [1]]),
        (3, 1, 2, [[0], [0], [1]]),
        (4, 2, 4, [[0, 1], [0, 1], [2, 3], [2, 3]]),
        (3, 2, 3, [[0, 1], [0, 1], [0, 1]]),
    ],
)
def test_make_mesh(stages, data, devices, wanted):
    mesh = jd.make_mesh(stages, data, devices=jax.devices()[:devices])
    assert mesh.shape == {"stage": stages, "data": data}
    assert [len(row) for row in mesh.device_groups] == [data] * stages
    assert [[device.id for device in row] for row in mesh.device_groups] == wanted


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"stages": 0}, ("stage", "0", "at least 1")),
        ({"data": -1}, ("data", "-1", "at least 1")),
        ({"data": 99}, ("data", "99", f"{jax.device_count()} device")),
        ({"stages": 2.5}, ("stage", "2.5")),
        ({"data": "2"}, ("data", "'2'")),
    ],
)
def test_bad_meshes_get_one_clear_line(arguments, words):
    with pytest.raises((ValueError, TypeError)) as error:
        jd.make_mesh(**arguments)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 7])
def test_spread_is_in_order_and_even(rows, stages):
    given = [(row,) for row in range(rows)]
    found = [row for (row,) in assign_devices(given, stages)]
    assert found == sorted(found)
    counts = [found.count(row) for row in range(rows)]
    if stages >= rows:
        assert max(counts) - min(counts) <= 1
    else:
        assert max(counts) == 1


@pytest.mark.parametrize("axes", [("stage", "data"), ("data", "stage")])
def test_a_mesh_of_jax_is_accepted(axes):
    devices = np.array(jax.devices()[:6]).reshape(2, 3)
    mesh = Mesh(devices if axes[0] == "stage" else devices.T, axes)
    assert as_stage_mesh(mesh).device_groups == tuple(map(tuple, devices))


def test_a_mesh_of_stages_alone_is_accepted():
    assert as_stage_mesh(Mesh(np.array(jax.devices()[:2]), ("stage",))).shape == {
        "stage": 2,
        "data": 1,
    }


@pytest.mark.parametrize(
    ("mesh", "kind", "words"),
    [
        (lambda: Mesh(np.array(jax.devices()[:2]), ("model",)), ValueError, ("model", "stage")),
        (lambda: 4, TypeError, ("int", "make_mesh")),
    ],
)
def test_other_meshes_get_one_clear_line(mesh, kind, words):
    with pytest.raises(kind) as error:
        as_stage_mesh(mesh())
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
