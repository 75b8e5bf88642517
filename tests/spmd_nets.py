"""Models and trainers for the tests of the SPMD engine."""

from typing import Any

import jax
import jax.numpy as jnp
import nets
import numpy as np
from flax import nnx

import jdecouple as jd

STEPS = 20


class Ends(nnx.Module):
    """A table of vectors, to be read by the signs of the input: neither dense nor of its shape."""

    def __init__(self, rngs: nnx.Rngs):
        self.table = nnx.Embed(2, 8, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.table((x > 0).astype(jnp.int32)).mean(1)


def with_ends() -> jd.Model:
    """Six blocks: an embedding, four equal ones, and one that outputs the logits."""
    rngs = nnx.Rngs(0)
    options = {"param_dtype": jnp.float64, "rngs": rngs}
    middle = [nnx.Sequential(nnx.Linear(8, 8, **options), nnx.tanh) for _ in range(4)]
    return jd.Model([Ends(rngs), *middle, nnx.Linear(8, nets.CLASSES, **options)])


def residual() -> jd.Model:
    """A stem and the equal units of a ResNet's first group, four channels wide."""
    options = {"image_size": 8, "channels": 1, "param_dtype": jnp.float64}
    net = jd.models.resnet(nets.CLASSES, depth=20, width=0.25, rngs=nnx.Rngs(0), **options)
    readout = nnx.Linear(4, nets.CLASSES, param_dtype=jnp.float64, rngs=nnx.Rngs(1))
    return jd.Model(net.blocks[:4], nnx.Sequential(jd.models.layers.GlobalAveragePool(), readout))


def setting(net: str) -> tuple[jd.Model, list[dict], Any]:
    """Model, batches and augmentation."""
    if net == "vgg":  # convolutions and BatchNorm
        options = {"image_size": 8, "channels": 1, "init": "torch"}
        model = jd.models.vgg(
            nets.CLASSES, blocks="4|4|4|4", param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options
        )
        return model, nets.images(), jd.data.augment.get("basic", mean=[0.5], std=[0.25])
    if net == "residual":
        return residual(), nets.images(), jd.data.augment.get("none", mean=[0.5], std=[0.25])
    data = nets.batches(dtype=np.float64)
    if net == "mlp":
        return nets.mlp(param_dtype=jnp.float64), data, None
    if net == "ends":
        return with_ends(), data, None
    depth, dropout = {"norm": (4, 0.0), "dropout": (4, 0.2), "deep": (7, 0.2)}[net]
    return nets.user_model(depth=depth, dropout=dropout, param_dtype=jnp.float64), data, None


def build(
    name: str, net: str, stages: int = 1, data: int = 1, engine: str = "spmd", **options: Any
) -> jd.Trainer:
    model, batches, transform = setting(net)
    options = {
        # Its learning rate makes the optimiser's state hold a scalar.
        "optimizer": jd.optim.sgd(jd.optim.cosine(0.05, 0.0, 2 * STEPS), momentum=0.9),
        "mesh": jd.make_mesh(stages, data),
        "transform": transform,
        "example": batches[0],
        **options,
    }
    method = nets.method(name, **options.pop("arguments", {}))
    return jd.Trainer(model, method, options.pop("optimizer"), engine=engine, **options)
