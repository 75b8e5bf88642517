"""Layers that the built-in models and heads share, thin over those of `flax.nnx`.

`init` is one of

- "flax": LeCun-normal weights, zero biases;
- "torch": weights and biases uniform in +-1/sqrt(fan_in), PyTorch's default, which the papers'
  settings assume;
- "he": weights normal of variance 2/fan, zero biases. The fan is the outgoing one
  (`size * size * out_features`) of convolutions and the incoming one of dense layers, as in the
  code of Features Replay (arXiv 1807.04511).

No layer fixes its compute dtype: it follows from the input and the parameters.
"""

import math
from collections.abc import Callable, Collection, Sequence
from numbers import Integral, Real
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

INITS = ("flax", "torch", "he")
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


def require_init(init: str) -> None:
    """Raise ValueError unless there is an `init` of that name."""
    if init not in INITS:
        raise ValueError(f"unknown init {init!r}: expected one of {', '.join(INITS)}")


def embedding_deviation(init: str, features: int) -> float:
    """Standard deviation of initial embeddings: 1 under "torch", else 1/sqrt(features)."""
    require_init(init)
    return 1.0 if init == "torch" else 1.0 / math.sqrt(features)


def _initializers(init: str, fan_in: int, he_fan: int) -> dict[str, Any]:
    require_init(init)
    if init == "flax":
        return {}
    if init == "he":
        return {"kernel_init": nnx.initializers.normal(math.sqrt(2.0 / he_fan))}
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
        **_initializers(init, in_features, in_features),
    )


def conv(
    in_features: int,
    out_features: int,
    size: int = 3,
    *,
    strides: int = 1,
    use_bias: bool = False,
    init: str = "flax",
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """Convolution with a kernel of odd `size`, zero-padded by `size // 2` on all sides, over NHWC.

    Of n pixels a side it leaves ceil(n / strides). "SAME" padding would do so too, but at stride 2
    and even n it would pad the far side alone, off the papers' alignment by one pixel.
    """
    pixels = size * size
    return nnx.Conv(
        in_features,
        out_features,
        (size, size),
        strides=strides,
        padding=size // 2,
        use_bias=use_bias,
        param_dtype=param_dtype,
        rngs=rngs,
        **_initializers(init, pixels * in_features, pixels * out_features),
    )


class BatchNorm(nnx.BatchNorm):
    """Batch normalisation over all axes but the last, momentum 0.9, epsilon 1e-5.

    Differs from flax's in three points: the output has the dtype that input and parameters promote
    to (flax's is at least that of its statistics, which would turn bfloat16 activations into
    float32); the statistics are float64 where the parameters are (float32 otherwise); and the scale
    multiplies what is already normalised, so that a backward with kept activations may use another
    scale than the forward did (`current_weights` of the delayed route).

    Args:
        num_features: Size of the last axis.
        param_dtype: Dtype of scale and bias.
        rngs: Source of keys (unused by the constant initial values, but asked for by flax).
    """

    def __init__(self, num_features: int, *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        super().__init__(
            num_features,
            momentum=0.9,
            epsilon=1e-5,
            param_dtype=param_dtype,
            promote_dtype=_normalize_only,
            rngs=rngs,
        )
        for statistic in (self.mean, self.var):
            dtype = jnp.promote_types(param_dtype, jnp.float32)
            statistic.set_value(statistic.get_value().astype(dtype))

    def __call__(self, x, use_running_average: bool | None = None, *, mask=None) -> jax.Array:
        """Normalise `x` of shape `[batch, ..., num_features]`."""
        assert self.scale is not None
        assert self.bias is not None
        y = super().__call__(x, use_running_average, mask=mask)
        y = y * self.scale[...] + self.bias[...]
        return y.astype(jnp.result_type(x, self.scale[...]))


def _normalize_only(operands: Any, /, *, dtype: Any = None, inexact: bool = True) -> Any:
    """Promotes input and statistics, and keeps scale and bias from flax's own formula."""
    x, mean, var, _, _ = operands
    return *promote_dtype((x, mean, var), dtype=dtype, inexact=inexact), None, None


def conv_norm(
    in_features: int,
    out_features: int,
    size: int = 3,
    *,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
    **options: Any,
) -> tuple[nnx.Conv, BatchNorm]:
    """Convolution and the BatchNorm behind it; the arguments are those of :func:`conv`."""
    shared = {"param_dtype": param_dtype, "rngs": rngs}
    convolution = conv(in_features, out_features, size, **options, **shared)
    return convolution, BatchNorm(out_features, **shared)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis.

    Like :class:`BatchNorm` it keeps the input's dtype, and its scale multiplies what is already
    normalised.

    Args:
        num_features: Size of the last axis.
        unbiased: Divide by the unbiased standard deviation plus 1e-6 (as the papers' transformer
            does) instead of the root of the variance plus 1e-5.
        param_dtype: Dtype of scale and bias.
    """

    def __init__(
        self, num_features: int, *, unbiased: bool = False, param_dtype: Any = jnp.float32
    ):
        self.unbiased = unbiased
        self.scale = nnx.Param(jnp.ones(num_features, param_dtype))
        self.bias = nnx.Param(jnp.zeros(num_features, param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise `x` of shape `[..., num_features]`."""
        scale, bias = self.scale[...], self.bias[...]
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = wide - wide.mean(-1, keepdims=True)
        squares = jnp.square(centred)
        if self.unbiased:
            variance = squares.sum(-1, keepdims=True) / max(x.shape[-1] - 1, 1)
            varies = variance > 0  # the root's gradient at 0 is infinite
            y = centred / (jnp.where(varies, jnp.sqrt(jnp.where(varies, variance, 1)), 0) + 1e-6)
        else:
            y = centred * jax.lax.rsqrt(squares.mean(-1, keepdims=True) + 1e-5)
        return (y * scale + bias).astype(jnp.result_type(x, scale))


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


class GlobalAveragePool(nnx.Module):
    """Mean over the pixels of NHWC."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[batch, height, width, channels] -> [batch, channels]`."""
        return x.mean((1, 2))


class Residual(nnx.Module):
    """`branch(x) + shortcut(x)`; the shortcut is the identity by default."""

    def __init__(self, branch: nnx.Module, shortcut: nnx.Module | None = None):
        self.branch = branch
        self.shortcut = nnx.Sequential() if shortcut is None else shortcut

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply both to `x` and add."""
        return self.branch(x) + self.shortcut(x)


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
        init: "flax", "torch" or "he".
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


def require_one_of(allowed: Collection[str], **values: Any) -> None:
    """Raise ValueError, naming it, for the first of `values` that is not `allowed`."""
    for name, value in values.items():
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def require_positive(**values: Any) -> None:
    """Raise ValueError, naming it, for the first of `values` that is no positive integer."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")


def scaled(features: int, width: float) -> int:
    """`features * width`, rounded and at least 1; ValueError if `width` is no positive number."""
    if isinstance(width, bool) or not isinstance(width, Real) or not 0 < width < math.inf:
        raise ValueError(f"width must be a positive number, got {width!r}")
    return max(1, round(features * width))


def require_pixels(image_size: int, halvings: int, what: str) -> None:
    """Raise ValueError if `halvings` would leave less than one pixel of `image_size`."""
    if image_size < 2**halvings:
        raise ValueError(
            f"image_size={image_size} is too small: {halvings} {what} need at least {2**halvings}"
        )
