"""Runs in float16: what they log and save, how they continue, and when they end."""

import json

import numpy as np
import pytest
import runs
from runs import cheap, lines, tiny

from jdecouple.methods.routes import loss_scale
from jdecouple.train.divergence import fault, left_out
from jdecouple.train.loop import NonFiniteError, train_and_evaluate
from jdecouple.train.metrics import Interval, clock

SHORT = {"steps": 8, "eval_every": 4, "dtype": "float16"}
NAN = float("nan")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("half")
    train_and_evaluate(tiny(**SHORT), folder)
    return folder


@pytest.mark.slow
def test_a_run_logs_its_scales_and_keeps_float32(finished):
    """A start in which the gradients overflow would be logged as well."""
    rows = [line for line in lines(finished) if line["split"] == "train"]
    assert len(rows) == 8
    assert rows[0]["block_0/loss_scale"] == loss_scale.START
    assert all(row[f"block_{i}/skipped"] in (0, 1) for row in rows for i in (0, 1))
    arrays = runs.final_arrays(finished)[1]
    assert {x.dtype for x in arrays.values() if x.dtype.kind == "f"} == {np.dtype(np.float32)}
    assert {name.split("/")[1] for name in arrays} == {"params", "stats", "opt", "loss_scale"}


@pytest.mark.slow
def test_a_run_continues_to_the_bit(finished, tmp_path):
    train_and_evaluate(tiny(**{**SHORT, "steps": 4}), tmp_path)
    train_and_evaluate(tiny(**SHORT), tmp_path)
    for name, array in runs.final_arrays(finished)[1].items():
        np.testing.assert_array_equal(runs.final_arrays(tmp_path)[1][name], array, strict=True)


@pytest.mark.slow
def test_the_dtype_may_change_in_between(tmp_path, capsys):
    for steps, dtype in ((4, "float32"), (8, "float16"), (12, "bfloat16")):
        train_and_evaluate(tiny(**{**SHORT, "steps": steps, "dtype": dtype}), tmp_path)
        arrays = runs.arrays_at(tmp_path, steps)
        assert ("block_0/loss_scale/scale" in arrays) == (dtype == "float16")
    assert "config.dtype is float16 from step 4 on, float32 before" in capsys.readouterr().out
    history = json.loads((tmp_path / "config.json").read_text())["history"]
    assert [each["new"] for each in history if each["key"] == "dtype"] == ["float16", "bfloat16"]


@pytest.mark.slow
def test_a_run_that_overflows_for_ever_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(loss_scale, "START", 4.0)
    values = {"method__name": "greedy_exit", "method__weights": (1.0, 1e9)}
    config = cheap(**SHORT, **values)
    with pytest.raises(NonFiniteError) as error:
        train_and_evaluate(config, tmp_path)
    said = str(error.value)
    assert said.startswith(
        "gradients of block_1 are not finite, with the least loss scale, at step 3;"
    )
    assert "\n" not in said
    rows = [line for line in lines(tmp_path) if line["split"] == "train"]
    assert [row["block_1/skipped"] for row in rows] == [1, 1]
    assert [row["block_1/loss_scale"] for row in rows] == [4, 2]


@pytest.mark.parametrize(
    ("row", "said", "owners"),
    [
        ({"loss": 1.0}, None, []),
        ({"loss": NAN, "block_1/loss": NAN}, "the loss of block_1 is nan", []),
        ({"loss": NAN}, "the loss of the model is nan", []),
        ({"loss": NAN, "skipped": 1.0, "loss_scale": 2.0}, None, [""]),
        ({"loss": NAN, "skipped": 0.0, "loss_scale": 2.0}, "the loss of the model is nan", []),
        ({"loss": 1.0, "skipped": 1.0, "loss_scale": 1.0}, "gradients of the model are", [""]),
        (
            {"loss": NAN, "block_0/loss": NAN, "block_0/skipped": 1, "block_0/loss_scale": 2.0},
            *(None, ["block_0/"]),
        ),
        (
            {
                "loss": NAN,
                "block_0/loss": 1.0,
                "block_0/skipped": 1,
                "block_0/loss_scale": 2,
                "block_1/loss": NAN,
                "block_1/skipped": 0,
                "block_1/loss_scale": 2,
            },
            *("the loss of block_1 is nan", ["block_0/"]),
        ),
        ({"loss": 1.0, "block_0/skipped": 1.0}, None, []),  # a term of the user's own
    ],
)
def test_what_a_smaller_scale_cannot_mend(row, said, owners):
    assert left_out(row) == owners
    found = fault(row)
    assert found == said if found is None or said is None else found.startswith(said)


def test_means_leave_out_what_overflowed():
    interval = Interval(0, clock(0.0))
    interval.add({"loss": 1.0, "skipped": 0, "norm": 2.0})
    interval.add({"loss": NAN, "skipped": 1, "norm": float("inf")}, finite=True)
    interval = Interval(0, clock(0.0), json.loads(json.dumps(interval.means)))
    interval.add({"loss": 3.0, "skipped": 1, "norm": float("inf")}, finite=True)
    values = interval.end(3, clock(0.0) + 1, 1)
    assert (values["loss"], values["norm"]) == (2.0, 2.0)
    assert values["skipped"] == pytest.approx(2 / 3)
    interval.add({"loss": NAN, "skipped": 1}, finite=True)
    assert "loss" not in interval.end(4, clock(0.0) + 2, 1)
