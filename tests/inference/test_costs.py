"""Operations and seconds of an answer at every exit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import batches, method, mlp

from jdecouple.inference import costs
from jdecouple.pipeline import build


@functools.cache
def built(name: str, **options) -> build.BuiltModel:
    (batch,) = batches(1)
    carry = build.abstract(batch)
    return build.build_units(mlp(**options), method(name), carry, None, 0, None)


def products(unit, *parts: str) -> int:
    """Two operations for every weight of the dense layers under these names."""
    values = {name: variable.get_value() for name, variable in unit.params.items()}
    return sum(2 * v.size for name, v in values.items() if v.ndim == 2 and name.startswith(parts))


def test_operations_are_two_for_every_weight_and_little_more():
    model = built("dgl", depth=3)
    found = costs.flops_by_exit(model.units, model.carries)
    wanted = np.cumsum([products(unit, "block", "head") for unit in model.units])
    np.testing.assert_allclose(found, wanted, rtol=0.1)
    assert (found >= wanted).all()


def test_operations_of_one_exit_at_the_end():
    model = built("bp")
    (found,) = costs.flops_by_exit(model.units, model.carries)
    wanted = sum(products(unit, "block", "head") for unit in model.units)
    assert wanted <= found <= 1.1 * wanted


def test_operations_of_an_answer_that_comes_down():
    """The blocks, the bridge of the last, and the decoders of all."""
    model = built("al")
    (found,) = costs.flops_by_exit(model.units, model.carries)
    wanted = sum(products(unit, "block", "head/decoder") for unit in model.units)
    wanted += products(model.units[-1], "head/bridge")
    assert wanted <= found <= 1.1 * wanted


def test_operations_do_not_depend_on_the_batch():
    model = built("dgl", depth=3)
    doubled = [
        {"x": jax.ShapeDtypeStruct((32, *carry["x"].shape[1:]), jnp.float32)}
        for carry in model.carries
    ]
    one, two = (costs.flops_by_exit(model.units, c) for c in (model.carries, doubled))
    assert len(one) == len(model.units)
    np.testing.assert_allclose(one, two, rtol=0.02)


def test_seconds_are_medians_of_all_but_the_first_call(monkeypatch):
    """On a clock that every call moves by what it takes: long at first, and once by chance."""
    takes = {0: [90, 1, 1, 8], 1: [90, 9, 3, 3], 2: [90, 2, 2, 2]}
    now, calls = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def answer(exit: int) -> jax.Array:
        now[0] += takes[exit][calls.count(exit)]
        calls.append(exit)
        return jnp.zeros(1)

    found = costs.seconds_by_exit(answer, 3, 10, runs=3)
    assert calls == [0, 1, 2] * 4
    np.testing.assert_allclose(found, [0.1, 0.3, 0.3])


@pytest.mark.parametrize("bad", [{"exits": 0}, {"examples": 0}, {"runs": 0}])
def test_seconds_of_nothing_are_refused(bad):
    with pytest.raises(ValueError, match="is 0: a whole number of at least 1 is needed"):
        costs.seconds_by_exit(print, **{"exits": 1, "examples": 1, **bad})
