"""Masks: what is padding never changes anything, and an empty text makes no NaN."""

import chex
import jax.numpy as jnp
import nets
import numpy as np
import pytest
import sequence_nets
from flax import nnx
from sequence_nets import TEXTS, everything, gradients, model, texts

import jdecouple as jd
from jdecouple.methods.objectives import BlockInfo
from jdecouple.methods.objectives.base import pooled as pooled_of_heads
from jdecouple.models.sequence import Embedding, masked_mean, pooled

EXACT = {"rtol": 0, "atol": 1e-12}


def padded(x, count=3):
    return np.pad(x, ((0, 0), (0, count)))


def double(kind, **options):
    return model(kind, init="torch", param_dtype=jnp.float64, **options)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", nets.marked(TEXTS, ("transformer",)))
def test_more_padding_changes_no_output_and_no_gradient(kind, training, x64):
    net, x = double(kind), texts()
    for module in (*net.blocks, net.classifier):
        module.train() if training else module.eval()
    (short, logits), (long, same) = everything(net, x), everything(net, padded(x))
    np.testing.assert_allclose(same, logits, **EXACT)
    for here, there in zip(short, long, strict=True):
        np.testing.assert_allclose(there["summary"], here["summary"], **EXACT)
        np.testing.assert_allclose(there["h"][:, : x.shape[1]], here["h"], **EXACT)
        assert not here["h"][x == 0].any()
        assert not there["h"][:, x.shape[1] :].any()
        np.testing.assert_array_equal(here["mask"], x != 0)
    mine, other = gradients(net, x), gradients(net, padded(x))
    chex.assert_trees_all_close(other, mine, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("behind", [1e6, np.nan])
@pytest.mark.parametrize("kind", TEXTS)
def test_what_lies_behind_the_mask_changes_nothing(kind, behind, x64):
    net, x = double(kind), texts()
    (first, *_), _ = everything(net, x)
    dirty = {**first, "h": jnp.where(first["mask"][..., None] > 0, first["h"], behind)}
    assert not np.array_equal(dirty["h"], first["h"])
    later = [*net.blocks[1:], net.classifier]
    found, wanted = (sequence_nets.outputs(later, each) for each in (dirty, first))
    for here, there in zip(found, wanted, strict=True):
        np.testing.assert_allclose(pooled(here), pooled(there), **EXACT)


@pytest.mark.parametrize("kind", nets.marked(TEXTS, ("transformer",)))
def test_padding_does_matter_where_it_is_not_masked(kind, x64):
    net, x = double(kind, mask_padding=False), texts()
    (short, _), (long, _) = everything(net, x), everything(net, padded(x))
    for here, there in zip(short, long, strict=True):
        assert here["mask"].all()
        assert np.abs(here["summary"] - there["summary"]).max() > 1e-6
    np.testing.assert_allclose(short[0]["summary"], short[0]["h"].mean(1), **EXACT)


@pytest.mark.slow  # test_buckets.py has a fast one
@pytest.mark.parametrize("kind", TEXTS)
def test_training_does_not_see_padding(kind, x64):
    """Three steps of both routes, and the evaluation after them."""
    for method in ("bp", "deinforeg"):
        found = []
        for more in (0, 4):
            data = sequence_nets.batches(kind)
            data = [{**each, "x": padded(each["x"], more)} for each in data]
            trainer = jd.Trainer(
                double(kind, depth=1),
                nets.method(method),
                jd.optim.sgd(0.1, momentum=0.9),
                example=data[0],
            )
            state, metrics = nets.trained(trainer, data, 3)
            found.append((nets.to_arrays(trainer, state), metrics, trainer.evaluate(state, data)))
        (arrays, metrics, values), (others, more_metrics, more_values) = found
        assert nets.largest_error(others, arrays) < 1e-12
        assert more_metrics[-1] == pytest.approx(metrics[-1], rel=1e-6)
        assert more_values == pytest.approx(values, rel=1e-6)


def test_an_lstm_stands_still_wherever_the_padding_is(x64):
    """At the front and between words, too."""
    net = double("lstm")
    x = np.array([[3, 5, 2, 0, 0, 0], [0, 3, 0, 5, 0, 2]], np.int32)
    blocks, logits = everything(net, x)
    np.testing.assert_allclose(logits[0], logits[1], **EXACT)
    for block in blocks:
        np.testing.assert_allclose(block["h"][0, :3], block["h"][1][x[1] > 0], **EXACT)


@pytest.mark.parametrize("kind", nets.marked(TEXTS, ("transformer",)))
def test_an_empty_text_makes_no_nan(kind, x64):
    net, x = double(kind), texts()
    x[1] = 0
    blocks, logits = everything(net, x)
    others = np.arange(len(x)) != 1
    _, alone = everything(net, x[others])
    np.testing.assert_allclose(logits[others], alone, **EXACT)
    assert not blocks[0]["summary"][1].any()
    chex.assert_tree_all_finite((logits, gradients(net, x)))


def test_masked_mean():
    h = jnp.asarray([[[1.0, 2], [3, 4], [9, 9]], [[5, 6], [7, 7], [8, 8]], [[1, 1]] * 3])
    mask = jnp.asarray([[1.0, 1, 0], [0, 1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(masked_mean(h, mask), [[2, 3], [7, 7], [0, 0]])


def test_masked_mean_of_half_precision_counts_beyond_256():
    h = jnp.ones((1, 511, 1), jnp.bfloat16)
    mean = masked_mean(h, jnp.ones((1, 511), jnp.bfloat16))
    assert mean.dtype == jnp.bfloat16
    assert mean[0, 0] == 1


def test_heads_read_the_summary_or_the_one_array():
    assert pooled_of_heads is pooled
    net = model("lstm")
    (first, *_), _ = everything(net, texts())
    assert pooled(first) is first["summary"]
    shapes = nnx.eval_shape(lambda: {"h": jnp.ones((2, 5, 8)), "summary": jnp.ones((2, 8))})
    assert BlockInfo(0, 1, shapes, 3).size == 8
    assert BlockInfo(0, 1, jnp.ones((2, 3, 4)), 3).size == 12
    words = ("block 0", "one array", "summary", "dict")
    nets.assert_clear(TypeError, words, lambda: BlockInfo(0, 1, {"h": 1}, 3).size)
    nets.assert_clear(TypeError, ("tuple",), lambda: BlockInfo(0, 1, (1, 2), 3).size)


def test_embedding_takes_given_vectors_and_trains_no_padding(x64):
    given = np.random.default_rng(0).normal(size=(7, 4))
    block = Embedding(
        7, 4, max_length=3, embeddings=given, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
    )
    x = jnp.asarray([[2, 6, 0], [1, 2, 3]])
    found = block(x)
    np.testing.assert_array_equal(found["h"][1], given[1:4])
    np.testing.assert_array_equal(found["h"][0, 2], np.zeros(4))
    np.testing.assert_allclose(found["summary"][0], given[[2, 6]].mean(0))

    def loss(block):
        found = block(x)
        return jnp.sum(found["h"] ** 2) + jnp.sum(found["summary"] ** 2)

    gradient = np.asarray(nnx.grad(loss)(block)["table"][...])
    assert [bool(row.any()) for row in gradient] == [i in (1, 2, 3, 6) for i in range(7)]


@pytest.mark.parametrize(
    ("init", "deviation"), [("torch", 1.0), ("he_out", 1.0), ("flax", 1 / 8), ("he", 1 / 8)]
)
def test_initial_embeddings(init, deviation):
    block = Embedding(500, 64, max_length=3, positions=True, init=init, rngs=nnx.Rngs(0))
    table = np.asarray(block.table[...])
    assert table.std() == pytest.approx(deviation, rel=0.02)
    assert np.abs(table).max() > 3.5 * deviation  # normal
    assert np.asarray(block.positions[...]).std() == pytest.approx(deviation, rel=0.2)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (jnp.ones((2, 3)), ("token ids", "int [batch, length]", "float32[2, 3]")),
        (jnp.ones((2, 3, 1), jnp.int32), ("token ids", "int32[2, 3, 1]")),
        (jnp.ones((2, 4), jnp.int32), ("4 tokens", "max_length is 3")),
    ],
)
def test_other_inputs_get_one_clear_line(x, words):
    block = Embedding(5, 2, max_length=3, rngs=nnx.Rngs(0))
    nets.assert_clear(ValueError, words, lambda: block(x))
