"""Features, sites and gradients that the tests of heads share."""

import jax
import jax.numpy as jnp
from flax import nnx

from jdecouple import objectives
from jdecouple.objectives import Site

CLASSES = 5
LABELS = jnp.array([0, 1, 2, 3, 4, 0, 1, 2])
IMAGES = jax.random.normal(jax.random.key(1), (8, 9, 9, 2))
MAPS = jax.random.normal(jax.random.key(2), (8, 6, 6, 3))
VECTORS = jax.random.normal(jax.random.key(3), (8, 7))


def site(features=MAPS, index=1, num_blocks=4, *, num_classes=CLASSES, image=IMAGES, **options):
    def shape(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype)

    options = {"init": "torch", "param_dtype": features.dtype, **options}
    return Site(index, num_blocks, shape(features), num_classes, input=shape(image), **options)


def run(head, features=MAPS, labels=LABELS, image=IMAGES):
    """Output, gradient of the features, and gradients of the head's parameters."""
    graphdef, params, rest = nnx.split(head, nnx.Param, ...)
    scale = objectives.unit_range(image)

    @jax.jit
    def gradients(params, features):
        def loss(params, features):
            merged = nnx.merge(graphdef, params, rest, copy=True)
            output = merged(features, {"label": labels, "x": image, "image": scale})
            return output.loss, output

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, features)

    (in_params, in_features), output = gradients(params, features)
    return output, in_features, in_params
