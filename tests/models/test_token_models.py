"""Language models: what a position sees, and one token after another."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
import token_nets
from flax import nnx

import jdecouple as jd
from jdecouple.models import tokens
from jdecouple.models.gpt import rotated

pytestmark = pytest.mark.usefixtures("module_x64")
KINDS = pytest.mark.parametrize("kind", nets.marked(token_nets.NETS, ("gpt", "reversible")))
DOCUMENTS = [0, 3, 4, 5, 0, 6, 7, 0]
"""Two of them, and padding."""


@functools.cache
def network(kind: str) -> jd.Model:
    return token_nets.model(kind, param_dtype=jnp.float64)


@nnx.jit
def _outputs(modules: list[nnx.Module], x: jax.Array) -> list[Any]:
    found = []
    for module in modules:
        x = module(x)
        found.append(tokens.states(x))
    return found


def outputs(kind: str, *rows: list[int]) -> np.ndarray:
    """States of all blocks side by side, and the logits, of the rows, which are padded behind."""
    model, size = network(kind), token_nets.CONTEXT
    x = np.array([row + [0] * (size - len(row)) for row in rows], np.int32)
    return np.concatenate(_outputs([*model.blocks, model.classifier], jnp.asarray(x)), axis=-1)


@KINDS
def test_a_document_is_the_same_alone_padded_and_packed(kind):
    """And no position sees a later one."""
    packed, first, second, behind = outputs(
        kind, DOCUMENTS, [0, 3, 4, 5], [0, 6, 7], [0, 1, 2, 0, 6, 7]
    )
    near = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-12)
    near(packed[:4], first[:4])
    near(packed[4:7], second[:3])
    near(behind[3:6], second[:3])
    other, longer = outputs(kind, [0, 3, 9, 5], [0, 3, 4, 5, 1, 1])
    near(other[:2], first[:2])
    assert (np.abs(other[2:4] - first[2:4]).max(-1) > 1e-6).all()  # but earlier ones are seen
    near(longer[:4], first[:4])
    assert packed.shape == (8, 3 * 8 + token_nets.VOCABULARY)


@KINDS
def test_one_token_after_another_gives_the_same(kind):
    blocks, row = network(kind).blocks, jnp.array([[0, 3, 4, 5, 6, 7, 8], [0, 9, 9, 1, 2, 3, 3]])
    wanted = _outputs([*blocks], jnp.asarray(row))[-1]
    known = [block.begin(2, token_nets.CONTEXT, jnp.float64) for block in blocks]
    step = nnx.jit(tokens_step)
    for place in range(row.shape[1]):
        h, known = step([*blocks], row[:, place], known, jnp.asarray(place))
        np.testing.assert_allclose(h, wanted[:, place], rtol=0, atol=1e-12)


def tokens_step(blocks: list, h: jax.Array, known: list, place: jax.Array) -> tuple:
    found = []
    for block, own in zip(blocks, known, strict=True):
        h, own = block.advance(h, own, place)
        found.append(own)
    return h, found


def test_rotation_tells_how_far_apart_two_positions_are():
    query, key = np.random.default_rng(0).normal(size=(2, 1, 1, 6))

    def product(one: int, other: int) -> float:
        turned = (rotated(jnp.asarray(x), jnp.array([n])) for x, n in ((query, one), (key, other)))
        return float(jnp.sum(jnp.multiply(*turned)))

    assert product(2, 5) == pytest.approx(product(7, 10), abs=1e-12)
    assert product(2, 5) != pytest.approx(product(2, 6), abs=1e-3)
    assert product(3, 3) == pytest.approx(float(np.sum(query * key)), abs=1e-12)
    # Number i and i + 3 as a complex number, turned by i's share of the position.
    whole = (query[..., :3] + 1j * query[..., 3:]) * np.exp(4j * 10_000.0 ** (-np.arange(3) / 3))
    wanted = np.concatenate([whole.real, whole.imag], axis=-1)
    np.testing.assert_allclose(rotated(jnp.asarray(query), jnp.array([4])), wanted, atol=1e-12)


def test_beginnings():
    begins = jnp.array([[0.0, 0, 1, 0, 1, 1, 0], [1.0, 0, 0, 0, 0, 0, 0]])
    found = tokens.beginnings(begins)
    np.testing.assert_array_equal(found, [[0, 0, 2, 2, 4, 5, 5], [0] * 7])


@pytest.mark.slow
def test_half_precision_and_cuts():
    model = token_nets.model("gpt", cut=2, depth=3, dropout=0.1)
    assert model.splits == {"even": {2: (1,)}}
    assert len(model.blocks) == 2
    for module in (*model.blocks, model.classifier):
        half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), nnx.state(module, nnx.Param))
        nnx.update(module, half)
    *features, logits = _outputs([*model.blocks, model.classifier], jnp.ones((2, 8), jnp.int32))
    assert {each.dtype for each in (*features, logits)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("gpt", {"heads": 3}, "hidden is 8: a multiple of 6"),
        ("gpt", {"heads": 8}, "hidden is 8: a multiple of 16"),
        ("gpt", {"heads": 4, "reversible": True}, "hidden is 8: a multiple of 16"),
        ("gpt", {"positions": "none"}, "positions is 'none': allowed are rope, learned"),
        ("gpt", {"feed_forward": -1}, "feed_forward is -1"),
        ("lstm_lm", {"depth": 0}, "depth is 0"),
        ("lstm_lm", {"dropout": 1.0}, "dropout is 1.0"),
        ("gpt", {"context": 0}, "context is 0"),
    ],
)
def test_refused(kind, options, words):
    with pytest.raises(ValueError, match=words):
        token_nets.model(kind, **options)


def test_rows_that_are_no_tokens():
    embedding = network("learned").blocks[0]
    with pytest.raises(ValueError, match="a row has 9 tokens, the context is 8"):
        embedding(jnp.zeros((1, 9), jnp.int32))
    with pytest.raises(ValueError, match=r"x is float64\[1, 8\]: token ids"):
        embedding(jnp.zeros((1, 8)))
