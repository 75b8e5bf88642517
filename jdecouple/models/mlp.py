"""Multilayer perceptron: every block one dense layer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jdecouple.models import layers
from jdecouple.models.base import Model


def mlp(
    num_classes: int,
    *,
    input_size: int | None = None,
    image_size: int = 32,
    channels: int = 3,
    hidden: int = 256,
    depth: int = 4,
    activation: str = "relu",
    batch_norm: bool = False,
    init: str = "flax",
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
) -> Model:
    """Perceptron of `depth` blocks, each dense (, BatchNorm), activation.

    Args:
        num_classes: Number of logits.
        input_size: Numbers in one flattened input; `image_size**2 * channels` if None.
        image_size: Height and width of an image, where the inputs are images.
        channels: Channels of an image.
        hidden: Width of every block.
        depth: Number of blocks; the first also flattens its input.
        activation: "relu", "gelu", "tanh" or "sigmoid".
        batch_norm: Whether BatchNorm precedes the activation.
        init: "flax", "torch" or "he", see :mod:`jdecouple.models.layers`.
        param_dtype: Dtype of the parameters.
        rngs: Source of initial weights.

    Returns:
        A model whose blocks map `[batch, ...]` to `[batch, hidden]`.

    Raises:
        ValueError: A size is not positive or a name is unknown.
    """
    layers.require_positive(
        num_classes=num_classes,
        image_size=image_size,
        channels=channels,
        hidden=hidden,
        depth=depth,
    )
    if input_size is None:
        input_size = image_size**2 * channels
    layers.require_positive(input_size=input_size)
    nonlinearity = layers.activation(activation)
    blocks = []
    for i in range(depth):
        stack: list[Callable[..., jax.Array]] = [layers.Flatten()] if i == 0 else []
        features = input_size if i == 0 else hidden
        stack.append(layers.linear(features, hidden, init=init, param_dtype=param_dtype, rngs=rngs))
        if batch_norm:
            stack.append(layers.BatchNorm(hidden, param_dtype=param_dtype, rngs=rngs))
        blocks.append(nnx.Sequential(*stack, nonlinearity))
    classifier = layers.linear(hidden, num_classes, init=init, param_dtype=param_dtype, rngs=rngs)
    return Model(blocks, classifier)
