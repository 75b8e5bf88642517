import chex
import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
from flax import nnx

import jdecouple as jd
from jdecouple import models
from jdecouple.models import layers


def widths(block):
    return ["M" if isinstance(m, layers.MaxPool) else m.out_features for m in counted(block)]


def counted(block):
    return [m for m in block.layers if isinstance(m, nnx.Conv | layers.MaxPool)]


def apply(model, x):
    return run(list(model.blocks), model.classifier, x)


@nnx.jit
def run(blocks, classifier, x):
    for block in blocks:
        x = block(x)
    return x, classifier(x)


def parameters(module):
    return jax.tree.leaves(nnx.state(module, nnx.Param))


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("deinforeg", [[128, 128, 128, 256, "M"], [256, 512, "M"], [512, 512, "M"], [512, "M"]]),
        ("scpl", [[128, 256, "M"], [256, 512, "M"], [512, "M"], [512, "M"]]),
    ],
)
def test_vgg8_has_the_papers_layouts(layout, expected):
    blocks = nnx.eval_shape(lambda: models.vgg8(10, layout=layout, rngs=nnx.Rngs(0)).blocks)
    assert [widths(block) for block in blocks] == expected
    for block in blocks:
        kinds = [type(layer) for layer in block.layers if isinstance(layer, nnx.Module)]
        convolutions = kinds.count(layers.Conv)
        assert kinds.count(layers.BatchNorm) == convolutions
        assert kinds == [layers.Conv, layers.BatchNorm] * convolutions + [layers.MaxPool]
        assert all(m.bias is None for m in block.layers if isinstance(m, nnx.Conv))


@pytest.mark.parametrize(
    ("image_size", "channels", "flat"), [(16, 3, 1), (32, 1, 4), (40, 3, 4), (64, 3, 16)]
)
def test_vgg8_shapes(image_size, channels, flat):
    def run(x):
        sizes = {"width": 1 / 64, "image_size": image_size, "channels": channels}
        return apply(models.vgg8(7, **sizes, rngs=nnx.Rngs(0)), x)

    features, logits = nnx.eval_shape(run, jnp.ones((2, image_size, image_size, channels)))
    assert features.shape[0] == 2
    assert np.prod(features.shape[1:]) == 8 * flat
    assert logits.shape == (2, 7)


@pytest.mark.parametrize(
    ("width", "expected"), [(1.5, [15, 6]), (0.25, [2, 1]), (0.01, [1, 1]), (1, [10, 4])]
)
def test_width_multiplies_and_rounds(width, expected):
    model = models.vgg(2, blocks="10,4,M", width=width, image_size=4, rngs=nnx.Rngs(0))
    assert widths(model.blocks[0]) == [*expected, "M"]


@pytest.mark.slow
def test_vgg_reads_text_and_sequences_alike():
    sizes = {"image_size": 8, "channels": 1}
    text = models.vgg(10, blocks="6, 8,M|10,M", **sizes, rngs=nnx.Rngs(3))
    nested = models.vgg(10, blocks=((6, 8, "M"), (10, "M")), **sizes, rngs=nnx.Rngs(3))
    assert [widths(block) for block in text.blocks] == [[6, 8, "M"], [10, "M"]]
    for a, b in zip(text.blocks, nested.blocks, strict=True):
        assert nnx.graphdef(a) == nnx.graphdef(b)
        chex.assert_trees_all_equal(parameters(a), parameters(b))
    x = jnp.ones((2, 8, 8, 1))
    assert text.blocks[1](text.blocks[0](x)).shape == (2, 2, 2, 10)


@pytest.mark.parametrize(
    ("name", "hidden", "activation"),
    [
        ("deinforeg", 128, lambda x: np.maximum(x, 0)),
        ("scpl", 156, lambda x: 1 / (1 + np.exp(-x))),
    ],
)
def test_the_papers_classifiers_of_vgg_equal_numpy(name, hidden, activation, x64):
    options = {"classifier": name, "init": "torch", "param_dtype": jnp.float64}
    sizes = {"blocks": "16,M", "width": 1 / 16, "image_size": 4}
    classifier = models.vgg(3, **sizes, **options, rngs=nnx.Rngs(0)).classifier
    first, last = (each for each in classifier.layers if isinstance(each, nnx.Linear))
    assert first.kernel.shape == (4, hidden)  # 2048 or 2500 at full width
    x = np.random.default_rng(0).normal(size=(5, 2, 2, 1))
    y = x.reshape(5, 4) @ np.asarray(first.kernel[...]) + np.asarray(first.bias[...])
    y = activation(y) @ np.asarray(last.kernel[...]) + np.asarray(last.bias[...])
    np.testing.assert_allclose(classifier(jnp.asarray(x)), y, atol=1e-12)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_mlp_shapes(batch_norm):
    model = models.mlp(
        4, image_size=5, channels=2, hidden=6, depth=3, batch_norm=batch_norm, rngs=nnx.Rngs(0)
    )
    assert len(model.blocks) == 3
    features, logits = apply(model, jnp.ones((2, 5, 5, 2)))
    chex.assert_shape((features, logits), [(2, 6), (2, 4)])
    assert (features >= 0).all()
    vector = models.mlp(4, input_size=11, activation="tanh", rngs=nnx.Rngs(0))
    assert vector.blocks[0](jnp.ones((2, 11))).shape == (2, 256)


SMALL = {
    "mlp": {"hidden": 16, "batch_norm": True},
    "resnet": {"depth": 8, "width": 1 / 8},
    "revnet": {"depth": 8, "width": 1 / 8},
    "vgg": {"blocks": "8,M|12,8,M|8"},
    "vgg8": {"width": 1 / 16},
    "wide_resnet": {"depth": 10, "widen": 1},
}
FEW = nets.marked(SMALL, ("mlp", "vgg"))  # test_resnets.py has the others


def build(name, init="flax", param_dtype=jnp.float32, seed=0):
    return models.get(name)(
        10,
        image_size=16,
        channels=3,
        init=init,
        param_dtype=param_dtype,
        rngs=nnx.Rngs(seed),
        **SMALL[name],
    )


@pytest.mark.parametrize("name", FEW)
def test_torch_init_is_uniform_in_the_root_of_fan_in(name):
    model = build(name, init="torch")
    seen = 0
    for module in (*model.blocks, model.classifier):
        for _, layer in nnx.iter_graph(module):
            if isinstance(layer, nnx.Linear | nnx.Conv):
                kernel = np.asarray(layer.kernel[...])
                bound = 1 / np.sqrt(np.prod(kernel.shape[:-1]))
                values = [kernel] if layer.bias is None else [kernel, np.asarray(layer.bias[...])]
                assert all(np.abs(value).max() <= bound for value in values)
                if kernel.size > 500:
                    assert kernel.std() == pytest.approx(bound / np.sqrt(3), rel=0.1)
                if layer.bias is not None and layer.bias.size > 4:
                    assert np.abs(values[1]).max() > bound / 2
                seen += 1
    assert seen >= 5


@pytest.mark.parametrize("name", FEW)
def test_flax_init_has_zero_biases_and_depends_on_the_seed_alone(name):
    one, same, other = build(name), build(name), build(name, seed=1)
    for _, layer in nnx.iter_graph(one.blocks[0]):
        if isinstance(layer, nnx.Linear):
            assert not layer.bias[...].any()
    first = parameters(one.blocks[0])
    chex.assert_trees_all_equal(first, parameters(same.blocks[0]))
    different = map(np.array_equal, first, parameters(other.blocks[0]))
    assert not all(different)


@pytest.mark.parametrize("name", FEW)
def test_bfloat16_stays_bfloat16_and_statistics_float32(name):
    model = build(name)
    for block in (*model.blocks, model.classifier):
        half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), nnx.state(block, nnx.Param))
        nnx.update(block, half)
    features, logits = apply(model, jnp.ones((4, 16, 16, 3), jnp.bfloat16))
    assert features.dtype == logits.dtype == jnp.bfloat16
    statistics = jax.tree.leaves([nnx.state(block, nnx.BatchStat) for block in model.blocks])
    assert {s.dtype for s in statistics} == {jnp.dtype(jnp.float32)}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_float16_trains(name):
    rng = np.random.default_rng(0)
    x, label = rng.normal(size=(8, 16, 16, 3)).astype(np.float32), np.arange(8, dtype=np.int32)
    options = {"example": {"x": x, "label": label}, "dtype": jnp.float16}
    trainer = jd.Trainer(build(name), jd.methods.get("bp"), jd.optim.sgd(0.05), **options)
    state, metrics = nets.trained(trainer, [options["example"]], 16)
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert sum(each["skipped"] for each in metrics) < 12
    assert all(np.isfinite(value).all() for value in nets.to_arrays(trainer, state).values())


@pytest.mark.parametrize("name", FEW)
def test_float64(name, x64):
    model = build(name, param_dtype=jnp.float64)
    _, logits = apply(model, jnp.ones((4, 16, 16, 3), jnp.float64))
    assert logits.dtype == jnp.float64
    leaves = jax.tree.leaves([nnx.state(block) for block in model.blocks])
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float64)}


def test_batch_norm_trains_on_the_batch_and_evaluates_on_running_statistics(x64):
    x = np.random.default_rng(0).normal(2, 3, (5, 4, 4, 3))
    norm = layers.BatchNorm(3, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    np.testing.assert_allclose(norm(jnp.asarray(x)), (x - mean) / np.sqrt(var + 1e-5), rtol=1e-9)
    np.testing.assert_allclose(norm.mean[...], 0.1 * mean)
    np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * var)
    norm.eval()
    expected = (x - 0.1 * mean) / np.sqrt(0.9 + 0.1 * var + 1e-5)
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-9)
    np.testing.assert_allclose(norm.mean[...], 0.1 * mean)


@pytest.mark.parametrize(
    "shape", nets.marked([(2, 6, 4, 3), (2, 7, 5, 3), (1, 2, 2, 1)], [(2, 7, 5, 3)])
)
def test_max_pool_equals_reduce_window(shape):
    x = jax.random.normal(jax.random.key(0), shape)

    def reference(x):
        return nnx.max_pool(x, (2, 2), strides=(2, 2))

    pool = layers.MaxPool()
    for values in (x, jnp.round(x)):  # with ties
        np.testing.assert_array_equal(pool(values), reference(values))
        gradients = [
            jax.grad(lambda x, f=f: jnp.sum(f(x) ** 2 + f(x)))(values) for f in (pool, reference)
        ]
        np.testing.assert_array_equal(*gradients)


class Plain(nnx.Module):
    def __init__(self, rngs):
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (3,)))

    def __call__(self, x):
        return x * self.weight[...]


def test_model_takes_any_modules():
    blocks = [Plain(nnx.Rngs(i)) for i in range(2)]
    model = models.Model(blocks)
    assert model.blocks == tuple(blocks)
    assert model.classifier is None
    assert models.Model(nnx.List(blocks)).blocks == tuple(blocks)


def shared(statistic: bool = True):
    """Two blocks that share a parameter, and a statistic too."""
    block = Plain(nnx.Rngs(0))
    other = Plain(nnx.Rngs(1))
    other.weight = block.weight
    if statistic:
        block.mean = other.mean = nnx.BatchStat(jnp.zeros(()))
    return block, other


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda: ([],), ValueError, "at least one block"),
        (
            lambda: (Plain(nnx.Rngs(0)),),
            TypeError,
            "blocks is of type Plain: a sequence of modules is",
        ),
        (
            lambda: ([lambda x: x],),
            TypeError,
            r"blocks\[0\] is of type function: a flax.nnx.Module",
        ),
        (lambda: ([Plain],), TypeError, r"blocks\[0\] is Plain: a flax.nnx.Module"),
        (lambda: ([Plain(nnx.Rngs(0))], 3), TypeError, "classifier is of type int: a flax"),
        (lambda: (shared(),), ValueError, r"blocks\[0\] and blocks\[1\] share"),
        (lambda: ([shared()[0]] * 2,), ValueError, r"blocks\[0\] and blocks\[1\] share"),
        (lambda: (shared()[:1], None), None, None),
        (lambda: (shared(False),), None, None),
    ],
)
def test_model_validation(arguments, error, message):
    if error is None:
        models.Model(*arguments())
        return
    with pytest.raises(error, match=message) as caught:
        models.Model(*arguments())
    assert "\n" not in str(caught.value)


def test_model_names_the_classifier_that_shares():
    block, classifier = shared()
    words = r"blocks\[0\] and classifier share a BatchStat: of variables only parameters"
    with pytest.raises(ValueError, match=words):
        models.Model([block], classifier)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("vgg8", {"layout": "vgg16"}, "layout is 'vgg16': allowed are deinforeg, scpl"),
        ("vgg8", {"classifier": "mlp"}, "classifier is 'mlp': allowed are linear, deinforeg, scpl"),
        ("vgg8", {"image_size": 15}, "4 poolings need at least 16"),
        ("vgg8", {"image_size": 0}, "image_size is 0: a whole number of at least 1"),
        ("vgg8", {"channels": -1}, "channels is -1: a whole number of at least 1"),
        ("vgg8", {"num_classes": 0}, "num_classes is 0: a whole number of at least 1"),
        ("vgg8", {"num_classes": True}, "num_classes is True: a whole number of at least 1"),
        ("vgg8", {"width": 0.0}, "width is 0.0: a finite number above 0"),
        ("vgg8", {"width": "wide"}, "width is 'wide': a finite number above 0"),
        ("vgg8", {"init": "xavier"}, "init is 'xavier': allowed are flax, torch"),
        ("vgg", {"blocks": "8,M|M,M"}, None),
        ("vgg", {"blocks": "8,M||8"}, "blocks holds '': positive channel counts and 'M'"),
        ("vgg", {"blocks": "8,P"}, "blocks holds 'P': positive channel counts and 'M'"),
        ("vgg", {"blocks": "0"}, "blocks holds '0': positive channel counts and 'M'"),
        ("vgg", {"blocks": "M"}, "at least one convolution"),
        ("vgg", {"blocks": ((8,), ())}, "no block may be empty"),
        ("vgg", {"blocks": ()}, "no block may be empty"),
        ("mlp", {"hidden": 0}, "hidden is 0: a whole number of at least 1"),
        ("mlp", {"depth": 1.5}, "depth is 1.5: a whole number of at least 1"),
        ("mlp", {"input_size": 0}, "input_size is 0: a whole number of at least 1"),
        ("mlp", {"activation": "swish"}, "activation is 'swish': allowed are gelu"),
    ],
)
def test_bad_arguments_get_one_clear_line(name, arguments, message):
    arguments = {"num_classes": 10, "image_size": 16} | arguments
    if message is None:
        models.get(name)(**arguments, rngs=nnx.Rngs(0))
        return
    with pytest.raises(ValueError, match=message) as caught:
        models.get(name)(**arguments, rngs=nnx.Rngs(0))
    assert "\n" not in str(caught.value)


def test_table_of_builders():
    resnets = [f"resnet{depth}" for depth in ("", 101, 110, 18, 20, 32, 34, 50, 56)]
    others = ("revnet", "revnet18", "transformer", "vgg", "vgg8", "vit", "wide_resnet", "wrn28_10")
    assert {"gpt", "lstm", "lstm_lm", "mlp", *resnets, *others} <= set(models.names())
    assert list(models.names()) == sorted(models.names())
    assert all(models.get(name) is getattr(models, name) for name in models.names())
    with pytest.raises(
        ValueError, match="unknown model 'vgg9': allowed are gpt, lstm, lstm_lm, mlp, resnet, "
    ):
        models.get("vgg9")
