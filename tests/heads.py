"""Features, sites and gradients that the tests of heads share."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jdecouple.methods import objectives
from jdecouple.methods.objectives import BlockInfo

CLASSES = 5
LABELS = jnp.array([0, 1, 2, 3, 4, 0, 1, 2])
IMAGES = jax.random.normal(jax.random.key(1), (8, 9, 9, 2))
MAPS = jax.random.normal(jax.random.key(2), (8, 6, 6, 3))
VECTORS = jax.random.normal(jax.random.key(3), (8, 7))


def site(features=MAPS, index=1, num_blocks=4, *, num_classes=CLASSES, image=IMAGES, **options):
    def shape(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype)

    options = {"init": "torch", "param_dtype": features.dtype, **options}
    return BlockInfo(index, num_blocks, shape(features), num_classes, input=shape(image), **options)


def run(head, features=MAPS, labels=LABELS, image=IMAGES):
    """Output, gradient of the features, and gradients of the head's parameters."""
    message = {"label": labels, "x": image, "image": objectives.unit_range(image)}
    parts = nnx.split(head, nnx.Param, ...)
    (in_params, in_features), output = gradients(*parts, features, message)
    return output, in_features, in_params


@functools.partial(jax.jit, static_argnums=0)  # equal heads are compiled once
def gradients(graphdef, params, rest, features, message):
    def loss(params, features):
        output = nnx.merge(graphdef, params, rest, copy=True)(features, message)
        return output.loss, output

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, features)
