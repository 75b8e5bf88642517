"""Runs whose stages round what they send."""

import json

import pytest
import runs
from runs import tiny

from jdecouple.train.loop import train_and_evaluate

FEEDBACK = "stage_1/feedback/0"
BP = {"method__name": "bp", "method__projector": None, "num_stages": 2}
FDG = {**BP, "method__name": "fdg"}
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "method", [{"num_stages": 2}, {**BP, "microbatches": 2}, FDG], ids=["deinforeg", "bp", "fdg"]
)
def test_a_run_continues_to_the_bit(method, tmp_path):
    for folder, lengths in (("once", (8,)), ("twice", (4, 8))):
        for steps in lengths:
            train_and_evaluate(tiny(**method, wire="int8", steps=steps), tmp_path / folder)
    (_, once), (_, twice) = (runs.final_arrays(tmp_path / x) for x in ("once", "twice"))
    assert (FEEDBACK in once) == ("method__name" in method)
    assert once.keys() == twice.keys()
    assert all(once[name].tobytes() == twice[name].tobytes() for name in once)


def test_the_wire_may_change_in_between(tmp_path, capsys):
    for steps, wire in ((4, None), (8, "int8"), (12, "bfloat16"), (16, None)):
        train_and_evaluate(tiny(**BP, wire=wire, steps=steps), tmp_path)
        assert (FEEDBACK in runs.arrays_at(tmp_path, steps)) == (wire is not None)
    assert "config.wire is int8 from step 4 on, None before" in capsys.readouterr().out
    history = json.loads((tmp_path / "config.json").read_text())["history"]
    assert [each["new"] for each in history if each["key"] == "wire"] == ["int8", "bfloat16", None]


def test_feedback_begins_anew_in_other_microbatches(tmp_path):
    train_and_evaluate(tiny(**BP, wire="int8", steps=4), tmp_path)
    assert runs.arrays_at(tmp_path, 4)[FEEDBACK].shape[:2] == (8, 1)
    train_and_evaluate(tiny(**BP, wire="int8", steps=8, microbatches=2), tmp_path)
    assert runs.arrays_at(tmp_path, 8)[FEEDBACK].shape[:2] == (4, 2)
