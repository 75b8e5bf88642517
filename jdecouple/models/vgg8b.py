"""VGG8b, the net of local errors (arXiv 1901.06656): six convolutions and one dense layer."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jdecouple._errors import require_bool, require_int, require_number, require_one_of
from jdecouple.models import layers
from jdecouple.models.base import Model
from jdecouple.models.cuts import cuttable

_LAYOUT = (128, 256, "M", 256, 512, "M", 512, "M", 512, "M")


class VggLayer(nnx.Sequential):
    """Dropout and 2x2 poolings, a convolution or a dense layer, BatchNorm and the activation.

    Args:
        channels: Of the map that it gets.
        features: Channels, or numbers, of what it gives.
        drop: Share of the channels that is dropped.
        pools: Number of poolings.
        side: Pixels a side that a dense layer reads; 0: it is a convolution.
        activation: Its name in `nnx`.
        **options: `init`, `param_dtype` and `rngs`.
    """

    def __init__(
        self,
        channels: int,
        features: int,
        *,
        drop: float,
        pools: int,
        side: int,
        activation: str,
        **options: Any,
    ):
        stack: list[Callable[..., jax.Array]] = [*_dropout(drop, options["rngs"], 1, 2)]
        stack += [layers.MaxPool() for _ in range(pools)]
        if side:
            norm = {name: options[name] for name in ("param_dtype", "rngs")}
            dense = layers.linear(channels * side**2, features, **options)
            stack += [layers.Flatten(), dense, layers.BatchNorm(features, **norm)]
        else:
            stack += layers.conv_norm(channels, features, use_bias=True, **options)
        super().__init__(*stack, getattr(nnx, activation))
        self.drop, self.side, self.activation = drop, side, activation

    def anew(self, received: Any, output: Any, **options: Any) -> "VggLayer":
        """A fresh layer, which pools what is larger than `output`, or than a dense one reads."""
        channels, features, side = received.shape[-1], output.shape[-1], received.shape[1]
        if self.side:
            pools = next(n for n in itertools.count() if side >> n <= self.side)
        else:
            pools = int(side > output.shape[1])
        side = side >> pools if self.side else 0
        kind: dict[str, Any] = {"drop": self.drop, "activation": self.activation}
        return VggLayer(channels, features, pools=pools, side=side, **kind, **options)


def _dropout(rate: float, rngs: nnx.Rngs, *axes: int) -> list[nnx.Module]:
    return [nnx.Dropout(rate, broadcast_dims=axes, rngs=rngs)] if rate > 0 else []


@cuttable
def vgg8b(
    num_classes: int,
    *,
    width: float = 1.0,
    hidden: int = 1024,
    activation: str = "leaky_relu",
    dropout: float = 0.2,
    zero_output: bool = True,
    image_size: int = 32,
    channels: int = 3,
    init: str = "flax",
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
) -> Model:
    """VGG8b (arXiv 1901.06656) on square NHWC images, one layer a block.

    >>> model = vgg8b(10, width=1 / 32, hidden=16, rngs=nnx.Rngs(0))
    >>> len(model.blocks), model.blocks[0](jnp.ones((5, 32, 32, 3))).shape
    (7, (5, 32, 32, 4))

    A layer is a 3x3 convolution with a bias or, at the end, a dense layer, BatchNorm and the
    activation. What lies between two of them, dropout and in four places 2x2 maximum pooling,
    begins the block above: the published local losses read what no unit has been dropped from and
    no pixel pooled out of, and a block's output is what its loss reads. The numbers are those of
    the authors' code, where a layer drops and pools behind its loss; what goes from block to block
    is the map before the pooling.

    Arguments not listed are those of all builders, see `jdecouple.models`.

    Args:
        width: Factor on the channel counts 128, 256, 256, 512, 512, 512; each is rounded and at
            least 1.
        hidden: Width of the dense layer.
        activation: "leaky_relu", of slope 0.01 below 0, or "relu".
        dropout: Share dropped of the channels of a map (each whole), and of the dense layer's
            numbers.
        zero_output: Whether the weights of the output layer start at zero, as those of the authors'
            local losses do; under backpropagation theirs do not.

    Returns:
        A model of seven blocks, and a classifier of dropout and one dense layer.
    """
    require_int(1, num_classes=num_classes, hidden=hidden, image_size=image_size, channels=channels)
    require_one_of(("leaky_relu", "relu"), activation=activation)
    require_number(below=1, dropout=dropout)
    require_bool(zero_output=zero_output)
    pools = _LAYOUT.count("M")
    layers.require_pixels(image_size, pools, "poolings")
    options: dict[str, Any] = {"init": init, "param_dtype": param_dtype, "rngs": rngs}
    blocks: list[nnx.Module] = []
    kind: dict[str, Any] = {"drop": 0.0, "pools": 0, "activation": activation}
    for item in _LAYOUT:
        if isinstance(item, str):
            kind["pools"] = 1
            continue
        features = layers.scaled(item, width)
        blocks.append(VggLayer(channels, features, side=0, **kind, **options))
        channels, kind["drop"], kind["pools"] = features, dropout, 0
    side = image_size >> pools
    blocks.append(VggLayer(channels, hidden, side=side, **kind, **options))
    output = layers.linear(hidden, num_classes, **options)
    if zero_output:
        output.kernel.set_value(jnp.zeros_like(output.kernel.get_value()))
    return Model(blocks, nnx.Sequential(*_dropout(dropout, rngs), output))
