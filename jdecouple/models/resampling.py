"""Images to another size: means over bins, and linear interpolation."""

import jax
import jax.numpy as jnp
import numpy as np


def adaptive_average_pool(x: jax.Array, height: int, width: int) -> jax.Array:
    """Means over `height` x `width` bins of the pixels of NHWC.

    The bins are PyTorch's: of n pixels, bin i of N takes those from floor(i n / N) to
    ceil((i + 1) n / N) - 1. So neighbours share a pixel where N does not divide n, and pixels
    repeat where N is larger than n. The result has the dtype of `x`.
    """
    return _pooled(_pooled(x, 1, height), 2, width)


def bilinear(x: jax.Array, height: int, width: int) -> jax.Array:
    """Linear interpolation of NHWC in both directions, corner pixels on corner pixels.

    PyTorch's `interpolate` with `align_corners`: row i of H reads at i (n - 1) / (H - 1) of n rows.
    The result `[batch, height, width, channels]` has the dtype of `x`.
    """
    return _interpolated(_interpolated(x, 1, height), 2, width)


def _pooled(x: jax.Array, axis: int, bins: int) -> jax.Array:
    size = x.shape[axis]
    if size == bins:
        return x
    if size % bins == 0:
        split = (*x.shape[:axis], bins, size // bins, *x.shape[axis + 1 :])
        return x.reshape(split).mean(axis + 1)
    index, pixel = np.arange(bins)[:, None], np.arange(size)
    inside = (pixel >= index * size // bins) & (pixel < -(-(index + 1) * size // bins))
    return _mixed(x, axis, inside / inside.sum(1, keepdims=True))


def _interpolated(x: jax.Array, axis: int, points: int) -> jax.Array:
    size = x.shape[axis]
    if size == points:
        return x
    positions = np.linspace(0, size - 1, points)[:, None]
    return _mixed(x, axis, np.maximum(0, 1 - np.abs(positions - np.arange(size))))


def _mixed(x: jax.Array, axis: int, weights: np.ndarray) -> jax.Array:
    """`weights` `[to, from]` times one axis of `x`, at full precision on accelerators too."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    mixed = jnp.tensordot(
        x.astype(dtype), jnp.asarray(weights, dtype), (axis, 1), precision=jax.lax.Precision.HIGHEST
    )
    return jnp.moveaxis(mixed, -1, axis).astype(x.dtype)
