"""Schedules are data: literal grids, the calls they become, and what is refused."""

import inspect
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

import jdecouple as jd
from jdecouple.schedules import Action, Call, Kind, Schedule, build, generators

DELAYED = ("delayed", "delayed_locked")
F, B, S = Kind.FORWARD, Kind.BACKWARD, Kind.STEP

GRIDS = {
    ("local", 1, 1): "stage 0 | F0 B0 S0",
    ("local", 2, 1): """
stage 0 | F0 B0 S0 .
stage 1 | .  F0 B0 S0""",
    ("local", 2, 2): """
stage 0 | F0 B0 F1 B1 S1 .
stage 1 | .  F0 B0 F1 B1 S1""",
    ("local", 3, 3): """
stage 0 | F0 B0 F1 B1 F2 B2 S2 .  .
stage 1 | .  F0 B0 F1 B1 F2 B2 S2 .
stage 2 | .  .  F0 B0 F1 B1 F2 B2 S2""",
    ("delayed", 1, 1): "stage 0 | F0 B0 S0",
    ("delayed", 2, 1): """
stage 0 | B-2 S-2 F0
stage 1 | F-1 B-1 S-1""",
    ("delayed", 4, 1): """
stage 0 | B-6 S-6 F0
stage 1 | B-5 S-5 F-1
stage 2 | B-4 S-4 F-2
stage 3 | F-3 B-3 S-3""",
    ("delayed_locked", 2, 1): """
stage 0 | F0  B-1 S-1 .
stage 1 | .   F0  B0  S0""",
    ("sequential", 1, 2): "stage 0 | F0 B0 F1 B1 S1",
    ("sequential", 2, 1): """
stage 0 | F0 .  .  B0 S0
stage 1 | .  F0 B0 S0 .""",
    ("sequential", 2, 2): """
stage 0 | F0 .  .  B0 F1 .  .  B1 S1
stage 1 | .  F0 B0 .  .  F1 B1 S1 .""",
    ("sequential", 3, 1): """
stage 0 | F0 .  .  .  .  B0 S0
stage 1 | .  F0 .  .  B0 S0 .
stage 2 | .  .  F0 B0 S0 .  .""",
}


@pytest.mark.parametrize(("name", "stages", "microbatches"), GRIDS)
def test_grid(name, stages, microbatches):
    schedule = build(name, stages, microbatches)
    assert str(schedule) == GRIDS[name, stages, microbatches].strip()


def test_columns_widen_with_the_microbatches():
    last = str(build("local", 2, 11)).splitlines()[1]
    assert last.startswith("stage 1 | .   F0  B0  F1 ")
    assert last.endswith("F10 B10 S10")


@pytest.mark.parametrize("name", jd.schedules.names())
def test_drawing_of_the_documentation_is_the_schedule(name):
    text = inspect.cleandoc(getattr(generators, name).__doc__)
    drawn = [line.strip() for line in text.splitlines() if line.strip().startswith("stage ")]
    stages, microbatches = (3, 1) if name in DELAYED else (2, 2)
    assert drawn[-stages:] == str(build(name, stages, microbatches)).splitlines()


@pytest.mark.parametrize("name", [name for name in jd.schedules.names() if name not in DELAYED])
@pytest.mark.parametrize("stages", [1, 2, 3, 5])
@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_every_action_stands_once(name, stages, microbatches):
    schedule = build(name, stages, microbatches)
    assert schedule.validate() is schedule
    pairs = list(itertools.product(range(stages), range(microbatches)))
    wanted = {Action(stage, kind, part) for stage, part in pairs for kind in (F, B)}
    wanted |= {Action(stage, S, microbatches - 1) for stage in range(stages)}
    assert len(schedule.actions) == len(wanted)
    assert set(schedule.actions) == wanted


def test_local_calls_train_a_microbatch_in_one_call():
    assert list(build("local", 2, 2).calls()) == [
        Call(0, (F, B), (0, 0)),
        Call(0, (F, B, S), (1, 1, 1)),
        Call(1, (F, B), (0, 0)),
        Call(1, (F, B, S), (1, 1, 1)),
    ]


def test_sequential_calls_join_the_turn_at_the_last_stage():
    assert list(build("sequential", 2, 2).calls()) == [
        Call(0, (F,), (0,)),
        Call(1, (F, B), (0, 0)),
        Call(0, (B,), (0,)),
        Call(0, (F,), (1,)),
        Call(1, (F, B, S), (1, 1, 1)),
        Call(0, (B, S), (1, 1)),
    ]


def test_one_stage_is_one_call():
    for name in jd.schedules.names():
        assert list(build(name, 1, 1).calls()) == [Call(0, (F, B, S), (0, 0, 0))]


# --- Delayed: one iteration that repeats -------------------------------------------------------


@pytest.mark.parametrize("name", DELAYED)
@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_every_stage_acts_once_of_each_kind(name, stages):
    schedule = build(name, stages)
    assert schedule.validate() is schedule
    found = sorted((action.stage, action.kind.value) for action in schedule.actions)
    assert found == sorted(itertools.product(range(stages), "FBS"))


def test_delayed_stage_is_one_call():
    assert list(build("delayed", 3).calls()) == [
        Call(0, (B, S, F), (-4, -4, 0)),
        Call(1, (B, S, F), (-3, -3, -1)),
        Call(2, (F, B, S), (-2, -2, -2)),
    ]


def test_locked_forwards_do_not_wait_for_backwards():
    assert list(build("delayed_locked", 3).calls()) == [
        Call(0, (F,), (0,)),
        Call(1, (F,), (0,)),
        Call(2, (F, B, S), (0, 0, 0)),
        Call(1, (B, S), (-1, -1)),
        Call(0, (B, S), (-2, -2)),
    ]


@pytest.mark.parametrize("name", jd.schedules.names())
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_what_waits_between_iterations(name, stages):
    """Played out: what is handed on and not yet used, by batch number."""
    schedule = build(name, stages)
    handed = {"messages": set(), "residuals": set(), "errors": set()}
    for iteration in range(4 * stages):
        for stage, kind, offset in schedule.actions:
            batch = iteration + offset
            if kind is F and batch >= 0:
                handed["messages"].discard((stage, batch))
                handed["residuals"].add((stage, batch))
                if stage + 1 < stages:
                    handed["messages"].add((stage + 1, batch))
            if kind is B and batch >= 0:
                handed["residuals"].remove((stage, batch))
                handed["errors"].discard((stage, batch))
                if stage > 0 and name != "local":
                    handed["errors"].add((stage - 1, batch))
    for stage in range(stages):
        for kind, batches in schedule.waiting(stage)._asdict().items():
            wanted = {(stage, iteration + 1 + each) for each in batches}
            assert {pair for pair in handed[kind] if pair[0] == stage} == wanted


@pytest.mark.parametrize(
    ("name", "latency", "depth"),
    [("local", 0, 0), ("sequential", 0, 0), ("delayed", 3, 6), ("delayed_locked", 0, 3)],
)
def test_latency_and_depth(name, latency, depth):
    schedule = build(name, 4)
    assert (schedule.latency, schedule.depth) == (latency, depth)
    assert schedule.overlapping == (name in DELAYED)
    assert not build(name, 1).overlapping


# --- What is refused ---------------------------------------------------------------------------


def sequential(*actions: Action, local: bool = False, microbatches: int = 1) -> Schedule:
    return Schedule("mine", 2, microbatches, actions, local=local)


GOOD = build("sequential", 2, 1).actions
F0, F1, B1, S1, B0, S0 = GOOD
BROKEN = {
    "stage too high": (sequential(Action(2, F, 0)), "F0 of stage 2 names a stage outside 0..1"),
    "stage negative": (sequential(Action(-1, F, 0)), "F0 of stage -1 names a stage outside 0..1"),
    "microbatch too high": (
        sequential(Action(0, F, 1)),
        "F1 of stage 0 names a microbatch outside 0..0",
    ),
    "twice": (sequential(F0, F0), "F0 of stage 0 stands twice"),
    "forward before its input": (sequential(F1), "F0 of stage 1 comes before F0 of stage 0"),
    "backward before forward": (sequential(B0), "B0 of stage 0 comes before F0 of stage 0"),
    "backward before the error": (
        sequential(F0, F1, B0),
        "B0 of stage 0 comes before B0 of stage 1",
    ),
    "step before backward": (sequential(F0, F1, S1), "S0 of stage 1 comes before B0 of stage 1"),
    "step before the last backward": (
        Schedule("mine", 1, 2, (Action(0, F, 0), Action(0, B, 0), Action(0, S, 1))),
        "S1 of stage 0 comes before B1 of stage 0",
    ),
    "forward missing": (sequential(), "F0 of stage 0 is missing"),
    "backward missing": (sequential(F0, F1, B1, S1), "B0 of stage 0 is missing"),
    "step missing": (sequential(F0, F1, B1, S1, B0), "S0 of stage 0 is missing"),
}


def late(*actions: tuple[int, Kind, int]) -> Schedule:
    return Schedule("mine", 2, 1, tuple(Action(*each) for each in actions), delayed=True)


LAST = ((1, F, -1), (1, B, -1), (1, S, -1))
BROKEN |= {
    "delayed: a batch to come": (
        late((0, F, 1)),
        "F1 of stage 0 names a batch that has not entered yet",
    ),
    "delayed: two forwards": (late((0, F, 0), (0, F, -1)), "F-1 of stage 0 stands twice"),
    "delayed: forward of what is never sent": (
        late((1, F, 0), (0, F, 0)),
        "F0 of stage 1 comes before F0 of stage 0",
    ),
    "delayed: error of what is not yet above": (
        late((0, B, -1), (0, S, -1), (0, F, 0), *LAST),
        "B-1 of stage 0 comes before B-1 of stage 1",
    ),
    "delayed: backward of a later batch": (
        late((0, F, -1), (1, F, -1), (1, B, -1), (1, S, -1), (0, B, 0)),
        "B0 of stage 0 comes before F0 of stage 0",
    ),
    "delayed: step before backward": (
        late((0, S, -2), (0, B, -2), (0, F, 0), *LAST),
        "S-2 of stage 0 comes before B-2 of stage 0",
    ),
    "delayed: step missing": (
        late((0, B, -2), (0, F, 0), *LAST),
        "S0 of stage 0 is missing",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_schedule_names_the_action(case):
    schedule, message = BROKEN[case]
    with pytest.raises(ValueError) as error:
        schedule.validate()
    assert str(error.value) == f"schedule mine: {message}"


def test_work_after_the_step_is_refused():
    """A microbatch that comes after the step would read weights of the next batch."""
    actions = (Action(0, F, 0), Action(0, B, 0), Action(0, F, 1), Action(0, B, 1), Action(0, S, 1))
    Schedule("mine", 1, 2, actions).validate()
    with pytest.raises(ValueError, match=r"S1 of stage 0 comes before B1"):
        Schedule("mine", 1, 2, (*actions[:2], actions[4], *actions[2:4])).validate()


def test_step_of_an_early_microbatch_is_refused():
    """A step carries the last microbatch."""
    actions = [Action(0, F, 0), Action(0, B, 0), Action(0, F, 1), Action(0, B, 1), Action(0, S, 0)]
    with pytest.raises(ValueError, match=r"S[01] of stage 0"):
        Schedule("mine", 1, 2, tuple(actions)).validate()


def test_local_stages_wait_for_no_error():
    actions = (F0, B0, S0, F1, B1, S1)
    sequential(*actions, local=True).validate()
    with pytest.raises(ValueError, match="B0 of stage 0 comes before B0 of stage 1"):
        sequential(*actions).validate()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("zigzag", 2, 1), ("'zigzag'", "local", "sequential")),
        (("local", 0, 1), ("num_stages is 0", "at least 1")),
        (("local", -2, 1), ("num_stages is -2", "at least 1")),
        (("sequential", 2, 0), ("num_microbatches is 0", "at least 1")),
        (("delayed", 2, 4), ("num_microbatches is 4", "delayed takes 1")),
    ],
)
def test_build_refuses(arguments, words):
    with pytest.raises(ValueError) as error:
        build(*arguments)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_schedules_import_no_jax():
    """The package on its own, with JAX, flax and NumPy out of reach."""
    script = """
import sys, types
for name in ("jax", "flax", "numpy", "optax"):
    sys.modules[name] = None
parent = types.ModuleType("jdecouple")
parent.__path__ = [sys.argv[1]]
sys.modules["jdecouple"] = parent
import importlib, pkgutil
package = importlib.import_module("jdecouple.schedules")
for module in pkgutil.iter_modules(package.__path__, "jdecouple.schedules."):
    importlib.import_module(module.name)
print(package.build("local", 2, 1))
"""
    folder = str(Path(jd.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", script, folder], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == str(build("local", 2, 1)) + "\n"
