"""Nets of the benchmarks in PyTorch train as ours do."""

import importlib
import math
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
SMALL = {
    "vgg8": {"width": 1 / 16},
    "resnet18": {"width": 1 / 16},
    "resnet20": {"width": 0.25, "depth": 8},
    "wrn": {"depth": 10},
    "lstm": {"hidden": 12, "depth": 1},
    "transformer": {"hidden": 12, "depth": 1},
    "vit": {"hidden": 12, "depth": 1},
    "mlp": {"hidden": 8, "depth": 2},
}


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "bench"))
    return importlib.import_module("peers")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bp", "deinforeg"])
@pytest.mark.parametrize("net", SMALL)
def test_nets_train_alike(peers, net, method):
    """Losses before any step and after one."""
    fixed = {"projector": "16-8", "batch": 4, "precision": "float32", "device": "cpu"}
    unset = dict.fromkeys(("width", "hidden", "depth"))
    set_ups = peers.build(net, method, {**fixed, **unset, **SMALL[net], "peers": ["eager"]})
    for _ in range(2):
        ours, theirs = (training.run(1) for training in set_ups.values())
        assert math.isfinite(ours)
        assert theirs == pytest.approx(ours, rel=1e-3)


def test_the_small_nets_are_those_of_the_table(peers):
    assert set(SMALL) == set(peers.NETS)
