"""Wide residual nets, pre-activated; the stem is block 0, every residual unit one more block."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jdecouple._errors import require_int, require_number
from jdecouple.models import layers
from jdecouple.models.base import Model, bind
from jdecouple.models.cuts import cuttable
from jdecouple.models.resnet import equal_parts, halving, units_per_group

# By depth and K: blocks at which parts 1 to K - 1 begin in the code of FDG (arXiv 1906.09108).
_FDG = {28: {2: (7,), 3: (5, 9), 4: (4, 7, 10)}}


class WideUnit(layers.Residual):
    """BatchNorm, ReLU, 3x3 convolution, twice, past a shortcut.

    Args:
        channels: Of what it gets.
        features: Channels of what it gives.
        strides: 1, or 2 to halve the sides.
        dropout: Share of activations dropped between the convolutions.
        **options: `init`, `param_dtype` and `rngs`.
    """

    def __init__(
        self,
        channels: int,
        features: int,
        strides: int,
        dropout: float,
        *,
        init: str = "flax",
        **norm: Any,
    ):
        conv = {"init": init, "use_bias": True, **norm}
        stack: list[Callable[..., jax.Array]] = [
            layers.BatchNorm(channels, **norm),
            nnx.relu,
            layers.conv(channels, features, **conv),
            layers.BatchNorm(features, **norm),
            nnx.relu,
        ]
        if dropout > 0:
            stack.append(nnx.Dropout(dropout, rngs=norm["rngs"]))
        stack.append(layers.conv(features, features, strides=strides, **conv))
        same = strides == 1 and channels == features
        shortcut = None if same else layers.conv(channels, features, 1, strides=strides, **conv)
        super().__init__(nnx.Sequential(*stack), shortcut)
        self.dropout = dropout

    def anew(self, received: Any, output: Any, **options: Any) -> "WideUnit":
        """A fresh unit, which halves the sides that are larger than those of `output`."""
        strides = halving(received, output)
        channels, features = received.shape[-1], output.shape[-1]
        return WideUnit(channels, features, strides, self.dropout, **options)


@cuttable
def wide_resnet(
    num_classes: int,
    *,
    depth: int = 28,
    widen: int = 10,
    dropout: float = 0.0,
    image_size: int = 32,
    channels: int = 3,
    init: str = "flax",
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
) -> Model:
    """WRN-depth-widen for CIFAR (arXiv 1605.07146).

    A 3x3 convolution of 16 channels, then n units in each of three groups of 16, 32 and 64 times
    `widen` channels, with stride 2 at the start of the last two. A unit is BatchNorm, ReLU, 3x3
    convolution, twice, past a shortcut that is the identity or, where the shape changes, a 1x1
    convolution of the unit's input. This is the net of the code of FDG (arXiv 1906.09108); in that
    of the WRN paper the stride is a unit's first convolution's, that shortcut follows the first
    BatchNorm and ReLU, and convolutions have no biases.

    Args:
        depth: 6n+4 convolutions, 10 at least; those of the three shortcuts count.
        widen: Factor on the channels of the groups.
        dropout: Share of activations dropped between the convolutions of a unit (after ReLU).
        init: As of all builders, see `jdecouple.models`; the code of FDG uses "torch".

    Returns:
        A model of 1 + 3n blocks between NHWC activations, with a classifier of BatchNorm, ReLU,
        global average pooling and a dense layer. Its splits are "infopro" into 2, 3, 4, 8 and 16,
        equal parts as of InfoPro's ResNets (no paper on local losses has published any for this
        net), and at depth 28 "fdg" into 2 to 4, as FDG's code, which are the same parts.
    """
    count = units_per_group(depth, 4)
    require_int(1, num_classes=num_classes, widen=widen, image_size=image_size, channels=channels)
    require_number(below=1, dropout=dropout)
    layers.require_pixels(image_size, 2, "halvings")
    norm = {"param_dtype": param_dtype, "rngs": rngs}
    options = {"init": init, **norm}
    blocks: list[nnx.Module] = [layers.conv(channels, 16, use_bias=True, **options)]
    channels = 16
    for group in range(3):
        features = 16 * 2**group * widen
        for index in range(count):
            strides = 2 if group > 0 and index == 0 else 1
            blocks.append(WideUnit(channels, features, strides, dropout, **options))
            channels = features
    classifier = nnx.Sequential(
        layers.BatchNorm(channels, **norm),
        nnx.relu,
        layers.GlobalAveragePool(),
        layers.linear(channels, num_classes, **options),
    )
    fdg = {"fdg": _FDG[depth]} if depth in _FDG else {}
    return Model(blocks, classifier, {"infopro": equal_parts(3 * count), **fdg})


wrn28_10 = bind(wide_resnet, "wrn28_10", "WRN-28-10", depth=28, widen=10)
