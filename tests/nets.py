"""Tiny nets, batches and methods that the tests of the engine share."""

import contextlib
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jdecouple as jd
from jdecouple.methods.routes import Delayed, Synchronous
from jdecouple.models import layers

CLASSES = 5
FEATURES = 20
ARGUMENTS: dict[str, dict[str, Any]] = {
    "deinforeg": {"projector": "8"},
    "scpl": {"hidden": 16, "features": 8},
    "al": {"features": 8, "expansion": 2, "activation": "tanh"},
    "dgl": {"hidden": 32},
    "man": {"hidden": 32, "ema_decay": 0.6},
    "infopro": {"hidden": 16, "features": 8, "reconstruction": (0.1, 0.1), "task": (1.0, 1.0)},
    "adl": {"accumulate": 2},
    "2bw": {"accumulate": 3},
}

SYNCHRONOUS = [
    (stages, schedule)
    for stages in (1, 2, 3)
    for schedule in Synchronous.schedules
    if stages != 3 or schedule not in ("zbv", "dualpipe_v")  # whose stages are even in number
]
"""Numbers of stages and synchronous schedules for them."""


def method(name: str, **arguments: Any) -> jd.methods.Method:
    """A method with heads that compile quickly, and steps that come soon."""
    return jd.methods.get(name, **{**ARGUMENTS.get(name, {}), **arguments})


REPRESENTATIVES = ("bp", "deinforeg", "al", "fdg")
"""One method of each route, and one whose answer descends: a loss at the end, local losses, local
losses from the last block down, late errors.

Properties of the engine are tested with these; test_methods.py has every method.
"""


def marked(names: Any, fast: Any = REPRESENTATIVES) -> list[Any]:
    """Values for a test's parameters: those that are not in `fast` are slow."""
    slow = pytest.mark.slow
    return [name if name in fast else pytest.param(name, marks=slow) for name in names]


METHODS = pytest.mark.parametrize("name", marked(jd.methods.names()))
DELAYED = [name for name in jd.methods.names() if isinstance(method(name).route, Delayed)]
EXACT = [name for name in jd.methods.names() if name not in DELAYED]
"""Methods whose result does not depend on the number of stages."""
LOCAL = [name for name in jd.methods.names() if method(name).route.local]
FOLLOWING = [name for name in LOCAL if method(name).objective.follows_above]
"""Local methods whose heads follow the weights of the block above."""


def batches(count: int = 4, size: int = 16, *, dtype: Any = np.float32) -> list[dict]:
    """Labelled vectors `[size, FEATURES]`."""
    rng = np.random.default_rng(0)
    return [
        {
            "x": rng.normal(size=(size, FEATURES)).astype(dtype),
            "label": rng.integers(0, CLASSES, size).astype(np.int32),
        }
        for _ in range(count)
    ]


def images(count: int = 4, size: int = 16) -> list[dict]:
    """Labelled uint8 images `[size, 8, 8, 1]`."""
    rng = np.random.default_rng(0)
    return [
        {
            "x": rng.integers(0, 256, (size, 8, 8, 1), np.uint8),
            "label": rng.integers(0, CLASSES, size).astype(np.int32),
        }
        for _ in range(count)
    ]


def mlp(*, depth: int = 4, param_dtype: Any = jnp.float32, **options: Any) -> jd.Model:
    """The built-in perceptron, 20-24-...-5."""
    return jd.models.mlp(
        CLASSES,
        input_size=FEATURES,
        hidden=24,
        depth=depth,
        param_dtype=param_dtype,
        rngs=nnx.Rngs(0),
        **options,
    )


class UserBlock(nnx.Module):
    """A block that a user could have written: dense, BatchNorm, dropout of its own, tanh."""

    def __init__(self, size: int, hidden: int, *, dropout: float, param_dtype: Any, rngs: nnx.Rngs):
        self.dense = nnx.Linear(size, hidden, param_dtype=param_dtype, rngs=rngs)
        self.norm = layers.BatchNorm(hidden, param_dtype=param_dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        return nnx.tanh(self.dropout(self.norm(self.dense(x))))


def user_model(
    size: int = FEATURES,
    *,
    hidden: int = 12,
    depth: int = 4,
    dropout: float = 0.2,
    param_dtype: Any = jnp.float32,
) -> jd.Model:
    """Blocks with BatchNorm and dropout, and a classifier."""
    rngs = nnx.Rngs(0, dropout=7)
    options = {"param_dtype": param_dtype, "rngs": rngs}
    blocks = [
        UserBlock(size if i == 0 else hidden, hidden, dropout=dropout, **options)
        for i in range(depth)
    ]
    return jd.Model(blocks, nnx.Linear(hidden, CLASSES, **options))


def build(name: str, **options: Any) -> jd.Trainer:
    """A trainer of two blocks with BatchNorm on `batches()`; options override the rest."""
    options = {
        "model": mlp(depth=2, batch_norm=True),
        "optimizer": jd.optim.sgd(0.1, momentum=0.9),
        "example": batches(1)[0],
        **options,
    }
    return jd.Trainer(options.pop("model"), method(name), options.pop("optimizer"), **options)


def trained(trainer: jd.Trainer, data: list[dict], steps: int, state: Any = None) -> tuple:
    """State after `steps` batches, and the metrics of each step as floats."""
    state = trainer.init() if state is None else state
    metrics = []
    for step in range(steps):
        state, found = trainer.step(state, data[step % len(data)])
        metrics.append(found)
    return state, [{name: float(value) for name, value in each.items()} for each in metrics]


def rows(metrics: dict[str, Any]) -> list[dict[str, float]]:
    """The metrics of every batch from those of `Trainer.steps`, arrays [T]."""
    columns = {name: np.asarray(column).tolist() for name, column in metrics.items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def to_arrays(trainer: jd.Trainer, state: Any) -> dict[str, np.ndarray]:
    """Weights, statistics and optimiser states by name, on the host."""
    return {name: np.asarray(leaf) for name, leaf in trainer.to_arrays(state).items()}


def weights(trainer: jd.Trainer, state: Any) -> dict[str, np.ndarray]:
    """Weights alone, by name."""
    return {k: v for k, v in to_arrays(trainer, state).items() if "/params/" in k}


def largest_error(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """Largest difference of any entry, relative to 1 or to the entry where that is larger."""
    assert found.keys() == wanted.keys()

    def error(one: np.ndarray, other: np.ndarray) -> float:
        one, other = one.astype(np.float64), other.astype(np.float64)
        return float(np.max(np.abs(one - other) / np.maximum(1, np.abs(other)), initial=0))

    return max(error(found[k], wanted[k]) for k in wanted)


def same_bits(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> bool:
    """Whether all arrays are equal to the last bit."""
    assert found.keys() == wanted.keys()
    return all(found[k].tobytes() == wanted[k].tobytes() for k in wanted)


def assert_clear(kind: Any, words: tuple[str, ...], call: Any) -> None:
    """The call raises one line that says what was given and what is allowed."""
    with pytest.raises(kind) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 250
    for word in words:
        assert word in message, message


@contextlib.contextmanager
def nothing_compiles(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Any:
    """Fails if anything is compiled within, or a dense layer so much as traced."""
    call = layers.Linear.__call__
    with jax.log_compiles(), caplog.at_level("WARNING"), monkeypatch.context() as patch:
        patch.setattr(layers.Linear, "__call__", chex.assert_max_traces(call, n=0))
        yield
    compiled = [line for line in caplog.messages if "ompil" in line]
    assert not compiled, compiled


def logits_model() -> jd.Model:
    """Two blocks, of which the last outputs the logits."""
    rngs = nnx.Rngs(0)
    return jd.Model([nnx.Linear(FEATURES, 8, rngs=rngs), nnx.Linear(8, CLASSES, rngs=rngs)])


class Slow(nnx.Module):
    """A dense block that takes its time."""

    def __init__(self, size: int, hidden: int, *, milliseconds: int, rngs: nnx.Rngs):
        self.dense = nnx.Linear(size, hidden, rngs=rngs)
        self.rounds = milliseconds

    def __call__(self, x: jax.Array) -> jax.Array:
        def body(_, matrix):  # 33 million operations: about a millisecond on one core
            return jnp.tanh(matrix @ matrix)

        start = jnp.full((256, 256), 1e-3) + 0 * jax.lax.stop_gradient(x).sum()
        waste = jax.lax.stop_gradient(jax.lax.fori_loop(0, self.rounds, body, start))
        return nnx.relu(self.dense(x)) + 0 * waste[0, 0]


def slow_end(milliseconds: int) -> jd.Model:
    """Two blocks, of which the second is much slower."""
    rngs = nnx.Rngs(0)
    first = nnx.Sequential(nnx.Linear(FEATURES, 8, rngs=rngs), nnx.relu)
    last = Slow(8, 8, milliseconds=milliseconds, rngs=rngs)
    return jd.Model([first, last], nnx.Linear(8, CLASSES, rngs=rngs))
