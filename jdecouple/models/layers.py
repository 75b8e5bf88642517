"""Layers that the built-in models and heads share, thin over those of `flax.nnx`.

`init` is "flax" (LeCun-normal weights, zero biases) or "torch" (weights and biases uniform in
+-1/sqrt(fan_in), PyTorch's default, which the papers' settings assume). No layer fixes its compute
dtype: it follows from the input and the parameters.
"""

import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

INITS = ("flax", "torch")
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": nnx.gelu,
    "relu": nnx.relu,
    "sigmoid": nnx.sigmoid,
    "tanh": nnx.tanh,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """Elementwise function called `name`; ValueError names those allowed."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _initializers(init: str, fan_in: int) -> dict[str, Any]:
    if init not in INITS:
        raise ValueError(f"unknown init {init!r}: expected one of {', '.join(INITS)}")
    if init == "flax":
        return {}
    bound = 1.0 / math.sqrt(fan_in)

    def uniform(key, shape, dtype):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return {"kernel_init": uniform, "bias_init": uniform}


def linear(
    in_features: int,
    out_features: int,
    *,
    use_bias: bool = True,
    init: str = "flax",
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """Dense layer `[..., in_features] -> [..., out_features]`."""
    return nnx.Linear(
        in_features,
        out_features,
        use_bias=use_bias,
        param_dtype=param_dtype,
        rngs=rngs,
        **_initializers(init, in_features),
    )


def conv3x3(
    in_features: int,
    out_features: int,
    *,
    use_bias: bool = False,
    init: str = "flax",
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """3x3 convolution of stride 1, zero-padded by 1, over NHWC."""
    return nnx.Conv(
        in_features,
        out_features,
        (3, 3),
        padding=1,
        use_bias=use_bias,
        param_dtype=param_dtype,
        rngs=rngs,
        **_initializers(init, 9 * in_features),
    )


class BatchNorm(nnx.BatchNorm):
    """Batch normalisation over all axes but the last, momentum 0.9, epsilon 1e-5.

    Differs from flax's in two points: the output has the dtype that input and parameters promote to
    (flax's is at least that of its statistics, which would turn bfloat16 activations into float32),
    and the statistics are float64 where the parameters are (float32 otherwise).

    Args:
        num_features: Size of the last axis.
        param_dtype: Dtype of scale and bias.
        rngs: Source of keys (unused by the constant initial values, but asked for by flax).
    """

    def __init__(self, num_features: int, *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        super().__init__(
            num_features, momentum=0.9, epsilon=1e-5, param_dtype=param_dtype, rngs=rngs
        )
        for statistic in (self.mean, self.var):
            dtype = jnp.promote_types(param_dtype, jnp.float32)
            statistic.set_value(statistic.get_value().astype(dtype))

    def __call__(self, x, use_running_average: bool | None = None, *, mask=None) -> jax.Array:
        """Normalise `x` of shape `[batch, ..., num_features]`."""
        assert self.scale is not None
        y = super().__call__(x, use_running_average, mask=mask)
        return y.astype(jnp.result_type(x, self.scale[...]))


class Flatten(nnx.Module):
    """`[batch, ...] -> [batch, features]`, row-major."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Flatten all axes but the first."""
        return x.reshape(x.shape[0], -1)


class MaxPool(nnx.Module):
    """2x2 maximum pooling of stride 2 over NHWC; an odd last row or column is dropped.

    Written as maxima of strided slices: same values as `nnx.max_pool`, whose gradient (a select and
    scatter) XLA runs several times slower on CPUs. Where two maxima tie, the gradient is shared.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[batch, height, width, channels] -> [batch, height // 2, width // 2, channels]`."""
        x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
        rows = jnp.maximum(x[:, ::2], x[:, 1::2])
        return jnp.maximum(rows[:, :, ::2], rows[:, :, 1::2])


def perceptron(
    in_features: int,
    widths: Sequence[int],
    *,
    batch_norm: bool = False,
    init: str = "flax",
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.Sequential:
    """Flatten, then dense layers with ReLU (after BatchNorm, if asked) between them.

    Args:
        in_features: Size of the flattened input.
        widths: Output size of each dense layer; empty for a bare flatten.
        batch_norm: Whether BatchNorm precedes every ReLU.
        init: "flax" or "torch".
        param_dtype: Dtype of the parameters.
        rngs: Source of initial weights.
    """
    stack: list[Callable[..., jax.Array]] = [Flatten()]
    for i, width in enumerate(widths):
        if i > 0:
            if batch_norm:
                stack.append(BatchNorm(in_features, param_dtype=param_dtype, rngs=rngs))
            stack.append(nnx.relu)
        stack.append(linear(in_features, width, init=init, param_dtype=param_dtype, rngs=rngs))
        in_features = width
    return nnx.Sequential(*stack)


def require_positive(**values: Any) -> None:
    """Raise ValueError, naming it, for the first of `values` that is no positive integer."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
