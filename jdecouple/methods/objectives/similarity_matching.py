"""Similarity matching, the loss of PredSim (arXiv 1901.06656, section 2)."""

import jax
import jax.numpy as jnp

from jdecouple.methods.objectives.base import at_least_float32, inner_products, normalized_rows


def similarity_matrix(x: jax.Array) -> jax.Array:
    """Cosine similarities between the examples of a batch, each centred over its features.

    Args:
        x: `[batch, ...]`. A feature map `[batch, height, width, channels]` of more than three
            channels is first reduced to the unbiased standard deviation of each channel over space;
            anything else is flattened.

    Returns:
        `[batch, batch]`, within [-1, 1], float32 at least. A constant example is similar to none
        (0, to itself too), and its gradient is zero.

    Raises:
        ValueError: `x` has one axis only, or a map of that kind has a single pixel.
    """
    if x.ndim < 2:
        raise ValueError(f"x is {x.shape}: [batch, ...] is needed")
    x = at_least_float32(x)
    if x.ndim == 4 and x.shape[-1] > 3:
        x = _spatial_deviation(x)
    x = x.reshape(x.shape[0], -1)
    # Shifted before centring, so that a constant row becomes exact zeros, not rounding noise whose
    # direction the root would blow up.
    x = x - jax.lax.stop_gradient(x[:, :1])
    rows = normalized_rows(x - jnp.mean(x, axis=1, keepdims=True), epsilon=1e-8)
    similarity = inner_products(rows)
    # Not jnp.clip: at the bounds, where rounding often puts the diagonal and collapsed batches, the
    # gradient has to pass whole, as in the released code.
    return jnp.where(jnp.abs(similarity) <= 1, similarity, jnp.sign(similarity))


def similarity_matching(z: jax.Array, labels: jax.Array, num_classes: int) -> jax.Array:
    """Mean squared error between the similarities of a batch and those of its labels.

    >>> z = jnp.array([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    >>> print(f"{similarity_matching(z, labels=jnp.array([0, 0, 1]), num_classes=2):.3f}")
    0.000

    Args:
        z: `[batch, ...]`, see `similarity_matrix`.
        labels: `[batch]`, int, in [0, num_classes).
        num_classes: Width of the one-hot labels.

    Returns:
        Scalar, mean over all batch x batch pairs, float32 at least.

    Raises:
        ValueError: The shapes do not fit.
    """
    if labels.shape != z.shape[:1]:
        raise ValueError(
            f"z is {z.shape} and labels {labels.shape}: [batch, ...] and [batch] are needed"
        )
    similarity = similarity_matrix(z)
    target = similarity_matrix(jax.nn.one_hot(labels, num_classes, dtype=similarity.dtype))
    return jnp.mean((target - similarity) ** 2)


def _spatial_deviation(x: jax.Array) -> jax.Array:
    """`[batch, height, width, channels] -> [batch, channels]`; gradient zero where it is 0."""
    if x.shape[1] * x.shape[2] < 2:
        raise ValueError(f"x is {x.shape}: a map of one pixel has no deviation over space")
    variance = jnp.var(x, axis=(1, 2), ddof=1)
    varies = variance > 0
    return jnp.where(varies, jnp.sqrt(jnp.where(varies, variance, 1)), 0)
