"""Schedules are data: literal grids, and the calls that they become."""

import inspect
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jdecouple as jd
from jdecouple.schedules import Action, Call, Kind, Schedule, build, generators

DELAYED = (
    *("delayed", "delayed_forward", "delayed_locked"),
    *("delayed_split", "delayed_forward_split", "delayed_locked_split"),
    "interleaved",
)
ZERO_BUBBLE = ("zb_h1", "zbv", "dualpipe_v")
PIPELINES = ("gpipe", "1f1b", "interleaved_1f1b", *ZERO_BUBBLE)
FUNCTIONS = {
    "1f1b": "one_forward_one_backward",
    "interleaved_1f1b": "interleaved",
    "interleaved": "interleaved_local",
}
F, B, W, S = Kind.FORWARD, Kind.BACKWARD, Kind.WEIGHT, Kind.STEP

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
    ("interleaved", 1, 1): "stage 0 | F0 B0 S0",
    ("interleaved", 3, 1): """
stage 0 | F0  B0  S0
stage 1 | F-1 B-1 S-1
stage 2 | F-2 B-2 S-2""",
    ("delayed", 1, 1): "stage 0 | F0 B0 S0",
    ("delayed", 2, 1): """
stage 0 | B-2 S-2 F0
stage 1 | F-1 B-1 S-1""",
    ("delayed", 4, 1): """
stage 0 | B-6 S-6 F0
stage 1 | B-5 S-5 F-1
stage 2 | B-4 S-4 F-2
stage 3 | F-3 B-3 S-3""",
    ("delayed_forward", 2, 1): """
stage 0 | F0  B-2 S-2
stage 1 | F-1 B-1 S-1""",
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
    ("gpipe", 1, 2): "stage 0 | F0 F1 B1 B0 S1",
    ("gpipe", 2, 1): """
stage 0 | F0 .  .  B0 S0
stage 1 | .  F0 B0 S0 .""",
    ("gpipe", 2, 3): """
stage 0 | F0 F1 F2 .  .  B2 B1 B0 S2
stage 1 | .  F0 F1 F2 B2 B1 B0 S2 .""",
    ("gpipe", 4, 2): """
stage 0 | F0 F1 .  .  .  .  .  .  B1 B0 S1
stage 1 | .  F0 F1 .  .  .  .  B1 B0 S1 .
stage 2 | .  .  F0 F1 .  .  B1 B0 S1 .  .
stage 3 | .  .  .  F0 F1 B1 B0 S1 .  .  .""",
    ("1f1b", 1, 2): "stage 0 | F0 B0 F1 B1 S1",
    ("1f1b", 2, 3): """
stage 0 | F0 F1 .  B0 F2 B1 .  B2 S2
stage 1 | .  F0 B0 F1 B1 F2 B2 S2 .""",
    ("1f1b", 4, 2): """
stage 0 | F0 F1 .  .  .  .  .  B0 .  B1 S1
stage 1 | .  F0 F1 .  .  .  B0 .  B1 S1 .
stage 2 | .  .  F0 F1 .  B0 .  B1 S1 .  .
stage 3 | .  .  .  F0 B0 F1 B1 S1 .  .  .""",
    ("1f1b", 4, 8): """
stage 0 | F0 F1 F2 F3 .  .  .  B0 F4 B1 F5 B2 F6 B3 F7 B4 .  B5 .  B6 .  B7 S7
stage 1 | .  F0 F1 F2 .  .  B0 F3 B1 F4 B2 F5 B3 F6 B4 F7 B5 .  B6 .  B7 S7 .
stage 2 | .  .  F0 F1 .  B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7 B6 .  B7 S7 .  .
stage 3 | .  .  .  F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7 S7 .  .  .""",
    ("interleaved_1f1b", 4, 1): """
stage 0 | F0 .  .  .  .  .  .  B0 S0 .
stage 1 | .  F0 .  .  .  .  B0 S0 .  .
stage 2 | .  .  F0 .  .  B0 .  .  .  S0
stage 3 | .  .  .  F0 B0 .  .  .  S0 .""",
    ("interleaved_1f1b", 4, 3): """
stage 0 | F0 F1 F2 .  .  .  .  .  .  .  .  B0 B1 B2 S2 .
stage 1 | .  F0 F1 F2 .  .  .  .  .  .  B0 B1 B2 S2 .  .
stage 2 | .  .  .  F0 F1 F2 B0 .  B1 .  B2 .  .  .  .  S2
stage 3 | .  .  .  .  F0 B0 F1 B1 F2 B2 .  .  .  .  S2 .""",
    ("interleaved_1f1b", 4, 4): """
stage 0 | F0 F1 .  .  F2 .  F3 .  .  B0 .  B1 .  .  .  .  B2 B3 S3 .
stage 1 | .  F0 F1 .  .  .  .  F2 B0 F3 B1 .  .  .  .  B2 B3 S3 .  .
stage 2 | .  .  F0 F1 .  B0 .  B1 F2 .  F3 .  .  B2 .  B3 .  .  .  S3
stage 3 | .  .  .  F0 B0 F1 B1 .  .  .  .  F2 B2 F3 B3 .  .  .  S3 .""",
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
    text = inspect.cleandoc(getattr(generators, FUNCTIONS.get(name, name)).__doc__)
    drawn = [line.strip() for line in text.splitlines() if line.strip().startswith("stage ")]
    stages, microbatches = re.search(r"K = (\d+)(?:, V = 2)?(?:, M = (\d+))?", text).groups()
    assert drawn == str(build(name, int(stages), int(microbatches or 1))).splitlines()


@pytest.mark.parametrize("name", [name for name in jd.schedules.names() if name not in DELAYED])
@pytest.mark.parametrize("microbatches", [1, 2, 4, 7])
def test_every_action_stands_once(name, microbatches):
    kinds = (F, B, W) if name in ZERO_BUBBLE else (F, B)
    for stages in (1, 2, 3, 4, 5, 8):
        if name not in jd.schedules.names(stages):
            continue
        schedule = build(name, stages, microbatches)
        assert schedule.validate() is schedule
        assert schedule.splits == (W in kinds)
        pairs = list(itertools.product(range(stages), range(microbatches)))
        wanted = {Action(stage, kind, part) for stage, part in pairs for kind in kinds}
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
        schedule = build(name, 1, 1)
        kinds = (F, B, W, S) if schedule.splits else (F, B, S)
        assert list(schedule.calls()) == [Call(0, kinds, (0,) * len(kinds))]


def test_names():
    """What the documentation promises."""
    assert set(jd.schedules.names()) == {"local", "sequential", *PIPELINES, *DELAYED}


# --- Pipelines: what the rows of devices do, merged into one order of dispatch ------------------


def test_gpipe_calls_send_before_they_step():
    """Joined are only the turn at the last stage and the end of the first: neither sends."""
    assert list(build("gpipe", 2, 2).calls()) == [
        Call(0, (F,), (0,)),
        Call(0, (F,), (1,)),
        Call(1, (F,), (0,)),
        Call(1, (F, B), (1, 1)),
        Call(0, (B,), (1,)),
        Call(1, (B,), (0,)),
        Call(0, (B, S), (0, 1)),
        Call(1, (S,), (1,)),
    ]


def test_1f1b_calls():
    assert list(build("1f1b", 2, 2).calls()) == [
        Call(0, (F,), (0,)),
        Call(0, (F,), (1,)),
        Call(1, (F, B), (0, 0)),
        Call(0, (B,), (0,)),
        Call(1, (F, B), (1, 1)),
        Call(0, (B, S), (1, 1)),
        Call(1, (S,), (1,)),
    ]


def ticks(schedule: Schedule) -> dict[Action, int]:
    """The tick of each action, read off the printed grid."""
    found = {}
    for stage, line in enumerate(str(schedule).splitlines()):
        for tick, cell in enumerate(line.split("|")[1].split()):
            if cell != ".":
                found[Action(stage, Kind(cell[0]), int(cell[1:]))] = tick
    return found


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("stages", [1, 2, 4, 6])
@pytest.mark.parametrize("microbatches", [1, 2, 3, 5, 8])
def test_dispatch_follows_the_ticks(name, stages, microbatches):
    schedule = build(name, stages, microbatches)
    at = ticks(schedule)
    assert at.keys() == set(schedule.actions)
    slots = [(tick, schedule.device_group(action.stage)) for action, tick in at.items()]
    assert len(set(slots)) == len(slots)
    begins = [
        (at[call.stage, call.kinds[0], call.microbatches[0]], schedule.device_group(call.stage))
        for call in schedule.calls()
    ]
    assert begins == sorted(begins)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("chunks", [2, 3, 4])
def test_interleaved_is_as_short_as_it_can_be(num_rows, chunks):
    """Also where M is no multiple of P: a row works but for P - 1 forwards and backwards."""
    for microbatches in range(num_rows, 4 * num_rows + 1):
        schedule = build("interleaved_1f1b", num_rows * chunks, microbatches, chunks=chunks)
        last = max(tick for action, tick in ticks(schedule).items() if action.kind is B)
        assert last + 1 == 2 * (microbatches * chunks + num_rows - 1)


@pytest.mark.parametrize(("num_rows", "chunks", "microbatches"), [(2, 2, 4), (4, 2, 8), (3, 3, 5)])
def test_interleaved_row_holds_what_it_warms_up_with(num_rows, chunks, microbatches):
    schedule = build("interleaved_1f1b", num_rows * chunks, microbatches, chunks=chunks)
    longest = num_rows + microbatches % num_rows
    for row in range(num_rows):
        changes = {F: 1, B: -1, S: 0}
        kinds = [
            action.kind for action in schedule.actions if schedule.device_group(action.stage) == row
        ]
        live = list(itertools.accumulate(changes[kind] for kind in kinds))
        warm_up = 2 * (num_rows - 1 - row) + (chunks - 1) * longest
        assert max(live) == min(chunks * microbatches, warm_up + 1)


def test_rows_and_chunks():
    schedule = build("interleaved_1f1b", 6, 3)
    assert (schedule.placement, schedule.num_device_groups) == ((0, 1, 2, 0, 1, 2), 3)
    assert [schedule.device_group(stage) for stage in range(6)] == [0, 1, 2, 0, 1, 2]
    assert build("interleaved_1f1b", 6, 3, chunks=3).num_device_groups == 2
    assert [build("interleaved_1f1b", k).num_device_groups for k in (1, 2, 3, 4, 5)] == [
        1,
        2,
        3,
        2,
        5,
    ]
    assert build("interleaved", 6, chunks=3).placement == (0, 1, 0, 1, 0, 1)
    for name in set(jd.schedules.names()) - {
        "interleaved_1f1b",
        "interleaved",
        "zbv",
        "dualpipe_v",
    }:
        assert build(name, 4).num_device_groups == 4
        assert [build(name, 4, chunks=1).device_group(stage) for stage in range(4)] == [0, 1, 2, 3]


def test_one_chunk_is_1f1b():
    plain = build("1f1b", 4, 5)
    assert build("interleaved_1f1b", 4, 5, chunks=1).actions == plain.actions


# --- Delayed: one iteration that repeats -------------------------------------------------------


@pytest.mark.parametrize("name", DELAYED)
@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_every_stage_acts_once_of_each_kind(name, stages):
    schedule = build(name, stages)
    assert schedule.validate() is schedule
    found = sorted((action.stage, action.kind.value) for action in schedule.actions)
    kinds = "FBWS" if "split" in name else "FBS"
    assert found == sorted(itertools.product(range(stages), kinds))


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
    handed = {"carries": set(), "residuals": set(), "errors": set()}
    for iteration in range(4 * stages):
        for stage, kind, offset in schedule.actions:
            batch = iteration + offset
            if kind is F and batch >= 0:
                handed["carries"].discard((stage, batch))
                handed["residuals"].add((stage, batch))
                if stage + 1 < stages:
                    handed["carries"].add((stage + 1, batch))
            if kind is B and batch >= 0:
                handed["residuals"].remove((stage, batch))
                handed["errors"].discard((stage, batch))
                if stage > 0 and not schedule.local:
                    handed["errors"].add((stage - 1, batch))
    for stage in range(stages):
        for kind, batches in schedule.in_flight(stage)._asdict().items():
            wanted = {(stage, iteration + 1 + each) for each in batches}
            assert {pair for pair in handed[kind] if pair[0] == stage} == wanted


@pytest.mark.parametrize(
    ("name", "latency", "depth"),
    [
        ("local", 0, 0),
        ("sequential", 0, 0),
        ("gpipe", 0, 0),
        ("1f1b", 0, 0),
        ("interleaved_1f1b", 0, 0),
        ("zb_h1", 0, 0),
        ("zbv", 0, 0),
        ("dualpipe_v", 0, 0),
        ("interleaved", 3, 3),
        ("delayed", 3, 6),
        ("delayed_split", 3, 6),
        ("delayed_forward", 3, 6),
        ("delayed_forward_split", 3, 6),
        ("delayed_locked", 0, 3),
        ("delayed_locked_split", 0, 3),
    ],
)
def test_latency_and_depth(name, latency, depth):
    schedule = build(name, 4)
    assert (schedule.latency, schedule.depth) == (latency, depth)
    assert schedule.overlapping == (name in DELAYED)
    assert not build(name, 1).overlapping


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
        [sys.executable, "-c", script, folder], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == str(build("local", 2, 1)) + "\n"
