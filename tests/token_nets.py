"""Tiny language models, their methods, and batches for them."""

from typing import Any

import jax.numpy as jnp
import nets
import numpy as np
from flax import nnx

import jdecouple as jd

VOCABULARY, CONTEXT = 11, 8
NETS: dict[str, dict[str, Any]] = {
    "gpt": {"heads": 2},
    "learned": {"heads": 2, "positions": "learned"},
    "reversible": {"heads": 2, "reversible": True},
    "lstm_lm": {},
}
METHODS = [name for name in jd.methods.names() if name not in ("al", "infopro")]
ARGUMENTS: dict[str, dict[str, Any]] = {
    "early_exit": {"branch": "norm"},
    "deinforeg": {"batch_norm": False, "positions": 3},
    "scpl": {"positions": 3},
    "predsim": {"positions": 3},
    "dgl": {"aux": "norm"},
    "man": {"aux": "norm"},
}


def model(kind: str = "gpt", **options: Any) -> jd.Model:
    """An embedding block and two (`depth`) others, of width 8."""
    name = "lstm_lm" if kind == "lstm_lm" else "gpt"
    options = {"hidden": 8, "depth": 2, "context": CONTEXT, **NETS[kind], **options}
    return jd.models.get(name)(VOCABULARY, **{"rngs": nnx.Rngs(0), **options})


def method(name: str, **arguments: Any) -> jd.methods.Method:
    """A method with small heads for labels of positions."""
    return nets.method(name, **{**ARGUMENTS.get(name, {}), **arguments})


def batches(count: int = 4, size: int = 4, *, padded: bool = True) -> list[dict]:
    """Rows with documents in them; some of the last labels are none."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        stream = rng.integers(0, VOCABULARY, (size, CONTEXT + 1)).astype(np.int32)
        batch = {"x": stream[:, :-1], "label": stream[:, 1:].copy()}
        if padded:
            batch["label"][-1, -3:] = -1
        found.append(batch)
    return found


def trainer(name: str, kind: str = "gpt", **options: Any) -> jd.Trainer:
    """A trainer in float64 on `batches()`."""
    net = options.pop("model", None) or model(kind, param_dtype=jnp.float64)
    options = {"example": batches(1)[0], "optimizer": jd.optim.sgd(0.1, momentum=0.9), **options}
    arguments = options.pop("arguments", {})
    return jd.Trainer(net, method(name, **arguments), options.pop("optimizer"), **options)
