"""Tiny text and patch models, and batches for them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jdecouple as jd
from jdecouple.models.sequence import pooled

CLASSES, VOCABULARY, LENGTH = 3, 11, 9
SIZES: dict[str, dict[str, Any]] = {
    "lstm": {},
    "transformer": {"heads": 2},
    "paper": {"heads": 2, "layout": "paper"},
    "vit": {"heads": 2, "patch": 4, "image_size": 8, "channels": 1},
}
TEXTS = ("lstm", "transformer", "paper")


def model(kind: str, **options: Any) -> jd.Model:
    """An embedding block and two (`depth`) others, of width 8."""
    name = "transformer" if kind == "paper" else kind
    options = {"hidden": 8, "depth": 2, "rngs": nnx.Rngs(0), **SIZES[kind], **options}
    if kind != "vit":
        options = {"vocabulary_size": VOCABULARY, "max_length": LENGTH, **options}
    return jd.models.get(name)(CLASSES, **options)


def texts(size: int = 6, length: int = 5, *, seed: int = 0) -> np.ndarray:
    """Token ids `[size, length]` of texts of 1 to `length` words, padded with 0."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, VOCABULARY, (size, length)).astype(np.int32)
    lengths = 1 + np.arange(size) % length
    return np.where(np.arange(length) < lengths[:, None], ids, 0).astype(np.int32)


def inputs(kind: str, *, dtype: Any = np.float64, seed: int = 0) -> np.ndarray:
    """What a model of this kind reads."""
    if kind == "vit":
        return np.random.default_rng(seed).normal(size=(6, 8, 8, 1)).astype(dtype)
    return texts(seed=seed)


def batches(kind: str, count: int = 3, *, dtype: Any = np.float64) -> list[dict]:
    """Labelled inputs, every class in each batch."""
    labels = np.arange(6, dtype=np.int32) % CLASSES
    return [{"x": inputs(kind, dtype=dtype, seed=i), "label": labels} for i in range(count)]


@nnx.jit
def outputs(modules: list[nnx.Module], x: jax.Array) -> list[Any]:
    """What every module outputs, each from the one before."""
    found = []
    for module in modules:
        x = module(x)
        found.append(x)
    return found


def everything(model: jd.Model, x: Any) -> tuple[list[dict], np.ndarray]:
    """Outputs of all blocks, and the logits."""
    *blocks, logits = outputs([*model.blocks, model.classifier], jnp.asarray(x))
    return blocks, np.asarray(logits)


def gradients(model: jd.Model, x: Any) -> list[jax.Array]:
    """Gradients of the squares of all summaries and logits together."""
    modules = [*model.blocks, model.classifier]

    @nnx.jit
    def run(modules: list[nnx.Module], x: jax.Array) -> Any:
        def loss(modules: list[nnx.Module]) -> jax.Array:
            return sum(jnp.sum(pooled(each) ** 2) for each in outputs(modules, x))

        return nnx.grad(loss)(modules)

    return jax.tree.leaves(run(modules, jnp.asarray(x)))
