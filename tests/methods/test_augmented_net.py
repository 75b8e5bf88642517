"""AugLocal's auxiliary nets: which units they copy, as which layers, with what weights."""

import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
import token_nets
from flax import nnx

import jdecouple as jd
from jdecouple.methods.objectives.augmented_net import AugmentedNet, spaced
from jdecouple.models import layers
from jdecouple.models.cuts import Chain
from jdecouple.models.renewal import redrawn, renewed
from jdecouple.pipeline.design import make_design

# ResNet-32: unit 0 is the stem, 1 to 5 have 16 channels, 6 to 10 have 32, 11 to 15 have 64. What
# the authors' code (networks/resnet.py, networks/auxiliary_nets.py) gives for --pyramid
# --pyramid_coeff 0.5 and --aux_net_depth D, which makes 16 - D local modules, the last of D + 1.


def resnet32_units(depth: int) -> list[list[int]]:
    """Units that the nets of all blocks copy, by block."""
    objective, count = AugmentedNet(depth), 16 - depth
    return [spaced(i + 1, 15 - i, objective.depth_at(i, count)) for i in range(count - 1)]


def test_units_of_resnet32_in_the_authors_code():
    assert resnet32_units(1) == [[15]] * 14
    assert resnet32_units(2)[:4] == [[8, 15], [8, 15], [8, 15], [9, 15]]
    assert resnet32_units(3) == [
        [5, 10, 15], [6, 10, 15], [6, 11, 15], [7, 11, 15], [8, 11, 15], [8, 12, 15],
        [10, 15], [11, 15], [12, 15], [12, 15], [12, 15], [13, 15],
    ]  # fmt: skip
    depths = [len(units) for units in resnet32_units(5)]
    assert depths == [5, 5, 5, 4, 4, 4, 4, 3, 3, 3]
    assert resnet32_units(5)[0] == [3, 6, 9, 12, 15]


def heads_of(model: jd.Model, example: dict, **arguments: object) -> list[dict[str, tuple]]:
    """Shapes of the parameters of every block's head, by name; nothing is computed."""
    design = make_design(
        model,
        nets.method("auglocal", **arguments),
        jd.optim.sgd(0.1),
        num_stages=1,
        example=example,
    )
    return [
        {name: leaf.shape for name, leaf in unit.params.items() if name.startswith("head/")}
        for unit in design.built.units
    ]


@pytest.fixture(scope="module")
def resnet32_heads() -> list[dict[str, tuple]]:
    model = jax.tree_util.Partial(
        jd.models.resnet32, 10, shortcut="projection", cut=tuple(range(13))
    )
    image = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)
    example = {"x": image, "label": jax.ShapeDtypeStruct((4,), jnp.int32)}
    return heads_of(lambda rngs: model(rngs=rngs), example)


def test_layers_and_numbers_of_parameters_on_resnet32(resnet32_heads):
    """By hand, for nets of 3 and 2 units."""

    def unit(channels: int, features: int, projects: bool) -> int:
        convolutions = 9 * features * (channels + features)
        return convolutions + 4 * features + projects * (channels * features + 2 * features)

    def size(head: dict[str, tuple]) -> int:
        return sum(int(np.prod(shape)) for shape in head.values())

    first = unit(16, 16, False), unit(16, 32, True), unit(32, 64, True), 650
    assert (first, size(resnet32_heads[0])) == ((4672, 14528, 57728, 650), 77578)
    # From 32 channels of 16 x 16 pixels: units 10 and 15.
    assert size(resnet32_heads[6]) == unit(32, 32, False) + unit(32, 64, True) + 650
    assert size(resnet32_heads[11]) == 2 * unit(64, 64, False) + 650
    kernels = [
        shape for name, shape in resnet32_heads[2].items() if "branch/layers/0/kernel" in name
    ]
    assert kernels == [(3, 3, 16, 32), (3, 3, 32, 64), (3, 3, 64, 64)]  # units 6, 11, 15
    assert size(resnet32_heads[12]) == 650  # the model's classifier


def test_maps_halve_one_unit_at_a_time():
    """From 16 channels of 8 x 8 pixels to 64 of what was 2 x 2."""
    received, output = (
        jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 8, 8, 16), (2, 2, 2, 64))
    )
    unit = jd.models.resnet(5, depth=8, image_size=8, channels=1, rngs=nnx.Rngs(0)).blocks[3]
    options = {"init": "flax", "param_dtype": jnp.float32, "rngs": nnx.Rngs(1)}
    copies = [renewed(unit, received, output, **options)]
    copies.append(
        renewed(unit, jax.eval_shape(copies[0].eval() or copies[0], received), output, **options)
    )
    x = jnp.ones(received.shape)
    assert [copies[0](x).shape, copies[1](copies[0](x)).shape] == [(2, 4, 4, 64), (2, 2, 2, 64)]


def test_one_unit_has_batch_norm_before_its_dense_layer():
    model = jd.models.vgg(3, blocks="4|6,M|8", image_size=8, channels=1, rngs=nnx.Rngs(0))
    x = np.zeros((4, 8, 8, 1), np.float32)
    example = {"x": x, "label": np.zeros(4, np.int32)}
    for depth, scales in ((1, 2), (2, 2)):
        heads = heads_of(model, example, depth=depth, decay=0.0)
        assert sum(name.endswith("scale") for name in heads[0]) == scales, depth
        assert (
            heads[0]["head/front/layers/0/layers/0/kernel"]
            == ((3, 3, 4, 8), (3, 3, 4, 6))[depth - 1]
        )


def test_copies_have_weights_of_their_own():
    block = token_nets.model(depth=2).blocks[1]
    copy = redrawn(block, nnx.Rngs(1))
    assert type(copy) is type(block)
    params = (nnx.to_flat_state(nnx.state(each, nnx.Param)) for each in (block, copy))
    for (path, old), (_, new) in zip(*params, strict=True):
        old, new = np.asarray(old.get_value()), np.asarray(new.get_value())
        if old.ndim == 1:
            assert np.array_equal(old, new), path
            continue
        assert not np.array_equal(old, new), path
        assert np.array_equal(np.sort(old, 0), np.sort(new, 0)), path


@pytest.mark.parametrize("kind", nets.marked(("gpt", "lstm_lm"), ("gpt",)))
def test_nets_of_tokens_are_whole_layers(kind):
    """A net of the first of four modules reads sequences; copies differ from what they copy."""
    model = token_nets.model(kind, depth=4)
    example = token_nets.batches(1)[0]
    trainer = jd.Trainer(
        model, jd.methods.get("auglocal", depth=2, decay=0.0), jd.optim.sgd(0.1), example=example
    )
    heads = trainer.heads(trainer.init())
    chosen = [spaced(i + 1, 4 - i, 2) for i in range(4)]
    assert chosen == [[2, 4], [2, 4], [3, 4], [4]]
    for head, indices in zip(heads, chosen, strict=False):
        assert isinstance(head.front, Chain)
        assert [type(layer) for layer in head.front.layers] == [
            type(model.blocks[index]) for index in indices
        ]
        readout = head.head.head.classifier.layers
        assert [type(layer) for layer in readout[-2:]] == [layers.LayerNorm, layers.Linear]
    assert heads[4].head.classifier is not None


def test_refused():
    for arguments, words in (
        ({"depth": 0}, "depth is 0"),
        ({"decay": -0.1}, "decay is -0.1"),
        ({"decay": 2.0}, "decay is 2.0: a number from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=words):
            AugmentedNet(**arguments)
    rngs = nnx.Rngs(0)
    narrows = jd.Model(
        [
            nnx.Linear(nets.FEATURES, 8, rngs=rngs),
            nnx.Linear(8, 6, rngs=rngs),
            nnx.Linear(6, 6, rngs=rngs),
        ],
        nnx.Linear(6, nets.CLASSES, rngs=rngs),
    )
    words = "a copy of a block", "Linear", "float32[16, 8]", "anew"
    example = nets.batches(1)[0]
    nets.assert_clear(ValueError, words, lambda: heads_of(narrows, example, depth=1))
