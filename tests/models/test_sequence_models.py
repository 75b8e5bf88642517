"""LSTM, Transformer and ViT against NumPy, which goes through every text on its own."""

import chex
import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
import sequence_nets
from flax import nnx
from sequence_nets import CLASSES, everything, gradients, model, texts

import jdecouple as jd
from jdecouple import models
from jdecouple.models import layers
from jdecouple.models.lstm import BidirectionalLSTM
from jdecouple.models.transformer import LAYOUTS, EncoderBlock
from jdecouple.models.vit import PatchEmbedding

KINDS = tuple(sequence_nets.SIZES)
EXACT = {"rtol": 0, "atol": 1e-12}


def perturbed(module):
    """The module with every parameter moved off its initial value, so that none is 0 or 1."""
    rng = np.random.default_rng(1)
    state = nnx.state(module, nnx.Param)
    nnx.update(module, jax.tree.map(lambda p: p + rng.normal(0, 0.3, p.shape), state))
    return module


def array(variable):
    return np.asarray(variable[...])


def sequences(width, lengths=(5, 2, 1), size=5):
    """A batch of random sequences of these lengths, with garbage behind them."""
    h = np.random.default_rng(0).normal(size=(len(lengths), size, width))
    mask = (np.arange(size) < np.array(lengths)[:, None]).astype(float)
    return {"h": jnp.asarray(h), "mask": jnp.asarray(mask), "summary": jnp.zeros((len(h), width))}


def compare(block, x, reference):
    """The block's output is that of the reference on the real positions of every sequence."""
    found = nnx.jit(lambda block, x: block(x))(block, x)
    for row, length in enumerate(np.asarray(x["mask"]).sum(1).astype(int)):
        states, summary = reference(np.asarray(x["h"])[row, :length])
        np.testing.assert_allclose(found["h"][row, :length], states, **EXACT)
        np.testing.assert_allclose(found["summary"][row], summary, **EXACT)


# --- LSTM -----------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm_states(x, kernel, recurrent, bias):
    h = c = np.zeros(recurrent.shape[0])
    states = []
    for each in x:
        i, f, g, o = np.split(each @ kernel + h @ recurrent + bias, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        states.append(h)
    return np.array(states)


@pytest.mark.parametrize("merge", ["mean", "concat"])
def test_lstm_equals_numpy(merge, x64):
    options = {"merge": merge, "param_dtype": jnp.float64}
    block = perturbed(BidirectionalLSTM(4, 3, **options, rngs=nnx.Rngs(0)))
    weights = [array(each) for each in (block.kernel, block.recurrent, block.bias)]

    def reference(x):
        up = lstm_states(x, *(each[0] for each in weights))
        down = lstm_states(x[::-1], *(each[1] for each in weights))[::-1]
        states = (up + down) / 2 if merge == "mean" else np.concatenate([up, down], -1)
        return states, (up[-1] + down[0]) / 2

    compare(block, sequences(4), reference)


def test_lstm_equals_pytorch(x64):
    torch = pytest.importorskip("torch")
    block = perturbed(
        BidirectionalLSTM(4, 3, merge="concat", param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    )
    other = torch.nn.LSTM(4, 3, batch_first=True, bidirectional=True).double()
    with torch.no_grad():
        for way, suffix in enumerate(("", "_reverse")):
            for name, values in (
                ("weight_ih_l0", array(block.kernel)[way].T),
                ("weight_hh_l0", array(block.recurrent)[way].T),
                ("bias_ih_l0", array(block.bias)[way]),
                ("bias_hh_l0", np.zeros(12)),
            ):
                getattr(other, name + suffix).copy_(torch.tensor(values))

        def reference(x):
            states, (last, _) = other(torch.tensor(x)[None])
            return states[0].numpy(), last.mean(0)[0].numpy()

        compare(block, sequences(4), reference)


def test_lstm_init():
    torch_like = BidirectionalLSTM(64, 16, init="torch", rngs=nnx.Rngs(0))
    for each in (torch_like.kernel, torch_like.recurrent):
        values = array(each)
        assert np.abs(values).max() <= 0.25  # 1/sqrt(hidden), whatever the fan-in
        assert values.std() == pytest.approx(0.25 / np.sqrt(3), rel=0.05)
    bias = array(torch_like.bias)
    assert 0.25 < np.abs(bias).max() <= 0.5  # the sum of PyTorch's two
    assert abs(bias[:, 16:32].mean()) < 0.15  # nothing is added to the forget gate
    plain = BidirectionalLSTM(64, 16, rngs=nnx.Rngs(0))
    assert not array(plain.bias).any()
    assert array(plain.kernel).std() == pytest.approx(1 / 8, rel=0.05)
    for way in array(plain.recurrent):
        np.testing.assert_allclose(way @ way.T, np.eye(16), atol=1e-5)
    with pytest.raises(ValueError, match="init is 'xavier': allowed are flax"):
        BidirectionalLSTM(4, 4, init="xavier", rngs=nnx.Rngs(0))


# --- Transformer ----------------------------------------------------------------------------


def norm(x, module):
    if module.unbiased:
        y = (x - x.mean(-1, keepdims=True)) / (x.std(-1, ddof=1, keepdims=True) + 1e-6)
    else:
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return y * array(module.scale) + array(module.bias)


def dense(x, module):
    return x @ array(module.kernel) + array(module.bias)


def attend(x, block):
    query, key, value = np.split(dense(x, block.projections), 3, axis=-1)
    size = x.shape[-1] // block.heads
    heads = []
    for i in range(block.heads):
        q, k, v = (each[:, i * size : (i + 1) * size] for each in (query, key, value))
        weights = np.exp(q @ k.T / np.sqrt(size))
        heads.append(weights / weights.sum(-1, keepdims=True) @ v)
    return dense(np.concatenate(heads, -1), block.out)


@pytest.mark.parametrize("pooling", ["mean", "class"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_encoder_block_equals_numpy(layout, pooling, x64):
    block = EncoderBlock(
        8,
        2,
        5,
        layout=LAYOUTS[layout],
        pooling=pooling,
        param_dtype=jnp.float64,
        rngs=nnx.Rngs(0),
    )
    block = perturbed(block)

    def reference(x):
        h = x + attend(norm(x, block.attention_norm), block)
        inner = dense(norm(h, block.feed_norm), block.up)
        inner = np.maximum(inner, 0) if layout == "paper" else np.asarray(jax.nn.gelu(inner))
        h = h + dense(inner, block.down)
        h = norm(h, block.norm) if layout == "paper" else h
        return h, h.mean(0) if pooling == "mean" else h[0]

    compare(block, sequences(8), reference)


def test_heads_equal_pytorch(x64):
    torch = pytest.importorskip("torch")
    block = perturbed(EncoderBlock(8, 2, 5, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    other = torch.nn.MultiheadAttention(8, 2, batch_first=True).double()
    x = sequences(8)
    with torch.no_grad():
        other.in_proj_weight.copy_(torch.tensor(array(block.projections.kernel).T))
        other.in_proj_bias.copy_(torch.tensor(array(block.projections.bias)))
        other.out_proj.weight.copy_(torch.tensor(array(block.out.kernel).T))
        other.out_proj.bias.copy_(torch.tensor(array(block.out.bias)))
        h, padding = torch.tensor(np.asarray(x["h"])), torch.tensor(np.asarray(x["mask"]) == 0)
        wanted, _ = other(h, h, h, key_padding_mask=padding)
    np.testing.assert_allclose(block._attend(x["h"], x["mask"]), wanted.numpy(), **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    net = model("transformer", layout=layout)
    shapes = [array(block.up.kernel).shape for block in net.blocks[1:]]
    paper = layout == "paper"
    assert shapes == [(8, 8 if paper else 32)] * 2
    assert (net.blocks[0].positions is None) == paper
    assert (net.blocks[1].norm is None) != paper
    assert isinstance(net.classifier.layers[1], layers.LayerNorm) != paper
    wide = model("transformer", layout=layout, feed_forward=5)
    assert array(wide.blocks[1].up.kernel).shape == (8, 5)
    x = texts()
    order = np.array([[1, 2, 3], [3, 2, 1]], np.int32)
    _, logits = everything(net, order)
    assert np.allclose(logits[0], logits[1], atol=1e-6) == paper  # blind to the order of words
    assert everything(net, x)[1].shape == (len(x), CLASSES)


@pytest.mark.parametrize("unbiased", [False, True])
def test_layer_norm(unbiased, x64):
    module = perturbed(layers.LayerNorm(6, unbiased=unbiased, param_dtype=jnp.float64))
    x = np.random.default_rng(0).normal(2, 3, (4, 5, 6))
    np.testing.assert_allclose(module(jnp.asarray(x)), norm(x, module), rtol=1e-12)
    constant = jnp.ones((2, 6))
    gradient = jax.grad(lambda x: jnp.sum(module(x) ** 2))(constant)
    np.testing.assert_allclose(module(constant), np.tile(array(module.bias), (2, 1)))
    assert np.isfinite(gradient).all()


# --- ViT ------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_token", [False, True])
def test_patches_equal_numpy(class_token, x64):
    block = PatchEmbedding(
        6,
        2,
        3,
        5,
        class_token=class_token,
        drop=0.0,
        param_dtype=jnp.float64,
        rngs=nnx.Rngs(0),
    )
    block = perturbed(block)
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 2))
    patches = [x[:, i : i + 3, j : j + 3].reshape(2, -1) for i in (0, 3) for j in (0, 3)]
    tokens = dense(np.stack(patches, 1), block.project)
    if class_token:
        token = np.broadcast_to(array(block.token), (2, 1, 5))
        tokens = np.concatenate([token, tokens], 1)
    tokens = tokens + array(block.positions)
    found = block(jnp.asarray(x))
    np.testing.assert_allclose(found["h"], tokens, **EXACT)
    np.testing.assert_allclose(found["summary"], tokens[:, int(class_token) :].mean(1), **EXACT)
    assert found["mask"].all()
    words = ("images [batch", "6, 6, 2", "[2, 6, 3, 2]")
    nets.assert_clear(ValueError, words, lambda: block(jnp.ones((2, 6, 3, 2))))


@pytest.mark.parametrize("pooling", ["mean", "class"])
def test_vit_shapes(pooling):
    def run(x):
        net = models.vit(10, pooling=pooling, rngs=nnx.Rngs(0))
        assert len(net.blocks) == 7
        return sequence_nets.outputs([*net.blocks, net.classifier], x)

    *found, logits = nnx.eval_shape(run, jnp.ones((2, 32, 32, 3)))
    tokens = 64 + (pooling == "class")
    assert {each["h"].shape for each in found} == {(2, tokens, 192)}
    assert {each["summary"].shape for each in found} == {(2, 192)}
    assert logits.shape == (2, 10)


# --- All ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", nets.marked(KINDS, ("lstm", "transformer")))
def test_gradients_reach_every_parameter(kind):
    """Those of half of the encoder are missing in the authors' code."""
    leaves = gradients(model(kind), sequence_nets.inputs(kind, dtype=np.float32))
    assert leaves
    assert all(np.asarray(leaf).any() for leaf in leaves)
    chex.assert_tree_all_finite(leaves)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", nets.marked(["bfloat16", "float16"], ["bfloat16"]))
@pytest.mark.parametrize("kind", nets.marked(KINDS, ("transformer",)))
def test_half_precision_stays_half_precision(kind, dtype):
    net = model(kind)
    for module in (*net.blocks, net.classifier):
        half = jax.tree.map(lambda p: p.astype(dtype), nnx.state(module, nnx.Param))
        nnx.update(module, half)
    blocks, _ = everything(net, sequence_nets.inputs(kind, dtype=jnp.dtype(dtype)))
    assert {leaf.dtype for leaf in jax.tree.leaves(blocks)} == {jnp.dtype(dtype)}
    data = sequence_nets.batches(kind, 1, dtype=np.float32)
    trainer = jd.Trainer(
        model(kind), nets.method("bp"), jd.optim.sgd(0.1), example=data[0], dtype=jnp.dtype(dtype)
    )
    state, metrics = nets.trained(trainer, data, 16)
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert {a.dtype for a in nets.weights(trainer, state).values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("kind", nets.marked(KINDS, ("lstm",)))
def test_dropout_drops_anew_in_every_step_and_not_in_evaluation(kind):
    data = sequence_nets.batches(kind, 1, dtype=np.float32)
    rngs = nnx.Rngs(0)
    net = model(kind, dropout=0.5, rngs=rngs)
    trainer = jd.Trainer(net, nets.method("bp"), jd.optim.sgd(1e-30), example=data[0])
    state, metrics = nets.trained(trainer, data, 3)
    assert len({each["loss"] for each in metrics}) == 3
    assert trainer.evaluate(state, data) == trainer.evaluate(state, data)
    assert not nnx.state(list(model(kind).blocks), nnx.RngState)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("lstm", {"hidden": 0}, "hidden is 0: a whole number of at least 1"),
        ("lstm", {"depth": 1.5}, "depth is 1.5: a whole number of at least 1"),
        ("lstm", {"vocabulary_size": 0}, "vocabulary_size is 0: a whole number of at least 1"),
        ("lstm", {"max_length": -1}, "max_length is -1: a whole number of at least 1"),
        ("lstm", {"merge": "sum"}, "merge is 'sum': allowed are mean, concat"),
        ("lstm", {"init": "xavier"}, "init is 'xavier': allowed are flax, torch, he"),
        ("lstm", {"dropout": 1.0}, r"dropout is 1.0: a number in \[0, 1\)"),
        ("lstm", {"mask_padding": 1}, "mask_padding is 1: True or False is needed"),
        ("lstm", {"embeddings": np.ones((10, 8))}, r"embeddings are \[10, 8\]: .* = \[11, 8\]"),
        ("lstm", {"embeddings": np.ones(11)}, r"embeddings are \[11\]: \[vocabulary_size, width\]"),
        (
            "transformer",
            {"embeddings": np.ones((11, 9))},
            r"embeddings are \[11, 9\]: .* = \[11, 8\]",
        ),
        ("transformer", {"heads": 3}, "hidden is 8: a multiple of heads=3"),
        ("transformer", {"feed_forward": -1}, "feed_forward is -1: a whole number of at least 1"),
        ("transformer", {"layout": "bert"}, "layout is 'bert': allowed are standard, "),
        ("vit", {"patch": 3}, "image_size is 8: a multiple of patch=3"),
        ("vit", {"pooling": "max"}, "pooling is 'max': allowed are mean, class"),
        ("vit", {"channels": 0}, "channels is 0: a whole number of at least 1"),
    ],
)
def test_bad_arguments_get_one_clear_line(kind, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        model(kind, **arguments)
    assert "\n" not in str(caught.value)


def test_lstm_takes_word_vectors_of_any_width():
    net = model("lstm", embeddings=np.ones((11, 5)))
    blocks, _ = everything(net, texts())
    assert [block["h"].shape[-1] for block in blocks] == [5, 8, 8]
    concat, _ = everything(model("lstm", merge="concat"), texts())
    assert [block["h"].shape[-1] for block in concat] == [8, 16, 16]
    assert {block["summary"].shape[-1] for block in concat} == {8}
