"""A small state to save, and what it must come back as."""

from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from jdecouple.checkpoint import Checkpointer


def small_state(value: float = 1.0) -> dict:
    return {
        "stage_0/params/layers/0/kernel": np.full((3, 4), value, np.float32),
        "stage_1/params/a.b": np.arange(6).astype(ml_dtypes.bfloat16),
        "stage_1/no rows": np.zeros((0, 3), np.float32),
        "step": np.asarray(value, np.uint32),
    }


def shapes(arrays):
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}


def assert_same(actual, expected):
    assert list(actual) == list(expected)
    for name, array in actual.items():
        wanted = np.asarray(expected[name])
        assert type(array) is np.ndarray
        assert (array.dtype, array.shape) == (wanted.dtype, wanted.shape)
        assert array.tobytes() == wanted.tobytes()


def filled(directory, steps=(100, 200, 300), **kwargs) -> Path:
    with Checkpointer(directory, **kwargs) as checkpointer:
        for step in steps:
            checkpointer.save(step, small_state(step), {"step": step})
    return Path(directory)
