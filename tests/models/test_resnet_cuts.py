"""The residual nets of four groups, cut into the papers' four blocks."""

import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
from flax import nnx

import jdecouple as jd
from jdecouple import models
from jdecouple.models.resnet import resnet_of_groups


def shapes(name, **arguments):
    """Shapes of what the blocks and the classifier output; number of parameters; splits."""
    splits = {}

    def run(x):
        net = models.get(name)(10, **arguments, rngs=nnx.Rngs(0))
        splits.update(net.splits)
        found = []
        for module in (*net.blocks, net.classifier):
            x = module(x)
            found.append(x)
        modules = [*net.blocks, net.classifier]
        return found, nnx.state(modules, nnx.Param)

    found, params = nnx.eval_shape(run, jnp.ones((2, 32, 32, 3)))
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return [each.shape for each in found], size, splits


@pytest.mark.parametrize(
    ("name", "features", "splits"),
    [
        ("resnet18", (64, 128, 256, 512), {"fdg": {2: (2,)}}),  # 3 stages would cut a group
        pytest.param("resnet34", (64, 128, 256, 512), {}, marks=pytest.mark.slow),
        pytest.param(
            "resnet50", (256, 512, 1024, 2048), {"fdg": {2: (2,)}}, marks=pytest.mark.slow
        ),
    ],
)
def test_four_blocks_with_the_stem_in_the_first(name, features, splits):
    found, size, cuts = shapes(name, cut="paper")
    pixels = (32, 16, 8, 4)
    assert found == [
        *((2, n, n, width) for n, width in zip(pixels, features, strict=True)),
        (2, 10),
    ]
    assert cuts == splits
    units, same_size, unit_cuts = shapes(name)
    assert size == same_size
    assert len(units) > 5
    for split, by_stages in cuts.items():
        for num_stages, starts in by_stages.items():  # the stages hold the same units
            (unit,), (group,) = unit_cuts[split][num_stages], starts
            assert units[unit - 1] == found[group - 1]
            assert units[unit] == found[group]


def small(cut):
    net = {"bottleneck": False, "shortcut": "projection", "splits": {}}
    net["groups"] = [(64, 2), (128, 1), (256, 1), (512, 1)]
    sizes = {"width": 1 / 16, "image_size": 8, "channels": 1}
    return resnet_of_groups(nets.CLASSES, **net, **sizes, cut=cut, rngs=nnx.Rngs(0))


def test_the_cut_changes_no_number():
    pair = [small(cut) for cut in ("units", "paper")]
    assert [len(net.blocks) for net in pair] == [6, 4]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 1)), jnp.float32)

    @nnx.jit
    def run(modules, x):
        for module in modules:
            x = module(x)
        return x

    found = [run([*net.blocks, net.classifier], x) for net in pair]
    np.testing.assert_allclose(*found, atol=1e-5)


def test_a_local_method_has_four_heads():
    data = nets.images(1, 8)
    data[0]["x"] = data[0]["x"].astype(np.float32) / 255
    trainer = jd.Trainer(
        small("paper"), nets.method("deinforeg"), jd.optim.sgd(0.1), example=data[0]
    )
    state, metrics = nets.trained(trainer, data, 1)
    assert {name.split("/")[0] for name in metrics[0] if "/" in name} == {
        f"block_{i}" for i in range(4)
    }
    assert {f"exit_{i}/accuracy" for i in range(4)} < set(trainer.evaluate(state, data))


def test_an_unknown_cut_gets_one_clear_line():
    words = ("cut is 'groups'", "units, paper")
    nets.assert_clear(
        ValueError, words, lambda: models.resnet18(10, cut="groups", rngs=nnx.Rngs(0))
    )
