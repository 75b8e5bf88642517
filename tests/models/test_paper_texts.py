"""The papers' text nets: recordings of their code, and the options that lead to them."""

import golden_vectors as gv
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sequence_nets
from flax import nnx
from jax.test_util import check_grads
from sequence_nets import CLASSES, everything, model, texts

import jdecouple as jd
from jdecouple import models
from jdecouple.methods.objectives import BlockInfo
from jdecouple.models.lstm import BidirectionalLSTM
from jdecouple.models.sequence import Further

EXACT = {"rtol": 0, "atol": 1e-12}
LIMIT = 1e-12  # of golden values and gradients, relative to the largest of their array


def load(name):
    with np.load(gv.FOLDER / f"{name}.npz") as file:
        return dict(file)


def words(x, mask=None):
    """Token ids of which every one is another, and the vectors with which they stand for `x`."""
    ids = 1 + np.arange(x[..., 0].size).reshape(x.shape[:2])
    vectors = np.concatenate([np.zeros((1, x.shape[-1])), x.reshape(-1, x.shape[-1])])
    ids = ids if mask is None else np.where(mask, ids, 0)
    options = {"vocabulary_size": len(vectors), "max_length": x.shape[1], "embeddings": vectors}
    return ids, {**options, "param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}


@nnx.jit
def weighted(blocks, ids, weights):
    """Gradients of the weighted summaries of all blocks but the first, and these summaries."""

    def loss(blocks):
        found = [each["summary"] for each in sequence_nets.outputs(blocks, ids)[1:]]
        return jnp.sum(weights * sum(found)), found

    return nnx.grad(loss, has_aux=True)(blocks)


def assert_golden(found, wanted, key):
    assert gv.relative_error(found, wanted) < LIMIT, key


# --- LSTM -----------------------------------------------------------------------------------

DIRECTIONS = ("", "_reverse")


def stacked(golden, **options):
    """Token ids, and the two recorded LSTMs behind an embedding."""
    ids, shared = words(golden["x"])
    net = models.lstm(2, hidden=5, depth=2, merge="concat", **shared, **options)
    for number, block in enumerate(net.blocks[1:], start=1):
        named = {
            name: [golden[f"w/l{number}/{name}_l0{way}"] for way in DIRECTIONS]
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        }
        block.kernel.set_value(jnp.stack([each.T for each in named["weight_ih"]]))
        block.recurrent.set_value(jnp.stack([each.T for each in named["weight_hh"]]))
        block.bias.set_value(jnp.asarray(named["bias_ih"]) + jnp.asarray(named["bias_hh"]))
    return ids, net


def test_stacked_lstms_equal_the_papers_code(x64):
    golden = load("lstm_stack__h5")
    ids, net = stacked(golden)
    found, summaries = weighted(list(net.blocks), ids, golden["c"])
    for summary, key in zip(summaries, ("s1", "s2"), strict=True):
        assert_golden(summary, golden[key], key)
    in_x = found[0]["table"][...][1:].reshape(golden["x"].shape)
    assert_golden(in_x, golden["gx"], "gx")
    for number in (1, 2):
        for way, suffix in enumerate(DIRECTIONS):
            for name, ours, turned in (
                ("weight_ih", "kernel", np.transpose),
                ("weight_hh", "recurrent", np.transpose),
                ("bias_ih", "bias", np.asarray),
                ("bias_hh", "bias", np.asarray),
            ):
                key = f"g/l{number}/{name}_l0{suffix}"
                assert_golden(turned(found[number][ours][...][way]), golden[key], key)


def test_passed_states_equal_those_of_scpl(x64):
    golden = load("lstm_stack__h5")
    ids, net = stacked(golden, pass_state=True, mask_padding=False)
    first, second = everything(net, ids)[0][1:]
    assert_golden(first["summary"], golden["s1"], "s1")
    assert_golden(second["summary"], golden["s2_scpl_hidden_passed"], "s2")
    assert second["state"].shape == (len(ids), 2, 2, 5)  # output and cell, both directions
    np.testing.assert_allclose(second["state"][:, 0].mean(1), second["summary"], **EXACT)


@pytest.mark.slow
def test_gradients_flow_through_passed_states(x64):
    rng = np.random.default_rng(0)
    h, state = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 2, 2, 3))
    mask = jnp.asarray([[1.0, 1, 1], [1, 1, 0]])
    options = {"pass_state": True, "param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
    graph, params = nnx.split(BidirectionalLSTM(4, 3, **options))

    @jax.jit
    def run(params, h, state):
        x = {"h": h, "mask": mask, "summary": h[:, 0], "state": state}
        found = nnx.merge(graph, params)(x)
        return found["h"], found["summary"], found["state"]

    check_grads(run, (params, jnp.asarray(h), jnp.asarray(state)), order=1, modes=["rev"])


@pytest.mark.slow
@pytest.mark.parametrize("mask_padding", [True, False])
def test_the_state_that_is_passed_stands_still_at_masked_padding_only(mask_padding, x64):
    options = {"pass_state": True, "mask_padding": mask_padding, "param_dtype": jnp.float64}
    net, x = model("lstm", **options), texts()
    (start, *blocks), _ = everything(net, x)
    assert "state" not in start
    for here, there in zip(
        blocks, everything(net, np.pad(x, ((0, 0), (0, 3))))[0][1:], strict=True
    ):
        same = np.abs(here["state"] - there["state"]).max() < 1e-12
        assert same == mask_padding
        np.testing.assert_allclose(here["state"][:, 0].mean(1), here["summary"], **EXACT)


def test_a_block_that_reads_a_further_part_gets_the_passed_state(x64):
    embedding = model("lstm", param_dtype=jnp.float64).blocks[0]
    reader = Further("x_1", embedding, nnx.Sequential(), 8, rngs=nnx.Rngs(0))
    x = {**embedding(jnp.asarray(texts())), "state": jnp.ones((6, 2, 2, 8))}
    found = reader(x, x_1=jnp.asarray(texts(length=3)))
    assert found["h"].shape == (6, 8, 8)
    np.testing.assert_array_equal(found["state"], x["state"])


# --- Transformer ----------------------------------------------------------------------------


LAYER = "encoder.layers.0"
DENSE = {
    "projections": [f"{LAYER}.self_attn.linears.{i}" for i in range(3)],
    "out": [f"{LAYER}.self_attn.linears.3"],
    "up": [f"{LAYER}.feed_forward.w_1"],
    "down": [f"{LAYER}.feed_forward.w_2"],
}
NORMS = {
    "attention_norm": f"{LAYER}.sublayer.0.norm",
    "feed_norm": f"{LAYER}.sublayer.1.norm",
    "norm": "encoder.norm",
}


def recorded(golden, kind):
    """Weights ("w") or gradients ("g") by layer and name, as an encoder block calls them."""
    for layer, names in DENSE.items():
        kernels = [golden[f"{kind}/{name}.weight"].T for name in names]
        yield layer, "kernel", np.concatenate(kernels, 1)
        yield layer, "bias", np.concatenate([golden[f"{kind}/{name}.bias"] for name in names])
    for layer, name in NORMS.items():
        yield layer, "scale", golden[f"{kind}/{name}.a"]
        yield layer, "bias", golden[f"{kind}/{name}.b"]


def test_the_encoder_layer_equals_the_papers_code(x64):
    golden = load("transformer_encoder__h12_heads3")
    ids, shared = words(golden["x"], golden["mask"])
    net = models.transformer(2, hidden=12, depth=1, heads=3, layout="paper", **shared)
    for layer, name, weights in recorded(golden, "w"):
        getattr(getattr(net.blocks[1], layer), name).set_value(jnp.asarray(weights))
    found, summaries = weighted(list(net.blocks), ids, golden["c"])
    assert_golden(summaries[0], golden["red"], "red")
    in_x = found[0]["table"][...][1:].reshape(golden["x"].shape)
    assert_golden(in_x, golden["gx"], "gx")
    for layer, name, gradient in recorded(golden, "g"):
        assert_golden(found[1][layer][name][...], gradient, (layer, name))


@pytest.mark.slow
def test_xavier_is_for_the_dense_weights_of_encoder_layers():
    net = model("paper", init="xavier", hidden=64, depth=1, feed_forward=16)
    embedding, block = net.blocks
    assert np.asarray(embedding.table[...]).std() == pytest.approx(1, rel=0.1)  # as PyTorch's
    for layer, out in ((block.projections, 64), (block.out, 64), (block.up, 16), (block.down, 64)):
        into = layer.kernel.shape[0]
        bound = np.sqrt(6 / (into + out))
        assert 0.97 * bound < np.abs(layer.kernel[...]).max() <= bound
        assert 0 < np.abs(layer.bias[...]).max() <= 1 / np.sqrt(into)
    assert 0 < np.abs(net.classifier.layers[-1].kernel[...]).max() <= 1 / 8


def test_dropout_may_leave_the_embeddings_alone():
    """A module without dropout has no keys."""
    for options, dropping in (
        ({"dropout": 0.5}, [True, True, True, False]),
        ({"dropout": 0.5, "embedding_dropout": 0.0}, [False, True, True, False]),
        ({"embedding_dropout": 0.5}, [True, False, False, False]),
    ):
        net = model("paper", **options)
        modules = (*net.blocks, net.classifier)
        assert [bool(nnx.state(each, nnx.RngState)) for each in modules] == dropping


# --- Both -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sequence_nets.TEXTS)
def test_classifiers(kind, x64):
    summary = np.random.default_rng(0).normal(size=(6, 8))
    for name in ("linear", "deinforeg", "scpl"):
        net = model(kind, classifier=name, init="torch", param_dtype=jnp.float64)
        layers = [each for each in net.classifier.layers if hasattr(each, "bias")]
        x = layers.pop(0)(summary) if kind == "transformer" else summary  # LayerNorm
        assert len(layers) == (2 if name == "scpl" else 1)
        for i, layer in enumerate(layers):
            assert layer.kernel.shape == (8, 8 if i + 1 < len(layers) else CLASSES)
            x = np.tanh(x) if i or name == "deinforeg" else np.asarray(x)
            x = x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])
        logits = net.classifier({"summary": jnp.asarray(summary)})
        np.testing.assert_allclose(logits, x, **EXACT)


@pytest.mark.parametrize("kind", ["lstm", "paper"])
def test_padding_may_count_in_the_mean_of_the_embedding_alone(kind, x64):
    x = texts()
    for mask_padding, mask_embedding in ((True, False), (False, None), (False, True)):
        masks = {"mask_padding": mask_padding, "mask_embedding": mask_embedding}
        embedding = model(kind, param_dtype=jnp.float64, **masks).blocks[0]
        found = embedding(jnp.asarray(x))
        vectors = np.asarray(embedding.table[...])[x]
        counts = (x > 0) | (not mask_embedding)
        mean = (vectors * counts[..., None]).sum(1) / counts.sum(1)[:, None]
        np.testing.assert_allclose(found["summary"], mean, **EXACT)
        np.testing.assert_array_equal(found["mask"], (x > 0) | (not mask_padding))
        np.testing.assert_array_equal(found["h"], vectors * found["mask"][..., None])


def test_associated_learning_bridges_the_summaries(x64):
    """As the papers' text nets: one dense layer and tanh each, 300 wide."""
    method = jd.methods.get("al", features=300, expansion=0, activation="tanh")
    summary = np.random.default_rng(0).normal(size=(6, 8))
    features = {"h": jnp.zeros((6, 5, 8)), "mask": jnp.ones((6, 5)), "summary": summary}
    labels = np.arange(6) % CLASSES
    target = np.eye(CLASSES)[labels]
    for index in range(2):  # codes of the labels, then codes of these
        info = BlockInfo(index, 2, features, CLASSES, init="torch", param_dtype=jnp.float64)
        head = method.objective.head(info, nnx.Rngs(index))
        carry = {"label": labels, **({"target": jnp.asarray(target)} if index else {})}
        terms = head(features, carry).metrics

        def through(part, x):
            (layer,) = [each for each in part.layers if isinstance(each, nnx.Linear)]
            return np.tanh(x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...]))

        code, bridged = through(head.encoder, target), through(head.bridge, summary)
        assert code.shape == (6, 300)
        wanted = np.mean((through(head.decoder, code) - target) ** 2)
        np.testing.assert_allclose(terms["autoencoder"], wanted, **EXACT)
        np.testing.assert_allclose(terms["bridge"], np.mean((bridged - code) ** 2), **EXACT)
        target = code


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("lstm", {"pass_state": 1}, "pass_state is 1: True or False is needed"),
        ("lstm", {"classifier": "mlp"}, "classifier is 'mlp': allowed are linear, deinforeg, scpl"),
        ("lstm", {"mask_embedding": "no"}, "mask_embedding is 'no': True or False is needed"),
        ("paper", {"init": "glorot"}, "init is 'glorot': allowed are flax, .*, xavier"),
        ("paper", {"embedding_dropout": 1.5}, r"^embedding_dropout is 1.5: a number in \[0, 1\)"),
    ],
)
def test_bad_arguments_get_one_clear_line(kind, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        model(kind, **arguments)
    assert "\n" not in str(caught.value)
