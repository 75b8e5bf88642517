"""Reversible residual nets for small images; the stem is block 0, every unit one more block."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jdecouple._errors import require_int
from jdecouple.models import layers
from jdecouple.models.base import Model, bind
from jdecouple.models.cuts import cuttable
from jdecouple.models.resnet import units_per_group
from jdecouple.models.reversible import ReversibleUnit, joined, streams


class DownUnit(nnx.Module):
    """A unit that halves the sides of both streams and changes their channels; it has no inverse.

    (a, b) becomes (branch(c) + projection(b), c) with c = convolution and BatchNorm of a.

    Args:
        channels: Of one stream that it gets.
        features: Of one that it gives.
        **options: `init`, `param_dtype` and `rngs`.
    """

    def __init__(self, channels: int, features: int, **options: Any):
        self.first = nnx.Sequential(*layers.conv_norm(channels, features, strides=2, **options))
        second = layers.conv_norm(features, features, **options)
        self.branch = nnx.Sequential(nnx.relu, *second, nnx.relu)
        self.shortcut = nnx.Sequential(
            *layers.conv_norm(channels, features, 1, strides=2, **options)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[batch, n, n, 2 channels] -> [batch, ceil(n / 2), ceil(n / 2), 2 features]`."""
        first, second = streams(x)
        first = self.first(first)
        return joined(self.branch(first) + self.shortcut(second), first)


@cuttable
def revnet_of_groups(
    num_classes: int,
    *,
    groups: Sequence[tuple[int, int]],
    width: float = 1.0,
    image_size: int = 32,
    channels: int = 3,
    init: str = "flax",
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
) -> Model:
    """Reversible net of any groups of units, as in the code of PETRA (arXiv 2406.02052).

    The stem is a 3x3 convolution with BatchNorm and ReLU to both streams. A unit's branch is twice
    3x3 convolution, BatchNorm and ReLU on one of them. The first unit of every group but the first
    halves the sides, and alone has no inverse.

    Args:
        groups: Channels of a stream and number of units of each group.
        width: Factor on all channel counts; each is rounded and at least 1.

    Returns:
        A model between NHWC activations of both streams side by side, with a classifier of global
        average pooling over both and a dense layer.
    """
    require_int(1, num_classes=num_classes, image_size=image_size, channels=channels)
    layers.require_pixels(image_size, len(groups) - 1, "halvings")
    options = {"init": init, "param_dtype": param_dtype, "rngs": rngs}
    size = layers.scaled(groups[0][0], width)
    blocks: list[nnx.Module] = [
        nnx.Sequential(*layers.conv_norm(channels, 2 * size, **options), nnx.relu)
    ]
    for group, (features, count) in enumerate(groups):
        before, size = size, layers.scaled(features, width)
        for index in range(count):
            if group and not index:
                blocks.append(DownUnit(before, size, **options))
                continue
            parts = [(*layers.conv_norm(size, size, **options), nnx.relu) for _ in range(2)]
            blocks.append(ReversibleUnit(nnx.Sequential(*parts[0], *parts[1])))
    readout = layers.linear(2 * size, num_classes, **options)
    return Model(blocks, nnx.Sequential(layers.GlobalAveragePool(), readout))


@cuttable
def revnet(
    num_classes: int,
    *,
    depth: int = 20,
    width: float = 1.0,
    image_size: int = 32,
    channels: int = 3,
    init: str = "flax",
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
) -> Model:
    """Reversible form of `resnet`: n units in each of three groups of 16, 32 and 64 channels.

    Each of two streams has that many channels, see `jdecouple.models.revnet.revnet_of_groups`.

    Args:
        depth: 6n+2 layers with weights, 8 at least.
        width: Factor on all channel counts; each is rounded and at least 1.

    Returns:
        A model of 1 + 3n blocks, of which all have an inverse but the stem and the first of the
        last two groups.
    """
    count = units_per_group(depth, 2)
    return revnet_of_groups(
        num_classes,
        groups=[(16, count), (32, count), (64, count)],
        width=width,
        image_size=image_size,
        channels=channels,
        init=init,
        param_dtype=param_dtype,
        rngs=rngs,
    )


revnet18 = bind(
    revnet_of_groups,
    "revnet18",
    "RevNet-18 of PETRA (arXiv 2406.02052) for small images",
    groups=((64, 2), (128, 2), (256, 2), (512, 2)),
)
