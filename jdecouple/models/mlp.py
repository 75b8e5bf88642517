"""Multilayer perceptron: every block one dense layer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jdecouple._errors import require_bool, require_int, require_one_of
from jdecouple.models import layers
from jdecouple.models.base import Model
from jdecouple.models.cuts import cuttable
from jdecouple.models.reversible import ReversibleUnit


@cuttable
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
    reversible: bool = False,
    init: str = "flax",
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
) -> Model:
    """Perceptron of `depth` blocks, each dense (, BatchNorm), activation.

    >>> model = mlp(10, input_size=64, hidden=32, depth=3, rngs=nnx.Rngs(0))
    >>> len(model.blocks), model.blocks[0](jnp.ones((5, 8, 8, 1))).shape
    (3, (5, 32))

    Arguments not listed are those of all builders, see `jdecouple.models`.

    Args:
        input_size: Numbers in one flattened input; `image_size**2 * channels` if None.
        hidden: Width of every block.
        depth: Number of blocks; the first also flattens its input.
        activation: "relu", "gelu", "tanh" or "sigmoid".
        batch_norm: Whether BatchNorm precedes the activation.
        reversible: Whether all blocks but the first have an inverse: each adds its layer of one
            half of the features, `hidden` / 2, to the other half (arXiv 2406.02052).

    Returns:
        A model whose blocks map `[batch, ...]` to `[batch, hidden]`.
    """
    require_int(1, image_size=image_size, channels=channels)
    input_size = image_size**2 * channels if input_size is None else input_size
    require_int(1, num_classes=num_classes, input_size=input_size, hidden=hidden, depth=depth)
    require_one_of(layers.ACTIVATIONS, activation=activation)
    norm = {"param_dtype": param_dtype, "rngs": rngs}
    options = {"init": init, **norm}
    require_bool(reversible=reversible)
    if reversible and hidden % 2:
        raise ValueError(f"hidden is {hidden}: two streams need an even number")
    blocks: list[nnx.Module] = []
    for i in range(depth):
        width = hidden // 2 if reversible and i else hidden
        stack: list[Callable[..., jax.Array]] = [layers.Flatten()] if i == 0 else []
        stack.append(layers.linear(input_size if i == 0 else width, width, **options))
        if batch_norm:
            stack.append(layers.BatchNorm(width, **norm))
        block = nnx.Sequential(*stack, layers.ACTIVATIONS[activation])
        blocks.append(ReversibleUnit(block) if reversible and i else block)
    return Model(blocks, layers.linear(hidden, num_classes, **options))
