"""Sums over leading axes, and operations whose gradients are such sums.

On CPUs such a sum is a product with a row of ones, on other devices a plain sum.
"""

import functools
import math

import jax
import jax.numpy as jnp

from jdecouple.models.kept import keep_small

_WIDTH = 8192  # numbers in a row of a product


@jax.custom_vjp
def sum_rows(x: jax.Array) -> jax.Array:
    """Sum of `x` `[..., features]` over all axes but the last, at least in float32.

    >>> sum_rows(jnp.ones((2, 3, 4)))
    Array([6., 6., 6., 6.], dtype=float32)
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    rows = x.reshape(-1, x.shape[-1]).astype(dtype)
    return jax.lax.platform_dependent(rows, cpu=_product, default=_sum)


def _product(rows: jax.Array) -> jax.Array:
    # XLA takes up to five times as long over a narrow product: several rows make one wide row.
    count, features = rows.shape
    fold = math.gcd(count, 2 ** (max(1, _WIDTH // features).bit_length() - 1))
    ones = jnp.ones((1, count // fold), rows.dtype)
    wide = rows.reshape(count // fold, fold * features)
    return (ones @ wide).reshape(fold, features).sum(0)


def _sum(rows: jax.Array) -> jax.Array:
    return rows.sum(0)


def _sum_rows_fwd(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return sum_rows(x), jnp.zeros((*x.shape[:-1], 0), x.dtype)


def _sum_rows_bwd(like: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    shape = (*like.shape[:-1], cotangent.shape[-1])
    return (broadcast_rows(cotangent.astype(like.dtype), shape),)


sum_rows.defvjp(_sum_rows_fwd, _sum_rows_bwd)


def mean_rows(x: jax.Array) -> jax.Array:
    """Mean of `x` `[..., features]` over all axes but the last, at least in float32."""
    return sum_rows(x) / (x.size // x.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def broadcast_rows(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`x` `[features]` for every row of `shape`, `(..., features)`; the gradient is `sum_rows`."""
    return jnp.broadcast_to(x, shape)


def _broadcast_rows_fwd(x: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    return jnp.broadcast_to(x, shape), jnp.zeros(0, x.dtype)


def _broadcast_rows_bwd(
    shape: tuple[int, ...], like: jax.Array, cotangent: jax.Array
) -> tuple[jax.Array]:
    return (sum_rows(cotangent).astype(like.dtype),)


broadcast_rows.defvjp(_broadcast_rows_fwd, _broadcast_rows_bwd)


@jax.custom_vjp
def multiply_rows(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x` `[..., in]` times `kernel` `[in, out]`.

    The kernel's gradient is computed as the kernel lies. JAX's own is `[out, in]` and then
    transposed. XLA makes one product of the two, but not where the rows lie on several devices: the
    sum over devices comes between them, and what reads it goes through memory column by column.
    The leading axes stay apart, because devices that share one which is not the first would have to
    gather it before it could be joined with others.
    """
    return x @ kernel


def _multiply_rows_fwd(x, kernel):
    return x @ kernel, (x, kernel)


def _multiply_rows_bwd(residuals, cotangent):
    x, kernel = residuals
    leading = tuple(range(x.ndim - 1))
    grad_x = jnp.einsum("...o,io->...i", cotangent, kernel)
    grad_kernel = jnp.tensordot(x, cotangent, (leading, leading))
    return grad_x.astype(x.dtype), grad_kernel.astype(kernel.dtype)


multiply_rows.defvjp(_multiply_rows_fwd, _multiply_rows_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def batch_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalises `x` `[..., features]` over all axes but the last, by its own statistics.

    The forward is one affine pass over `x` behind two sums, and so is the backward; between them
    `x` alone is kept, beside vectors. The backward takes its `scale` from the residuals as it is,
    so that it may be another than that of the forward (`current_weights` of the delayed route).

    Returns:
        The output in the dtype that `x` and `scale` promote to; mean and biased variance
        `[features]`, at least in float32, through which no gradient goes.
    """
    return _batch_norm_fwd(x, scale, bias, epsilon)[0]


def _batch_norm_fwd(x, scale, bias, epsilon):
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    wide = x.astype(dtype)
    mean = mean_rows(wide)
    variance = jnp.maximum(mean_rows(wide * wide) - mean * mean, 0)
    mean, root = keep_small(mean), keep_small(jax.lax.rsqrt(variance + epsilon))
    factor = scale * root
    y = (wide * factor + (bias - mean * factor)).astype(jnp.result_type(x, scale))
    return (y, mean, variance), (x, mean, root, scale)


def _batch_norm_bwd(epsilon, residuals, cotangents):
    x, mean, root, scale = residuals
    cotangent = cotangents[0].astype(mean.dtype)
    centred = x.astype(mean.dtype) - mean
    grad_bias = sum_rows(cotangent)
    grad_scale = sum_rows(cotangent * centred) * root
    count = x.size // x.shape[-1]
    inner = cotangent - grad_bias / count - centred * (root * grad_scale / count)
    grad_x = (scale * root) * inner
    return grad_x.astype(x.dtype), grad_scale.astype(scale.dtype), grad_bias.astype(scale.dtype)


batch_norm.defvjp(_batch_norm_fwd, _batch_norm_bwd)
