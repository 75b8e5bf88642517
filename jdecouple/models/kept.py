"""Names, for `jax.checkpoint`, of what is dear to compute again and so kept for the backward."""

import jax
from jax.ad_checkpoint import checkpoint_name

LARGE, SMALL = "large", "small"


def keep(x: jax.Array) -> jax.Array:
    """`x`, the output of a product or a convolution, or as large; it may wait on the host."""
    return checkpoint_name(x, LARGE)


def keep_small(x: jax.Array) -> jax.Array:
    """`x`, statistics or other arrays that are small beside activations."""
    return checkpoint_name(x, SMALL)
