"""Convolution over NHWC whose filter gradient is fast on CPUs.

XLA computes the gradient of a filter as a convolution with a window as large as the image, which
its CPU backend runs at a fraction of the speed of a matrix product. There it is formed here as
such a product, of the error with the input's patches, a few images at a time so that the patches
stay in the cache. Other platforms keep XLA's own: which one counts is known when a call is lowered
for its devices, not when it is traced (a stage may be on CPU devices of a process that has others).
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_LAYOUT = ("NHWC", "HWIO", "NHWC")
_PATCHES = 2**19  # numbers that the patches of one product may have, about: 2 MB in float32

Pair = tuple[int, int]


def conv_general_dilated(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Sequence[Pair],
    *,
    precision: Any = None,
    **unused: Any,
) -> jax.Array:
    """Drop-in for `jax.lax.conv_general_dilated` in `nnx.Conv`, without dilation and groups.

    Differentiable in reverse mode alone. Keeps `x` and `kernel` for the backward.

    Args:
        x: Images `[batch, height, width, channels]`.
        kernel: `[rows, columns, channels, features]`.
        strides: Along height and width.
        padding: Zeros before and after, along height and width.
        precision: As for `jax.lax.conv_general_dilated`.
        **unused: What `nnx.Conv` passes besides; its defaults are assumed.

    Returns:
        `[batch, height', width', features]`.
    """
    del unused
    (top, bottom), (left, right) = padding
    rows, columns = strides
    return _convolve(x, kernel, (rows, columns), ((top, bottom), (left, right)), precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolve(
    x: jax.Array, kernel: jax.Array, strides: Pair, padding: tuple[Pair, Pair], precision: Any
) -> jax.Array:
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=_LAYOUT, precision=precision
    )


def _forward(x, kernel, *options):
    return _convolve(x, kernel, *options), (x, kernel)


def _backward(strides, padding, precision, residuals, error):
    x, kernel = residuals
    plain = functools.partial(
        lax.conv_general_dilated,
        window_strides=strides,
        padding=padding,
        dimension_numbers=_LAYOUT,
        precision=precision,
    )
    (input_gradient,) = jax.linear_transpose(lambda x: plain(x, kernel), x)(error)
    filter_gradient = lax.platform_dependent(
        x,
        error,
        cpu=lambda x, error: _filter_gradient(x, error, kernel.shape, strides, padding, precision),
        default=lambda x, error: jax.linear_transpose(lambda k: plain(x, k), kernel)(error)[0],
    )
    return input_gradient, filter_gradient


_convolve.defvjp(_forward, _backward)


def _filter_gradient(
    x: jax.Array,
    error: jax.Array,
    shape: tuple[int, ...],
    strides: Pair,
    padding: tuple[Pair, Pair],
    precision: Any,
) -> jax.Array:
    """Gradient of a filter of `shape`, for the `error` of the output; sums in float32 at least."""
    batch, height, width, features = error.shape
    size = math.prod(shape[:-1])
    count = _images(batch, size * height * width)
    # Step t takes image t of each of `count` parts of the batch. Where the batch is sharded so are
    # the parts, and every device takes its own (a slice of neighbours would be gathered first).
    x, error = (a.reshape(count, batch // count, *a.shape[1:]) for a in (x, error))
    dtype = jnp.promote_types(x.dtype, jnp.float32)

    def add(step, total):
        images = lax.dynamic_index_in_dim(x, step, 1, keepdims=False).astype(dtype)
        errors = lax.dynamic_index_in_dim(error, step, 1, keepdims=False).astype(dtype)
        patches = jnp.pad(images, ((0, 0), *padding, (0, 0)))
        patches = _windows(patches, 2, shape[1], strides[1], width)
        patches = _windows(patches, 1, shape[0], strides[0], height)
        # Transposed in memory: left to itself the compiler hands the product a transposed view,
        # which takes twice as long.
        errors = lax.optimization_barrier(errors.reshape(-1, features).T)
        return total + jnp.matmul(errors, patches.reshape(-1, size), precision=precision)

    total = lax.fori_loop(0, batch // count, add, jnp.zeros((features, size), dtype))
    return total.T.reshape(shape).astype(x.dtype)


def _images(batch: int, size: int) -> int:
    """Images of one product: a power of two that divides the batch, at least 2 where it may be."""
    count = 1
    while batch % (2 * count) == 0 and (count == 1 or 2 * count * size <= _PATCHES):
        count *= 2
    return count


def _windows(x: jax.Array, axis: int, size: int, stride: int, count: int) -> jax.Array:
    """`count` windows along an axis, the `size` values of each side by side in the last axis."""
    span = stride * (count - 1) + 1
    slices = [lax.slice_in_dim(x, i, i + span, stride, axis) for i in range(size)]
    return jnp.concatenate(slices, axis=-1)
