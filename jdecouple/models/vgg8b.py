"""VGG8b, the net of local errors (arXiv 1901.06656): six convolutions and one dense layer."""

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
    norm: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
    options = {"init": init, **norm}
    activate = getattr(nnx, activation)

    def drop(*axes: int) -> list[nnx.Module]:
        return [nnx.Dropout(dropout, broadcast_dims=axes, rngs=rngs)] if dropout > 0 else []

    blocks = []
    before: list[Callable[..., jax.Array]] = []
    for item in _LAYOUT:
        if isinstance(item, str):
            before.append(layers.MaxPool())
        else:
            features = layers.scaled(item, width)
            layer = layers.conv_norm(channels, features, use_bias=True, **options)
            blocks.append(nnx.Sequential(*before, *layer, activate))
            before, channels = [*drop(1, 2)], features
    size = channels * (image_size >> pools) ** 2
    dense = layers.linear(size, hidden, **options), layers.BatchNorm(hidden, **norm)
    blocks.append(nnx.Sequential(*before, layers.Flatten(), *dense, activate))
    output = layers.linear(hidden, num_classes, **options)
    if zero_output:
        output.kernel.set_value(jnp.zeros_like(output.kernel.get_value()))
    return Model(blocks, nnx.Sequential(*drop(), output))
