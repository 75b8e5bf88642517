"""Metrics that cost nothing: what the schedule says, and what was in memory."""

import json
import math
import re
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from runs import cheap, lines

from jdecouple import optim
from jdecouple.methods.routes import accumulating
from jdecouple.train import config as configuration
from jdecouple.train import gauges, phases, rates
from jdecouple.train.loop import train_and_evaluate
from jdecouple.train.metrics import Interval, clock


def phase(start: int, blocks: int, schedule: Any) -> phases.Phase:
    trainer: Any = types.SimpleNamespace(model=types.SimpleNamespace(blocks=[None] * blocks))
    return phases.Phase(start, trainer, lambda batch: trainer, schedule)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    "values",
    [
        {"schedule": "cosine", "warmup_epochs": 1.0},
        {"schedule": "step_decay", "decay_epochs": (2.0,), "per_epoch": True},
        {"schedule": "constant"},
    ],
    ids=lambda values: values["schedule"],
)
def test_the_learning_rate_is_what_the_optimizer_steps_by(values, accumulate):
    config = configuration.default()
    config.optimizer.update({"name": "sgd", "learning_rate": 0.5, **values})
    schedule = rates.schedule(configuration.validate(config), 12, 4)
    optimizer = rates.optimizer(configuration.validate(config), schedule, accumulate)
    optimizer = accumulating(optimizer, accumulate)
    run = [phase(0, 1, rates.by_batches(schedule, accumulate))]
    weights = np.ones(1, np.float32)
    state = optimizer.init(weights)
    update = jax.jit(optimizer.update)
    used = set()
    for step in range(1, 13):
        moved, state = update(np.ones(1, np.float32), state, weights)
        told = gauges.learning_rates(run, step)
        if step % accumulate == 0:
            assert told == {"learning_rate": pytest.approx(-float(moved[0]), abs=1e-7)}
            used.add(told["learning_rate"])
        else:
            assert moved[0] == 0
    assert (len(used) > 1) == (values["schedule"] != "constant")


def test_every_block_that_grows_has_its_own():
    """Frozen blocks train no more; others go on, and those that are added begin anew."""
    cosine = optim.cosine(1.0, 0.0, 10)
    grown = [phase(0, 1, cosine), phase(4, 3, cosine)]
    first, last = float(cosine(6)), float(cosine(2))
    assert gauges.learning_rates(grown, 4) == {"learning_rate": float(cosine(3))}
    assert gauges.learning_rates(grown, 7) == {"learning_rate": last}
    assert gauges.learning_rates(grown, 4, freeze=False) == {"learning_rate": float(cosine(3))}
    assert gauges.learning_rates(grown, 7, freeze=False) == {
        "learning_rate": first,
        "block_0/learning_rate": first,
        "block_1/learning_rate": last,
        "block_2/learning_rate": last,
    }


def test_memory_is_that_of_devices_which_count_it(monkeypatch):
    [(name, most)] = gauges.memory().items()
    assert name == "process_memory_peak"
    assert 50e6 < most < 1e12
    status = Path("/proc/self/status")
    if status.exists():
        [kilobytes] = re.findall(r"VmHWM:\s*(\d+) kB", status.read_text())
        assert most == pytest.approx(int(kilobytes) * 1024, rel=0.05)
    devices = [
        types.SimpleNamespace(memory_stats=lambda peak=peak: peak and {"peak_bytes_in_use": peak})
        for peak in (None, 5, 7)
    ]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert gauges.memory() == {"device_memory_peak": 7.0}


@pytest.mark.slow
@pytest.mark.parametrize("freeze", [True, False])
def test_a_run_that_grows_tells_the_rates_of_its_blocks(tmp_path, freeze):
    values = {"growth__blocks": (1, 2), "growth__steps": (0, 4), "growth__freeze": freeze}
    values |= {"optimizer__schedule": "cosine", "gradient_norms": True, "steps": 8}
    train_and_evaluate(cheap(method__name="greedy_exit", **values), tmp_path)
    train = [line for line in lines(tmp_path) if line["split"] == "train"]
    told = [line["learning_rate"] for line in train]
    assert told == sorted(told, reverse=True) if not freeze else told[4] == told[0]
    for line in train:
        after = line["step"] > 4
        assert ("block_1/learning_rate" in line) == (after and not freeze)
        assert ("block_0/gradient_norm" in line) == (not after or not freeze)
        assert ("block_1/gradient_norm" in line) == after
        assert line["gradient_norm"] > 0


def test_a_mean_is_over_the_steps_that_have_it():
    """Within one line, a run may go on with norms, or without those that it had."""
    interval = Interval(0, clock(0.0))
    interval.add({"loss": 1.0, "a": 5.0})
    again = Interval(1, clock(0.0), json.loads(json.dumps(interval.means)))
    for norm in (math.nan, 2.0, 4.0):
        again.add({"loss": 2.0, "b": norm}, late=["b"])
    values = again.end(4, clock(0.0), 1)
    assert (values["loss"], values["a"], values["b"]) == (7 / 4, 5.0, 3.0)
    again.add({"b": math.nan}, late=["b"])
    again.add({"b": math.inf}, late=["b"])
    values = again.end(6, clock(0.0), 1)
    assert values["b"] == math.inf
