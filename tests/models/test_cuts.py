"""Local modules: which units stand together under each cut, and that a cut changes nothing else."""

import functools
import inspect

import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
import sequence_nets
from flax import nnx

import jdecouple as jd
from jdecouple import models
from jdecouple.pipeline.build import build_units
from jdecouple.pipeline.design import same_keys

SLOW = pytest.mark.slow


@functools.cache
def units(name, **arguments):
    """A net of values without memory, and the shapes of what its units output."""
    splits = {}

    def build(x):
        model = models.get(name)(10, **arguments, rngs=same_keys(0))
        splits.update(model.splits)
        found = []
        for block in model.blocks:
            x = block(x)
            found.append(x)
        return list(model.blocks), model.classifier, found

    blocks, classifier, found = nnx.eval_shape(build, jnp.ones((2, 32, 32, 3)))
    return models.Model(blocks, classifier, splits), [each.shape for each in found]


# --- The published cuts ---------------------------------------------------------------------

# Net, cut, first unit of every module, side in pixels and channels of what it outputs.
RESNET18 = [
    ("units", range(9), 3 * [(32, 64)] + 2 * [(16, 128)] + 2 * [(8, 256)] + 2 * [(4, 512)]),
    ("paper", (0, 3, 5, 7), [(32, 64), (16, 128), (8, 256), (4, 512)]),
    (4, (0, 3, 5, 7), [(32, 64), (16, 128), (8, 256), (4, 512)]),
    ("fdg:2", (0, 5), [(16, 128), (4, 512)]),
    (3, (0, 3, 6), [(32, 64), (8, 256), (4, 512)]),
    ((0, 1, 8), (0, 1, 8), [(32, 64), (4, 512), (4, 512)]),
]
RESNET32 = [
    (1, (0,), [(8, 64)]),
    (2, (0, 8), [(16, 32), (8, 64)]),
    (3, (0, 6, 11), [(32, 16), (16, 32), (8, 64)]),
    (4, (0, 4, 8, 12), [(32, 16), (16, 32), (8, 64), (8, 64)]),
    (8, (0, 2, 4, 6, 8, 10, 12, 14), 3 * [(32, 16)] + 2 * [(16, 32)] + 3 * [(8, 64)]),
    (16, range(16), 6 * [(32, 16)] + 5 * [(16, 32)] + 5 * [(8, 64)]),
    ("infopro:3", (0, 6, 11), [(32, 16), (16, 32), (8, 64)]),
    ("dgl:2", (0, 8), [(16, 32), (8, 64)]),
    ("dgl:3", (0, 5, 12), [(32, 16), (8, 64), (8, 64)]),
    ("dgl:4", (0, 3, 8, 13), [(32, 16), (16, 32), (8, 64), (8, 64)]),
]
RESNET110 = [
    ("units", range(55), 19 * [(32, 16)] + 18 * [(16, 32)] + 18 * [(8, 64)]),
    ("infopro:2", (0, 28), [(16, 32), (8, 64)]),
    ("infopro:3", (0, 19, 37), [(32, 16), (16, 32), (8, 64)]),
    ("infopro:4", (0, 13, 27, 41), [(32, 16), (16, 32), (8, 64), (8, 64)]),
    (8, (0, 6, 13, 20, 27, 34, 41, 48), 2 * [(32, 16)] + 3 * [(16, 32)] + 3 * [(8, 64)]),
    (
        16,
        (0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 31, 35, 39, 43, 47, 51),
        6 * [(32, 16)] + 5 * [(16, 32)] + 5 * [(8, 64)],
    ),
    ("infopro_balanced:2", (0, 16), [(32, 16), (8, 64)]),
    ("infopro_balanced:3", (0, 11, 22), [(32, 16), (16, 32), (8, 64)]),
    ("infopro_balanced:4", (0, 8, 16, 28), [(32, 16), (32, 16), (16, 32), (8, 64)]),
    ("dgl:2", (0, 27), [(16, 32), (8, 64)]),
    ("dgl:3", (0, 18, 38), [(32, 16), (8, 64), (8, 64)]),
    ("dgl:4", (0, 13, 28, 43), [(32, 16), (16, 32), (8, 64), (8, 64)]),
    (5, (0, 11, 22, 33, 44), [(32, 16), (16, 32), (16, 32), (8, 64), (8, 64)]),  # FDG's
]
WRN28_10 = [
    ("units", range(13), [(32, 16)] + 4 * [(32, 160)] + 4 * [(16, 320)] + 4 * [(8, 640)]),
    (2, (0, 7), [(16, 320), (8, 640)]),
    (3, (0, 5, 9), [(32, 160), (16, 320), (8, 640)]),
    (4, (0, 4, 7, 10), [(32, 160), (16, 320), (8, 640), (8, 640)]),
    ("fdg:4", (0, 4, 7, 10), [(32, 160), (16, 320), (8, 640), (8, 640)]),
    (
        "infopro:8",
        (0, 1, 2, 3, 5, 7, 9, 11),
        [(32, 16)] + 3 * [(32, 160)] + 2 * [(16, 320)] + 2 * [(8, 640)],
    ),
]
LISTING = [
    pytest.param(
        name, arguments, *row, id=f"{name}{arguments.get('depth', '')}-{row[0]}", marks=marks
    )
    for name, arguments, rows, marks in (
        ("resnet18", {}, RESNET18, ()),
        ("resnet", {"depth": 32}, RESNET32, ()),
        ("resnet", {"depth": 110}, RESNET110, SLOW),
        ("wrn28_10", {}, WRN28_10, ()),
    )
    for row in rows
]


def members(block):
    """The units of a module."""
    return list(block.layers) if isinstance(block, models.cuts.Chain) else [block]


@pytest.mark.parametrize(("name", "arguments", "cut", "firsts", "outputs"), LISTING)
def test_local_modules(name, arguments, cut, firsts, outputs):
    net, shapes = units(name, **arguments)
    modules = net.cut(cut)
    ends = [*firsts[1:], len(net.blocks)]
    assert len(modules.blocks) == len(firsts)
    for block, first, end in zip(modules.blocks, firsts, ends, strict=True):
        found = members(block)
        assert len(found) == end - first
        assert all(a is b for a, b in zip(found, net.blocks[first:end], strict=True))
    assert [shapes[end - 1] for end in ends] == [(2, n, n, width) for n, width in outputs]
    assert modules.classifier is net.classifier


@pytest.mark.parametrize(
    ("name", "starts"),
    [
        ("resnet34", (0, 4, 8, 14)),
        pytest.param("resnet50", (0, 4, 8, 14), marks=SLOW),
        pytest.param("resnet101", (0, 4, 8, 31), marks=SLOW),
    ],
)
def test_groups_of_the_larger_nets(name, starts):
    net, _ = units(name)
    assert [len(members(block)) for block in net.cut("paper").blocks] == list(
        np.diff([*starts, len(net.blocks)])
    )


def test_splits_that_divide_no_module_stay():
    net, _ = units("resnet18")
    assert net.cut("paper").splits == {"paper": {4: (1, 2, 3)}, "fdg": {2: (2,)}}
    net, _ = units("resnet", depth=32)
    cut = net.cut(8)
    assert cut.splits == {
        "infopro": {2: (4,), 4: (2, 4, 6), 8: (1, 2, 3, 4, 5, 6, 7)},
        "dgl": {2: (4,)},
        "fr": {2: (4,)},
    }
    again = cut.cut(4)  # of what is cut: its blocks are the units
    assert [len(members(block)) for block in again.blocks] == [2, 2, 2, 2]
    assert again.splits["infopro"] == {2: (2,), 4: (1, 2, 3)}


# --- It changes no number -------------------------------------------------------------------


def test_the_cut_changes_no_number():
    x = jnp.asarray(nets.batches(1)[0]["x"])
    found = []
    for cut, count in (("units", 5), ((0, 2, 3), 3)):
        net = nets.mlp(depth=5, cut=cut)
        assert len(net.blocks) == count
        found.append(
            functools.reduce(lambda x, module: module(x), (*net.blocks, net.classifier), x)
        )
    np.testing.assert_array_equal(*found)


def test_names_of_weights_in_a_module():
    """As of the nnx.Sequential that a module was before, so that its checkpoints are read."""
    model, example = nets.mlp(depth=5, cut=(0, 2, 3)), nets.batches(1)[0]
    trainer = jd.Trainer(model, nets.method("greedy_exit"), jd.optim.sgd(0.1), example=example)
    found = nets.to_arrays(trainer, trainer.init())
    assert {name.split("/")[0] for name in found} == {"block_0", "block_1", "block_2"}
    assert found["block_0/params/block/layers/1/layers/0/kernel"].shape == (24, 24)
    assert found["block_1/params/block/layers/0/kernel"].shape == (24, 24)


@SLOW
def test_stages_change_no_local_result_of_a_cut_model(x64):
    data = nets.batches(2, dtype=np.float64)

    def run(**placement):
        model = nets.mlp(depth=5, batch_norm=True, param_dtype=jnp.float64, cut=(0, 2, 3))
        method, optimizer = nets.method("deinforeg"), jd.optim.sgd(0.1, momentum=0.9)
        trainer = jd.Trainer(model, method, optimizer, example=data[0], **placement)
        return trainer, nets.to_arrays(trainer, nets.trained(trainer, data, 4)[0])

    alone, wanted = run(num_stages=1)
    assert alone.exits == (0, 1, 2)
    placed, found = run(boundaries=(0, 2), mesh=jd.make_mesh(2))
    assert placed.boundaries == (0, 2)
    assert nets.largest_error(found, wanted) < 1e-12


@SLOW
@pytest.mark.parametrize("depth", [32, 110])
def test_dgl_has_as_many_heads_as_modules(depth):
    net, _ = units("resnet", depth=depth)
    carry = {
        "x": jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32),
        "label": jax.ShapeDtypeStruct((2,), jnp.int32),
    }
    built = build_units(net.cut("dgl:4"), nets.method("dgl"), carry, None, 0, None)
    heads = [any(name.startswith("head/") for name in unit.params) for unit in built.units]
    assert heads == [True] * 4
    sizes = [(32, 16), (16, 32), (8, 64), (8, 64)]
    assert [each.shape for each in built.outputs] == [(2, n, n, width) for n, width in sizes]


# --- Units that embed, drop and read more ---------------------------------------------------


@pytest.mark.slow
def test_a_module_that_begins_with_the_embedding_is_a_block_like_others():
    """It does more than embed: its head has a classifier, and it is an exit."""

    def exits(cut):
        model = sequence_nets.model("transformer", depth=4, cut=cut)
        method = nets.method("deinforeg", projector="identity")
        example = sequence_nets.batches("transformer")[0]
        return jd.Trainer(model, method, jd.optim.sgd(0.1), example=example).exits

    assert exits((0, 1, 3)) == (1, 2)  # the embedding alone stays what it is
    assert exits((0, 2)) == (0, 1)


@SLOW
def test_a_unit_that_reads_a_further_part_may_stand_in_a_module():
    entries = {f"x_{i}": jnp.asarray(sequence_nets.texts(seed=i)) for i in (1, 2)}

    def run(cut, train=False):
        options = {"further": (1, 2), "dropout": 0.5}
        blocks = sequence_nets.model("transformer", **options, cut=cut).blocks
        x = jnp.asarray(sequence_nets.texts())
        for block in blocks:
            block.train() if train else block.eval()
            x = block(x, **{name: entries[name] for name in getattr(block, "inputs", ())})
        return [getattr(block, "inputs", ()) for block in blocks], x["summary"]

    names, wanted = run("units")
    assert names == [(), ("x_1",), ("x_2",)]
    names, found = run((0, 2))
    assert names == [("x_1",), ("x_2",)]
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    names, found = run(1)
    assert names == [("x_1", "x_2")]
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert np.abs(run(1, train=True)[1] - wanted).max() > 1e-3  # dropout of the units


@SLOW
def test_equal_modules_run_in_one_program():
    """Blocks 1 and 2 of three: those between the first and the last need to be equal."""
    model = nets.mlp(depth=8, cut=(0, 2, 4, 6))
    options = {"mesh": jd.make_mesh(2), "engine": "spmd", "example": nets.batches(1)[0]}
    method = nets.method("deinforeg")
    assert jd.Trainer(model, method, jd.optim.sgd(0.1), **options).engine == "spmd"


# --- Builders -------------------------------------------------------------------------------


def test_every_builder_can_cut():
    for name in models.names():
        assert inspect.signature(models.get(name)).parameters["cut"].default == "units", name


def test_a_builder_of_ones_own_can_be_cut(monkeypatch):
    monkeypatch.setattr(models, "_BUILDERS", dict(models._BUILDERS))

    def three(num_classes, *, width: int = 4, rngs, **inputs):
        blocks = [nnx.Linear(width, width, rngs=rngs) for _ in range(3)]
        splits = {"mine": {2: (2,)}}
        return models.Model(blocks, nnx.Linear(width, num_classes, rngs=rngs), splits)

    models.register("three", three)
    build = functools.partial(models.get("three"), 5, image_size=8, rngs=nnx.Rngs(0))
    assert [*inspect.signature(models.get("three")).parameters] == [
        *("num_classes", "width", "rngs", "cut", "inputs")
    ]
    assert [len(build(cut=cut).blocks) for cut in ("units", "mine", 2, 3, [0, 1])] == [
        3,
        2,
        2,
        3,
        2,
    ]

    def own(num_classes, *, cut: float = 0.5, rngs):
        return models.Model([nnx.Linear(int(8 * cut), num_classes, rngs=rngs)])

    models.register("own", own)
    assert models.get("own") is own

    models.register("none", lambda num_classes, *, rngs: [nnx.Linear(4, num_classes, rngs=rngs)])
    words = ("builder returns one of type list", "a Model is needed")
    none = models.get("none")
    nets.assert_clear(TypeError, words, lambda: none(5, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("name", "cut", "words"),
    [
        (
            "resnet18",
            "groups",
            ("cut is 'groups'", "are units, paper, fdg, a number of"),
        ),
        ("resnet18", "papper", ("cut is 'papper'", "did you mean 'paper'?")),
        ("resnet18", "paper:3", ("cut is 'paper:3'", "allowed are paper:4")),
        ("resnet18", 8, ("cut is 8", "into 1, 2, 3, 4, 9 modules", "unit indices")),
        ("resnet18", "8", ("cut is 8", "into 1, 2, 3, 4, 9 modules")),
        ("resnet18", True, ("cut is True", "a number of modules", "unit indices")),
        ("resnet18", None, ("cut is None", "a number of modules", "unit indices")),
        ("resnet18", "2.5", ("cut is 2.5", "a number of modules", "unit indices")),
        ("resnet18", (0, 7, 3), ("cut is (0, 7, 3)", "increasing", "first 0", "last 8")),
        ("resnet18", (0, 9), ("cut is (0, 9)", "increasing", "first 0", "last 8")),
        ("resnet18", "(1, 3)", ("cut is (1, 3)", "increasing", "first 0", "last 8")),
        ("resnet18", (0, "3"), ("cut is (0, '3')", "increasing", "first 0", "last 8")),
        ("resnet18", (), ("cut is ()", "increasing", "first 0", "last 8")),
        ("resnet32", "dgl", ("cut is 'dgl'", "allowed are dgl:2, dgl:3, dgl:4")),
        ("resnet32", "dlg:4", ("cut is 'dlg:4'", "did you mean 'dgl'?")),
        ("resnet32", "dgl:8", ("cut is 'dgl:8'", "allowed are dgl:2, dgl:3, dgl:4")),
    ],
)
def test_bad_cuts_get_one_clear_line(name, cut, words):
    net, _ = units("resnet", depth=32) if name == "resnet32" else units(name)
    nets.assert_clear(ValueError, words, lambda: net.cut(cut))


def test_a_builder_refuses_a_bad_cut():
    nets.assert_clear(ValueError, ("cut is 3", "into 1, 4 modules"), lambda: nets.mlp(cut=3))


def test_a_grown_model_is_not_cut():
    old = nets.mlp(depth=2)
    grown = models.Model([*old.blocks, nnx.Linear(24, 24, rngs=nnx.Rngs(1))], None, before=old)
    nets.assert_clear(ValueError, ("grown", "cannot be cut"), lambda: grown.cut((0, 2)))
