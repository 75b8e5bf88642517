"""A small U-Net that tells how bright every pixel of a noisy digit is without the noise."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import nets
import numpy as np
from flax import nnx
from sklearn.datasets import load_digits

import jdecouple as jd

LEVELS = 3
WIDTH = 4
ANEW = "auglocal", "man", "lopt"
"""Methods that make a block anew, or what it reads: none that hands on more than one array."""
METHODS = [name for name in jd.methods.names() if name not in ("al", "infopro", *ANEW)]
"""Those with losses of positions."""
ARGUMENTS: dict[str, dict[str, Any]] = {
    "deinforeg": {"batch_norm": False, "positions": 4},
    "scpl": {"positions": 4},
    "predsim": {"positions": 4},
    "dgl": {"aux": "linear"},
}


class Down(nnx.Module):
    """A dense layer for every pixel, whose result it hands on, and one for every 2 x 2 pixels.

    These are convolutions that compile quickly. The first block tells where there is ink, too.
    """

    def __init__(self, channels: int, number: int, **options: Any):
        self.pixels = nnx.Linear(channels, WIDTH, **options)
        self.squares = nnx.Linear(4 * WIDTH, WIDTH, **options)
        self.is_first = number == 0
        self.skip = f"skip_{number}"
        self.outputs = (self.skip, "ink") if self.is_first else (self.skip,)

    def __call__(self, x: jax.Array) -> Any:
        y = nnx.tanh(self.pixels(x))
        batch, side, _, width = y.shape
        squares = y.reshape(batch, side // 2, 2, side // 2, 2, width).transpose(0, 1, 3, 2, 4, 5)
        more = {"ink": x > 0.5} if self.is_first else {}
        squares = squares.reshape(*squares.shape[:3], -1)
        return nnx.tanh(self.squares(squares)), {self.skip: y, **more}


class Up(nnx.Module):
    """Pixels become 2 x 2 pixels, and meet those that were handed on."""

    def __init__(self, number: int, **options: Any):
        self.pixels = nnx.Linear(2 * WIDTH, WIDTH, **options)
        self.is_last = number == 0
        self.skip = f"skip_{number}"
        self.inputs = (self.skip, "ink") if self.is_last else (self.skip,)

    def __call__(self, x: jax.Array, **handed: jax.Array) -> jax.Array:
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        y = nnx.tanh(self.pixels(jnp.concatenate([x, handed[self.skip]], axis=-1)))
        return y * jnp.where(handed["ink"], 1.0, 0.5) if self.is_last else y


class Middle(nnx.Module):
    """A dense layer between the two, which knows of no skip."""

    def __init__(self, **options: Any):
        self.pixels = nnx.Linear(WIDTH, WIDTH, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.tanh(self.pixels(x))


def model(param_dtype: Any = jnp.float64) -> jd.Model:
    """Five blocks: 8 x 8 pixels, 4, 2, 4, 8; and a dense layer for every pixel."""
    options = {"param_dtype": param_dtype, "rngs": nnx.Rngs(0)}
    downs = [Down(1, 0, **options), Down(WIDTH, 1, **options)]
    ups = [Up(1, **options), Up(0, **options)]
    readout = nnx.Linear(WIDTH, LEVELS, **options)
    return jd.Model([*downs, Middle(**options), *ups], readout)


def method(name: str) -> jd.methods.Method:
    """A method with small heads for labels of pixels."""
    return nets.method(name, **ARGUMENTS.get(name, {}))


@functools.cache
def batches(count: int = 3, size: int = 4, dtype: Any = np.float64) -> list[dict]:
    """Noisy digits `[size, 8, 8, 1]`, and the brightness of each pixel `[size, 64]`."""
    digits = load_digits().images[: count * size].reshape(count, size, 8, 8, 1)
    noise = np.random.default_rng(0).normal(size=digits.shape)
    return [
        {
            "x": (digits[i] / 16 + noise[i] / 4).astype(dtype),
            "label": (digits[i] * LEVELS // 17).astype(np.int32).reshape(size, 64),
        }
        for i in range(count)
    ]


def trainer(name: str, stages: int = 1, devices: int | None = None, **options: Any) -> jd.Trainer:
    """In float64; the skips cross every boundary."""
    options = {
        "model": model(),
        "optimizer": jd.optim.sgd(0.1, momentum=0.9),
        "mesh": jd.make_mesh(stages, devices=jax.devices()[: devices or stages]),
        "num_stages": stages,
        "boundaries": {1: (0,), 2: (0, 2), 3: (0, 1, 4)}[stages],
        "example": batches()[0],
        **options,
    }
    return jd.Trainer(options.pop("model"), method(name), options.pop("optimizer"), **options)
