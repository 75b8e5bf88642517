"""Layers that the built-in models and heads share, thin over those of `flax.nnx`.

`init` is one of

- "flax": LeCun-normal weights, zero biases;
- "torch": weights and biases uniform in +-1/sqrt(fan_in), PyTorch's default, which the papers'
  settings assume;
- "he": weights normal of variance 2/fan, zero biases. The fan is the outgoing one
  (`size * size * out_features`) of convolutions and the incoming one of dense layers, as in the
  code of Features Replay (arXiv 1807.04511).

`param_dtype` is the dtype of the parameters, and `rngs` the source of initial weights and of
dropout's keys. No layer fixes its compute dtype: it follows from the input and the parameters.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jdecouple._errors import require_number, require_one_of
from jdecouple.models import rows
from jdecouple.models.convolution import convolve
from jdecouple.models.kept import keep, keep_small

INITS = ("flax", "torch", "he")
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": nnx.gelu,
    "relu": nnx.relu,
    "sigmoid": nnx.sigmoid,
    "tanh": nnx.tanh,
}


def uniform(fan_in: int) -> Callable[..., jax.Array]:
    """Initializer that is uniform in +-1/sqrt(fan_in)."""
    bound = 1.0 / math.sqrt(fan_in)
    return functools.partial(jax.random.uniform, minval=-bound, maxval=bound)


def _initializers(init: str, fan_in: int, he_fan: int) -> dict[str, Any]:
    require_one_of(INITS, init=init)
    if init == "flax":
        return {}
    if init == "he":
        return {"kernel_init": nnx.initializers.normal(math.sqrt(2.0 / he_fan))}
    return {"kernel_init": uniform(fan_in), "bias_init": uniform(fan_in)}


class Linear(nnx.Linear):
    """Dense layer over the last axis, whose products and sums are over flat rows.

    On `[batch, length, features]` XLA's CPU backend would copy both operands of a gradient.
    """

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        """`[..., in_features] -> [..., out_features]`."""
        y = keep(x.reshape(-1, x.shape[-1]) @ self.kernel[...])
        return _add_bias(y, self.bias).reshape(*x.shape[:-1], -1)


class Conv(nnx.Conv):
    """Convolution over NHWC; its bias has a sum over rows as its gradient."""

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        """`[batch, height, width, in_features] -> [batch, height, width, out_features]`."""
        x, kernel = self.promote_dtype((x, self.kernel[...]))
        y = convolve(x, kernel, self.strides, self.padding)
        return _add_bias(keep(y), self.bias)


def _add_bias(y: jax.Array, bias: nnx.Param | None) -> jax.Array:
    return y if bias is None else y + rows.broadcast_rows(bias[...], y.shape)


def linear(
    in_features: int,
    out_features: int,
    *,
    use_bias: bool = True,
    init: str = "flax",
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
) -> Linear:
    """Dense layer `[..., in_features] -> [..., out_features]`."""
    return Linear(
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
) -> Conv:
    """Convolution with a kernel of odd `size`, zero-padded by `size // 2` on all sides, over NHWC.

    Of n pixels a side it leaves ceil(n / strides). "SAME" padding would do so too, but at stride 2
    and even n it would pad the far side alone, off the papers' alignment by one pixel.
    """
    pixels = size * size
    return Conv(
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

    It differs from flax's in these points:

    - The output has the dtype that input and parameters promote to. Flax's is at least that of its
      statistics, which would turn bfloat16 activations into float32.
    - The statistics are float64 where the parameters are, float32 otherwise.
    - The scale multiplies what is already normalised, so that a backward with kept activations may
      use another scale than the forward did (`current_weights` of the delayed route).
    - Its gradient is written out, see `jdecouple.models.rows.batch_norm`.
    """

    def __init__(self, num_features: int, *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        super().__init__(
            num_features, momentum=0.9, epsilon=1e-5, param_dtype=param_dtype, rngs=rngs
        )
        for statistic in (self.mean, self.var):
            dtype = jnp.promote_types(param_dtype, jnp.float32)
            statistic.set_value(statistic.get_value().astype(dtype))

    def __call__(self, x: jax.Array, use_running_average: bool | None = None) -> jax.Array:  # type: ignore[override]
        """Normalises `x` of shape `[batch, ..., num_features]`."""
        assert self.scale is not None
        assert self.bias is not None
        scale, bias = self.scale[...], self.bias[...]
        if use_running_average is None:
            use_running_average = self.use_running_average
        if use_running_average:
            factor = scale * jax.lax.rsqrt(self.var[...] + self.epsilon)
            y = x * factor + (bias - self.mean[...] * factor)
            return y.astype(jnp.result_type(x, scale))
        y, *batch = rows.batch_norm(x, scale, bias, self.epsilon)
        for running, now in zip((self.mean, self.var), batch, strict=True):
            moved = self.momentum * running[...] + (1 - self.momentum) * now
            running.set_value(moved)
        return y


def conv_norm(
    in_features: int,
    out_features: int,
    size: int = 3,
    *,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
    **options: Any,
) -> tuple[Conv, BatchNorm]:
    """Convolution and the BatchNorm behind it; the arguments are those of `conv`."""
    shared = {"param_dtype": param_dtype, "rngs": rngs}
    convolution = conv(in_features, out_features, size, **options, **shared)
    return convolution, BatchNorm(out_features, **shared)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, of size `num_features`.

    Like `BatchNorm` it keeps the input's dtype, and its scale multiplies what is already
    normalised. `unbiased` divides by the unbiased standard deviation plus 1e-6 (as the papers'
    transformer does) instead of the root of the variance plus 1e-5.
    """

    def __init__(
        self, num_features: int, *, unbiased: bool = False, param_dtype: Any = jnp.float32
    ):
        self.unbiased = unbiased
        self.scale = nnx.Param(jnp.ones(num_features, param_dtype))
        self.bias = nnx.Param(jnp.zeros(num_features, param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises `x` of shape `[..., num_features]`."""
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
        scale, bias = (rows.broadcast_rows(vector, y.shape) for vector in (scale, bias))
        return (y * scale + bias).astype(jnp.result_type(x, scale))


class Flatten(nnx.Module):
    """`[batch, ...] -> [batch, features]`, row-major."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Flattens all axes but the first."""
        return x.reshape(x.shape[0], -1)


class MaxPool(nnx.Module):
    """2x2 maximum pooling of stride 2 over NHWC; an odd last row or column is dropped.

    Its values and gradient are those of `nnx.max_pool`, whose gradient (a select and scatter) XLA
    runs many times slower on CPUs. Where maxima tie, the gradient goes to the first, row by row.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[batch, height, width, channels] -> [batch, height // 2, width // 2, channels]`."""
        return max_pool(x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2])


@jax.custom_vjp
def max_pool(x: jax.Array) -> jax.Array:
    """Maxima of `x` `[batch, 2 n, 2 m, channels]` over 2 x 2 pixels.

    What is kept for the gradient is which pixel was the largest, in one byte.
    """
    return functools.reduce(jnp.maximum, _corners(x))


def _corners(x: jax.Array) -> list[jax.Array]:
    return [x[:, row::2, column::2] for row in (0, 1) for column in (0, 1)]


def _max_pool_fwd(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    largest, *others = _corners(x)
    first = jnp.zeros(largest.shape, jnp.uint8)
    for number, corner in enumerate(others, start=1):
        first = jnp.where(corner > largest, jnp.uint8(number), first)
        largest = jnp.maximum(largest, corner)
    return largest, keep_small(first)


def _max_pool_bwd(first: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    pixels = [jnp.where(first == number, cotangent, 0) for number in range(4)]
    lines = [jnp.stack(pixels[row : row + 2], 3) for row in (0, 2)]
    batch, height, width, channels = cotangent.shape
    return (jnp.stack(lines, 2).reshape(batch, 2 * height, 2 * width, channels),)


max_pool.defvjp(_max_pool_fwd, _max_pool_bwd)


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
        """Applies both to `x` and adds."""
        return self.branch(x) + self.shortcut(x)


def perceptron(
    in_features: int,
    widths: Sequence[int],
    *,
    batch_norm: bool = False,
    activation: str = "relu",
    **options: Any,
) -> nnx.Sequential:
    """Flattens, then applies dense layers of the given widths, an activation between them.

    Without widths it is a bare flatten. With `batch_norm` BatchNorm precedes every activation. The
    options are `init`, `param_dtype` and `rngs`.
    """
    act = ACTIVATIONS[activation]
    norm = {key: value for key, value in options.items() if key != "init"}
    stack: list[Callable[..., jax.Array]] = [Flatten()]
    for i, width in enumerate(widths):
        if i > 0:
            stack += [BatchNorm(in_features, **norm), act] if batch_norm else [act]
        stack.append(linear(in_features, width, **options))
        in_features = width
    return nnx.Sequential(*stack)


def scaled(features: int, width: float) -> int:
    """`features * width`, rounded and at least 1; ValueError if `width` is no positive number."""
    require_number(positive=True, width=width)
    return max(1, round(features * width))


def require_pixels(image_size: int, halvings: int, what: str) -> None:
    """Raises ValueError if `halvings` would leave less than one pixel of `image_size`."""
    if image_size < 2**halvings:
        raise ValueError(
            f"image_size is {image_size}: {halvings} {what} need at least {2**halvings} pixels"
        )
