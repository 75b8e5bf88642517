"""LoPT: what every block reconstructs, and what learns by it."""

import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
import token_nets
from flax import nnx
from heads import CLASSES, MAPS, VECTORS

from jdecouple.methods.objectives import BlockInfo, FeatureReconstruction

pytestmark = pytest.mark.usefixtures("module_x64")
RNG = np.random.default_rng(0)


def dense(layer, x):
    return x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])


def decoded(head, h):
    """The authors' decoder: LayerNorm, dense, GELU, dense."""
    _, narrow, _, wide = head.decoder.layers
    centred = h - h.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return dense(wide, np.asarray(nnx.gelu(dense(narrow, normed))))


def test_losses_of_a_language_model_by_their_definition():
    """Block 0 reconstructs the embedding of its tokens, block 1 what block 0 gave."""
    net = token_nets.model(depth=3, param_dtype=jnp.float64).cut("(0, 2, 3)")
    each = token_nets.trainer("lopt", model=net, num_stages=1)
    batch = token_nets.batches(1)[0]
    modules = [unit.modules(*unit.initial()) for unit in each.design.stages[0].units]
    real, received = batch["label"] >= 0, jnp.asarray(batch["x"])
    for number, (block, head) in enumerate(modules[:2]):
        carry, output = {"x": received, "label": batch["label"]}, block(received)
        target = received["h"] if number else block.layers[0](received)["h"]
        assert head.decoder.layers[1].kernel.shape == (8, 2)
        error = ((decoded(head, np.asarray(output["h"])) - np.asarray(target))[real] ** 2).mean()
        found = head(output, carry)
        assert float(found.metrics["reconstruction"]) == pytest.approx(error, rel=1e-9)
        # The mean of two blocks, times 10.
        assert float(found.loss) == pytest.approx(10 / 2 * error, rel=1e-9)
        received = output


def built(features, received, index=0, embedding=None, **arguments):
    info = BlockInfo(
        index=index,
        num_blocks=3,
        features=features,
        num_classes=CLASSES,
        received=received,
        embedding=embedding,
        param_dtype=jnp.float64,
    )
    return FeatureReconstruction(**arguments).head(info, nnx.Rngs(0))


def test_the_target_has_no_gradient_and_the_embedding_learns_by_the_features_alone():
    embedding = nnx.Embed(7, 6, param_dtype=jnp.float64, rngs=nnx.Rngs(1))
    shape = jax.ShapeDtypeStruct((4, 6), jnp.float64)
    head = built(shape, shape, embedding=embedding)
    graph, params, rest = nnx.split(head, nnx.Param, ...)
    carry = {"x": jnp.arange(4), "label": jnp.zeros(4, int)}

    def loss(params, features):
        return nnx.merge(graph, params, rest)(features, carry).loss

    features = jnp.asarray(RNG.normal(size=(4, 6)))
    of_params, of_features = jax.grad(loss, (0, 1))(params, features)
    assert not np.any(of_params["embedding"]["embedding"][...])
    assert np.any(of_params["decoder"]["layers"][1]["kernel"][...])
    assert np.all(np.abs(of_features).max(1) > 0)


@pytest.mark.parametrize(
    ("features", "received", "widths"),
    [
        (VECTORS, jax.ShapeDtypeStruct((VECTORS.shape[0], 9), jnp.float32), (None, 9)),
        (MAPS, MAPS, (MAPS.shape[-1], MAPS.shape[-1])),  # pixel by pixel
        (VECTORS, MAPS, (None, int(np.prod(MAPS.shape[1:])))),
    ],
)
def test_what_the_decoder_reads_and_gives(features, received, widths):
    head = built(features, received, index=1, bottleneck=5)
    _, narrow, _, wide = head.decoder.layers
    inputs = widths[0] or VECTORS.shape[-1]
    assert (narrow.kernel.shape, wide.kernel.shape) == ((inputs, 5), (5, widths[1]))
    limit = 0.1 * (6 / (inputs + 5)) ** 0.5
    assert limit / 2 < float(jnp.abs(narrow.kernel[...]).max()) <= limit
    assert not narrow.bias[...].any()
    batch = features.shape[0]
    shape = (batch, *received.shape[1:])
    carry = {"x": jnp.asarray(RNG.normal(size=shape)), "label": jnp.zeros(batch, int)}
    output = head(jnp.asarray(RNG.normal(size=features.shape)), carry)
    assert output.logits is None
    assert output.loss > 0


def test_bytes_are_reconstructed_on_the_scale_of_1():
    shape = jax.ShapeDtypeStruct((4, 6), jnp.uint8)
    head = built(jax.ShapeDtypeStruct((4, 3), jnp.float64), shape)
    wide = head.decoder.layers[-1]
    wide.kernel.set_value(jnp.zeros_like(wide.kernel[...]))
    carry = {"x": jnp.full((4, 6), 51, jnp.uint8), "label": jnp.zeros(4, int)}
    output = head(jnp.asarray(RNG.normal(size=(4, 3))), carry)
    assert float(output.metrics["reconstruction"]) == pytest.approx(0.2**2)


def test_refused():
    ids = jax.ShapeDtypeStruct((4, 6), jnp.int32)
    with pytest.raises(
        ValueError, match=r"block 0 reads int32\[4, 6\]: lopt needs floats or uint8"
    ):
        built(jax.ShapeDtypeStruct((4, 3), jnp.float32), ids)
    for arguments in ({"weight": 0.0}, {"bottleneck": -1}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            nets.method("lopt", **arguments)
