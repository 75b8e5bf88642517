"""Neighbouring blocks of one program are traced once, which changes no number."""

import collections

import nets
import numpy as np
import pytest
from flax import nnx

import jdecouple as jd
from jdecouple.methods.routes import Unit
from jdecouple.pipeline import build

DATA = nets.batches()


def build_trainer(name: str, **options) -> jd.Trainer:
    model = nets.user_model(depth=5, dropout=0.2)
    return nets.build(name, model=model, num_stages=1, example=DATA[0], **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("greedy_exit", {}),
        pytest.param("deinforeg", {"remat": "stages"}, marks=pytest.mark.slow),
        pytest.param("dgl", {"num_classes": nets.CLASSES}, marks=pytest.mark.slow),
        pytest.param("al", {"microbatches": 2}, marks=pytest.mark.slow),
    ],
)
def test_no_bit_is_another(monkeypatch, name, options):
    """Not even of dropout, which each block draws by its own key."""
    sharer = build_trainer(name, **options)
    with monkeypatch.context() as patch:
        patch.setattr(build, "share_traces", tuple)
        other = build_trainer(name, **options)
    traced = collections.Counter()
    train = Unit.train

    def counted(self, *arguments):
        traced[self.index] += 1
        return train(self, *arguments)

    monkeypatch.setattr(Unit, "train", counted)
    (stage,) = sharer.stages
    sharing = [unit for unit in stage.units if unit.train_inline == stage.units[2].train_inline]
    assert len(sharing) >= 3
    found = nets.trained(sharer, DATA, 2)
    assert not traced.keys() & {unit.index for unit in sharing[1:]}
    there = nets.trained(other, DATA, 2)
    assert traced.keys() >= {unit.index for unit in sharing}
    assert nets.same_bits(nets.to_arrays(sharer, found[0]), nets.to_arrays(other, there[0]))
    np.testing.assert_equal(found[1], there[1])


class Block(nnx.Module):
    def __init__(self, factor, width=4, dtype=np.float32):
        self.factor = factor
        self.weight = nnx.Param(np.ones(width, dtype))

    def __call__(self, x):
        return x * self.factor * self.weight[...]


class Incomparable:
    __hash__ = object.__hash__

    def __eq__(self, other):
        raise TypeError

    def __rmul__(self, x):
        return x


@pytest.mark.parametrize(
    ("blocks", "dtypes", "alike"),
    [
        ((Block(2.0), Block(2.0)), (None, None), True),
        ((Block(2.0), Block(3.0)), (None, None), False),
        ((Block(2.0), Block(2.0, width=1)), (None, None), False),
        ((Block(2.0), Block(2.0, dtype=np.float16)), (None, None), False),
        ((Block(2.0), Block(2.0)), (None, "bfloat16"), False),
        ((Block(Incomparable()), Block(Incomparable())), (None, None), False),
    ],
)
def test_only_equal_programs_are_shared(blocks, dtypes, alike):
    one, other = (Unit.build(0, *pair) for pair in zip(blocks, (None, None), dtypes, strict=True))
    assert one.same_program(other) == alike
