"""A small tree to save, and what it must come back as."""

from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from jdecouple.checkpoint import Checkpointer


def small_tree(value: float = 1.0) -> dict:
    return {
        "stages": {
            "0": {"params": {"layers/0/kernel": np.full((3, 4), value, np.float32)}, "queue": {}},
            "1": {"params": {"a.b": np.arange(6).astype(ml_dtypes.bfloat16)}},
        },
        "step": np.uint32(value),
    }


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype), tree)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        e = np.asarray(e)
        assert type(a) is np.ndarray
        assert (a.dtype, a.shape) == (e.dtype, e.shape)
        assert a.tobytes() == e.tobytes()


def filled(directory, steps=(100, 200, 300), **kwargs) -> Path:
    with Checkpointer(directory, **kwargs) as checkpointer:
        for step in steps:
            checkpointer.save(step, small_tree(step), {"step": step})
    return Path(directory)
