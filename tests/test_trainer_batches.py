"""What the Trainer takes as a batch, and what it refuses with one line."""

import functools
import math
import warnings
from typing import Any

import chex
import jax.numpy as jnp
import nets
import numpy as np
import pytest

import jdecouple as jd
from jdecouple.pipeline.batch import LabelCheck

DATA = nets.batches()
X, LABEL = DATA[0]["x"], DATA[0]["label"]


@functools.cache
def trainer_of(name: str) -> jd.Trainer:
    return nets.build(name)


def spoiled(value: float) -> np.ndarray:
    x = X.copy()
    x[3, 4] = value
    return x


class Tensor:
    """What another framework's tensor offers; one that is not in host memory raises `error`."""

    def __init__(self, values: np.ndarray, error: Exception | None = None, *, dlpack: bool = False):
        self._values, self._error = np.asarray(values), error
        self.shape, self.dtype = values.shape, str(values.dtype)
        if dlpack:
            self.__class__ = OnDevice

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        if self._error:
            raise self._error
        return self._values

    def __int__(self) -> int:
        return int(self._values)


class OnDevice(Tensor):
    def __dlpack__(self, **options: Any) -> Any:
        return self._values.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._values.__dlpack_device__()


class Frame:
    """What a data frame offers: a shape, no dtype."""

    shape = X.shape

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return X.astype(np.float64)


ELSEWHERE = TypeError("can't convert device tensor to numpy")
ARRAY_LIKES = {
    "float64": (X.astype(np.float64), LABEL.astype(np.int64)),
    "big-endian": (X.astype(">f4"), LABEL.astype(">i4")),
    "lists": (X.tolist(), LABEL.tolist()),
    "lists of examples": (list(X), list(LABEL)),
    "tuples": (tuple(map(tuple, X.tolist())), tuple(LABEL)),
    "tensors": (Tensor(X), Tensor(LABEL)),
    "lists of tensors": ([Tensor(row) for row in X], [Tensor(label) for label in LABEL]),
    "tensors on a device": (
        Tensor(X, ELSEWHERE, dlpack=True),
        Tensor(LABEL, ELSEWHERE, dlpack=True),
    ),
    "a frame": (Frame(), LABEL),
    "device arrays": (jnp.asarray(X), jnp.asarray(LABEL)),
}


@pytest.mark.parametrize("case", ARRAY_LIKES)
def test_what_can_be_read_as_an_array_is_one(case):
    x, label = ARRAY_LIKES[case]
    batch = {"x": x, "label": label}
    trainer = trainer_of("bp")
    (part,) = trainer.put(batch).parts
    assert part["x"].dtype == jnp.float32
    np.testing.assert_array_equal(part["x"], X)
    np.testing.assert_array_equal(part["label"], LABEL)
    state, metrics = trainer.step(trainer.init(), batch)
    assert metrics["loss"] == trainer.step(trainer.init(), DATA[0])[1]["loss"]
    assert trainer.evaluate(state, batch) == trainer.evaluate(state, DATA[0])


def test_an_example_may_be_any_array_like():
    trainer = nets.build("bp", example={"x": X.tolist(), "label": Tensor(LABEL)})
    (part,), (wanted,) = (each.put(DATA[0]).parts for each in (trainer, trainer_of("bp")))
    chex.assert_trees_all_equal(part, wanted)
    chex.assert_trees_all_equal_shapes_and_dtypes(part, wanted)


BAD_BATCHES = {
    "not a mapping": (TypeError, [X, LABEL], ("'x'", "'label'", "list")),
    "no label": (TypeError, {"x": X}, ("'label'", "['x']")),
    "fractions as labels": (TypeError, {"x": X, "label": LABEL + 0.5}, ("label", "integers")),
    "fractions in a list": (TypeError, {"x": X, "label": [0.5] * 16}, ("label", "integers")),
    "flags as labels": (TypeError, {"x": X, "label": LABEL > 0}, ("label", "bool", "integers")),
    "no labels": (TypeError, {"x": X, "label": None}, ("label", "object", "numbers")),
    "nothing": (TypeError, None, ("NoneType", "'x' and 'label'")),
    "keys of two kinds": (TypeError, {**DATA[0], 3: X}, ("key 3", "text")),
    "texts": (TypeError, {"x": ["a"] * 16, "label": LABEL}, ("'x'", "numbers")),
    "objects": (TypeError, {"x": X.astype(object), "label": LABEL}, ("'x'", "object", "numbers")),
    "a generator": (TypeError, {"x": (row for row in X), "label": LABEL}, ("'x'", "object")),
    "rows of two lengths": (
        TypeError,
        {"x": [[0.0] * 20] * 15 + [[0.0]], "label": LABEL},
        ("'x'", "list", "cannot be read"),
    ),
    "a tensor with a gradient": (
        TypeError,
        {"x": Tensor(X, RuntimeError("use tensor.detach()")), "label": LABEL},
        ("'x'", "Tensor", "tensor.detach()"),
    ),
    "too large for float32": (
        ValueError,
        {"x": np.where(np.arange(20) == 4, 1e300, X.astype(np.float64)), "label": LABEL},
        ("'x'", "not finite", "example 0", "float32"),
    ),
    "too large for int32": (
        ValueError,
        {"x": X, "label": LABEL + np.int64(2**32)},
        ("'label'", "4294967296", "int32"),
    ),
    "NaN in a list": (
        ValueError,
        {"x": [[math.nan] * 20] * 16, "label": LABEL},
        ("'x'", "not finite"),
    ),
    "NaN in bfloat16": (
        ValueError,
        {"x": X.astype(jnp.bfloat16) * np.nan, "label": LABEL},
        ("'x'", "not finite"),
    ),
    "label on devices too high": (ValueError, {"x": X, "label": jnp.full(16, 5)}, ("label 5",)),
    "label on devices negative": (ValueError, {"x": X, "label": jnp.full(16, -1)}, ("label -1",)),
    "one-hot labels": (
        ValueError,
        {"x": X, "label": np.eye(5, dtype=np.int32)[LABEL]},
        ("label int32[16, 5]", "the example held label int32[16]"),
    ),
    "label too high": (ValueError, {"x": X, "label": np.full(16, 5)}, ("label 5", "0 to 4")),
    "label negative": (ValueError, {"x": X, "label": np.full(16, -1)}, ("label -1", "0 to 4")),
    "fewer rows than labels": (ValueError, {"x": X[:8], "label": LABEL}, ("(8, 20)", "16 labels")),
    "another batch size": (
        ValueError,
        {"x": X[:8], "label": LABEL[:8]},
        ("[8, 20]", "[16, 20]"),
    ),
    "another width": (ValueError, {"x": X[:, :7], "label": LABEL}, ("[16, 7]", "[16, 20]")),
    "one more entry": (ValueError, {**DATA[0], "mask": LABEL}, ("mask",)),
    "NaN": (ValueError, {"x": spoiled(math.nan), "label": LABEL}, ("'x'", "not finite", "3")),
    "infinity": (ValueError, {"x": spoiled(-math.inf), "label": LABEL}, ("not finite", "3")),
    "another dtype": (
        ValueError,
        {"x": X.astype(np.int32), "label": LABEL},
        ("int32", "float32"),
    ),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_a_bad_batch_gets_one_clear_line(case):
    kind, batch, words = BAD_BATCHES[case]
    trainer = trainer_of("bp")
    state = trainer.init()
    nets.assert_clear(kind, words, lambda: trainer.step(state, batch))
    trainer.step(state, DATA[0])  # the state is as good as before


def test_large_finite_numbers_are_no_error():
    trainer = trainer_of("bp")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # their sum overflows
        (part,) = trainer.put({"x": np.full((16, 20), 3e38, np.float32), "label": LABEL}).parts
    assert np.isfinite(part["x"]).all()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], ("no examples",)),
        ({"x": DATA[0]["x"], "label": np.full(16, 5)}, ("label 5", "0 to 4")),
        ({"x": np.full((16, 20), np.nan, np.float32), "label": DATA[0]["label"]}, ("not finite",)),
        ({"x": DATA[0]["x"][:, :7], "label": DATA[0]["label"]}, ("[batch, 7]", "[batch, 20]")),
        ({"x": DATA[0]["x"], "label": jnp.full(16, 5)}, ("label 5", "0 to 4")),
    ],
)
def test_evaluation_refuses_bad_data(data, words):
    trainer = trainer_of("bp")
    nets.assert_clear(ValueError, words, lambda: trainer.evaluate(trainer.init(), data))


def test_evaluation_refuses_what_holds_no_batches():
    trainer = trainer_of("bp")
    state = trainer.init()
    for data in (None, 3, trainer.put(DATA[0])):
        words = ("data is a", type(data).__name__, "batches")
        nets.assert_clear(TypeError, words, lambda data=data: trainer.evaluate(state, data))
    nets.assert_clear(TypeError, ("NoneType", "'x'"), lambda: trainer.evaluate(state, [None]))


def test_labels_on_devices_are_refused_wherever_batches_go():
    trainer = trainer_of("bp")
    state, batch = trainer.init(), {"x": X, "label": jnp.full(16, 5)}
    for use in (trainer.put, lambda batch: trainer.steps(state, [DATA[0], batch])):
        nets.assert_clear(ValueError, ("label 5", "0 to 4"), lambda use=use: use(batch))


class Late:
    """Labels that a device has yet to compute."""

    is_fully_addressable = True
    ready = False

    def is_ready(self) -> bool:
        return self.ready

    def is_deleted(self) -> bool:
        return False

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.array([0, 7])


def test_labels_that_a_device_has_yet_to_compute_are_looked_at_later():
    """Nothing waits for them: that would stall the pipeline."""
    check, late = LabelCheck(5), Late()
    check(late)
    check(LABEL)
    late.ready = True
    words = ("label 7", "0 to 4", "given before")
    nets.assert_clear(ValueError, words, lambda: check(LABEL))
    check(LABEL)  # told once
    check(Late())
    nets.assert_clear(ValueError, words, lambda: check.look(wait=True))


@pytest.mark.parametrize("parts", [1, 2])
def test_one_process_takes_in_the_whole_batch(parts):
    """What each of several takes in, tests/train/test_hosts.py sees in their results."""
    np.testing.assert_array_equal(trainer_of("bp").local_indices(16, parts), np.arange(16))
