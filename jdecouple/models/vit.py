"""A small vision transformer: a block that embeds patches, then one encoder layer a block."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jdecouple._errors import require_int, require_one_of
from jdecouple.models import layers
from jdecouple.models.base import Model
from jdecouple.models.cuts import cuttable
from jdecouple.models.sequence import Sequence, dropout_layer, masked_mean, sequence
from jdecouple.models.transformer import LAYOUTS, POOLINGS, encoder, normed_classifier

_DEVIATION = 0.02  # of initial positions and class token, as in the paper's code


class PatchEmbedding(nnx.Module):
    """Images to sequences: a dense layer on every patch, and a learned vector for every position.

    With `class_token` a learned token precedes the patches. `drop` is the rate of dropout on the
    tokens; the summary sees none of it.
    """

    is_embedding: ClassVar[bool] = True

    def __init__(
        self,
        image_size: int,
        channels: int,
        patch: int,
        hidden: int,
        *,
        class_token: bool,
        drop: float,
        init: str = "flax",
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        require_int(1, image_size=image_size, channels=channels, patch=patch)
        if image_size % patch:
            raise ValueError(f"image_size is {image_size}: a multiple of patch={patch} is needed")
        self.shape, self.patch = (image_size, image_size, channels), patch
        self.project = layers.linear(
            patch * patch * channels, hidden, init=init, param_dtype=param_dtype, rngs=rngs
        )

        def drawn(*shape: int) -> nnx.Param:
            draw = nnx.initializers.normal(_DEVIATION)
            return nnx.Param(draw(rngs.params(), shape, param_dtype))

        self.positions = drawn((image_size // patch) ** 2 + class_token, hidden)
        self.token = drawn(hidden) if class_token else None
        self.drop = dropout_layer(drop, rngs)

    def __call__(self, x: jax.Array) -> Sequence:
        """Tokens of `x` `[batch, height, width, channels]`; the summary is the patches' mean."""
        if x.shape[1:] != self.shape:
            raise ValueError(f"x is {list(x.shape)}: images [batch, {self.shape}] are needed")
        batch, side, _, channels = x.shape
        count, patch = side // self.patch, self.patch
        x = x.reshape(batch, count, patch, count, patch, channels).transpose(0, 1, 3, 2, 4, 5)
        h = self.project(x.reshape(batch, count * count, patch * patch * channels))
        if self.token is not None:
            token = jnp.broadcast_to(self.token[...], (batch, 1, h.shape[-1])).astype(h.dtype)
            h = jnp.concatenate([token, h], axis=1)
        h = h + self.positions[...]
        mask = jnp.ones(h.shape[:2], h.dtype)
        # Not the class token's: until there is attention, it is the same for all images.
        first = 0 if self.token is None else 1
        return sequence(self.drop(h), mask, masked_mean(h[:, first:], mask[:, first:]))


@cuttable
def vit(
    num_classes: int,
    *,
    patch: int = 4,
    hidden: int = 192,
    depth: int = 6,
    heads: int = 3,
    feed_forward: int = 0,
    pooling: str = "mean",
    dropout: float = 0.0,
    image_size: int = 32,
    channels: int = 3,
    init: str = "flax",
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
) -> Model:
    """Vision transformer (arXiv 2010.11929); by default a small one for CIFAR.

    Arguments not listed are those of all builders, see `jdecouple.models`.

    Args:
        patch: Height and width of a patch in pixels, a divisor of `image_size`.
        hidden: Width of the states.
        depth: Number of encoder blocks.
        heads: Attention heads of every block, a divisor of `hidden`.
        feed_forward: Width inside the feed-forward layers; 0 for 4 x `hidden`.
        pooling: What represents an image: the "mean" over the patches, or a "class" token.
        dropout: Share of numbers dropped from tokens, attention weights, inside the feed-forward
            layers and before every addition.

    Returns:
        A model of 1 + `depth` blocks from images, NHWC, to sequences of tokens (see
        `jdecouple.models.sequence`; the mask is all ones), with a classifier of LayerNorm and
        a dense layer on the summary `[batch, hidden]`. That of the first block, which embeds the
        patches, is their mean in either case.
    """
    require_int(1, num_classes=num_classes, hidden=hidden, depth=depth)
    require_one_of(POOLINGS, pooling=pooling)
    options: dict[str, Any] = {"init": init, "param_dtype": param_dtype, "rngs": rngs}
    token, layout = pooling == "class", LAYOUTS["standard"]
    patches = PatchEmbedding(
        image_size, channels, patch, hidden, class_token=token, drop=dropout, **options
    )
    blocks = encoder(
        hidden, depth, heads, feed_forward, layout=layout, pooling=pooling, drop=dropout, **options
    )
    readout = normed_classifier("linear", hidden, num_classes, layout, **options)
    return Model([patches, *blocks], readout)
