"""Convolution whose filter's gradient reads its input once."""

import functools

import jax

_LAYOUT = ("NHWC", "HWIO", "NHWC")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """Cross-correlation of `x` `[batch, height, width, in]` with `kernel` `[n, n, in, out]`.

    On CPUs the gradient of the filter is a convolution of `x` and the cotangent with the batch as
    their channels. XLA fuses the transposition of `x` with what `x` was computed from, back to the
    last convolutions, and in a residual net through all sums before: every filter of a group
    computed the whole group anew. A condition on data keeps the transposition apart.

    Args:
        x: The input, padded by `padding` zeros on all sides.
        kernel: The filter.
        stride: Pixels between neighbouring outputs, along both axes.
        padding: Zeros on every side.

    Returns:
        `[batch, height, width, out]`, of ceil((height + 2 padding - n + 1) / stride) rows.

    >>> import jax.numpy as jnp
    >>> convolve(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1)), 2, 1)[0, :, :, 0]
    Array([[4., 6.],
           [6., 9.]], dtype=float32)
    """
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), [(padding, padding)] * 2, dimension_numbers=_LAYOUT
    )


def _convolve_fwd(x, kernel, stride, padding):
    return convolve(x, kernel, stride, padding), (x, kernel)


def _convolve_bwd(stride, padding, residuals, cotangent):
    x, kernel = residuals
    plain = functools.partial(convolve.fun, stride=stride, padding=padding)
    (grad_x,) = jax.linear_transpose(lambda x: plain(x, kernel), x)(cotangent)
    like = jax.ShapeDtypeStruct(kernel.shape, kernel.dtype)

    def grad_kernel(x, _either, cotangent):
        return jax.linear_transpose(lambda kernel: plain(x, kernel), like)(cotangent)[0]

    either = kernel[0, 0, 0, 0] > 0  # whichever it is: XLA does not know, and fuses nothing
    cpu = functools.partial(_grad_kernel, stride, padding, kernel.shape[0])
    return grad_x, jax.lax.platform_dependent(x, either, cotangent, cpu=cpu, default=grad_kernel)


def _grad_kernel(stride, padding, size, x, either, cotangent):
    def channels_first(x):
        return x.transpose(3, 1, 2, 0)

    turned = jax.lax.cond(either, channels_first, channels_first, x)
    pairs = zip(x.shape[1:3], cotangent.shape[1:3], strict=True)
    ends = [size + stride * (after - 1) - before - padding for before, after in pairs]
    gradient = jax.lax.conv_general_dilated(
        turned,
        cotangent.transpose(1, 2, 0, 3),
        (1, 1),
        [(padding, end) for end in ends],
        rhs_dilation=(stride, stride),
        dimension_numbers=_LAYOUT,
    )
    return gradient.transpose(1, 2, 0, 3)


convolve.defvjp(_convolve_fwd, _convolve_bwd)
