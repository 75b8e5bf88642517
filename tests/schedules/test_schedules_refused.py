"""What `Schedule.validate` and `build` refuse, and the action that they name."""

import dataclasses

import pytest

import jdecouple as jd
from jdecouple.schedules import Action, Kind, Schedule, build

DELAYED = (
    *("delayed", "delayed_forward", "delayed_locked"),
    *("delayed_split", "delayed_forward_split", "delayed_locked_split"),
    "interleaved",
)
F, B, W, S = Kind.FORWARD, Kind.BACKWARD, Kind.WEIGHT, Kind.STEP


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


@pytest.mark.parametrize("name", [name for name in jd.schedules.names() if name not in DELAYED])
def test_every_way_to_break_a_schedule_is_refused(name):
    """An action too late, before its last input, twice or not at all: each in turn."""
    schedule = build(name, 4, 3)
    actions = schedule.actions

    def refused(*broken: Action) -> str:
        with pytest.raises(ValueError) as error:
            dataclasses.replace(schedule, actions=broken).validate()
        return str(error.value).removeprefix(f"schedule {name}: ")

    for at, action in enumerate(actions):
        rest = [*actions[:at], *actions[at + 1 :]]
        assert refused(*actions, action) == f"{action} stands twice"
        takers = [each for each in actions if action in schedule.inputs(each)]
        if takers:
            wanted = f"{takers[0]} comes before {action}"
            assert refused(*rest) == wanted
            late = rest.index(takers[0]) + 1
            assert refused(*rest[:late], action, *rest[late:]) == wanted
        else:
            assert refused(*rest) == f"{action} is missing"
        if needed := set(schedule.inputs(action)):
            early = max(actions.index(each) for each in needed)
            message = refused(*rest[:early], action, *rest[early:])
            assert message == f"{action} comes before {actions[early]}"


@pytest.mark.parametrize("placement", [(0, 1), (0, 1, 1, 0), (0, 2, 0), (1, 2, 1), (-1, 0, 1)])
def test_placement_that_does_not_fit_is_refused(placement):
    schedule = dataclasses.replace(build("1f1b", 3, 2), placement=placement)
    with pytest.raises(ValueError) as error:
        schedule.validate()
    assert str(error.value) == (
        f"schedule 1f1b: placement is {placement}: a device group for each of 3 stages is needed, "
        "counted from 0 without a gap"
    )


# K = 2, M = 1 with split backwards. W1 and W0 are the weight gradients of stages 1 and 0.
W1, W0 = Action(1, W, 0), Action(0, W, 0)
SPLIT = (F0, F1, B1, W1, S1, B0, W0, S0)


def test_weight_gradients_stand_once_between_backward_and_step():
    schedule = sequential(*SPLIT).validate()
    assert schedule.splits
    assert not sequential(*GOOD).splits
    # The error of stage 1 leaves before its weight gradient; stage 0 sends none.
    assert [(call.stage, call.kinds) for call in schedule.calls()] == [
        (0, (F,)),
        (1, (F, B)),
        (1, (W, S)),
        (0, (B, W, S)),
    ]


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ((F0, F1, B1, S1, B0, W0, S0), "S0 of stage 1 comes before W0 of stage 1"),
        ((F0, F1, W1, B1, S1, B0, W0, S0), "W0 of stage 1 comes before B0 of stage 1"),
        ((F0, F1, B1, W1, W1, S1, B0, W0, S0), "W0 of stage 1 stands twice"),
        ((F0, F1, B1, S1, W1, B0, W0, S0), "S0 of stage 1 comes before W0 of stage 1"),
        ((F0, F1, B1, W1, S1, B0), "W0 of stage 0 is missing"),
    ],
)
def test_weight_gradient_out_of_place_is_refused(actions, message):
    with pytest.raises(ValueError) as error:
        sequential(*actions).validate()
    assert str(error.value) == f"schedule mine: {message}"


def test_gradients_do_not_wait_from_one_iteration_to_the_next():
    good = late((0, B, -2), (0, W, -2), (0, S, -2), (0, F, 0), *LAST[:2])
    last = ((1, W, -1), (1, S, -1))
    dataclasses.replace(good, actions=(*good.actions, *(Action(*each) for each in last))).validate()
    with pytest.raises(ValueError, match="W-2 of stage 0 comes before B-2 of stage 0"):
        late((0, W, -2), (0, B, -2), (0, S, -2), (0, F, 0), *LAST[:2], *last).validate()
    with pytest.raises(ValueError, match="S-2 of stage 0 comes before W-2 of stage 0"):
        late((0, B, -2), (0, S, -2), (0, F, 0), *LAST[:2], *last).validate()


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
        (("1f1b", 3, 0), ("num_microbatches is 0", "at least 1")),
        (("zigzag", 2, 1), ("'zigzag'", "local", "sequential")),
        (("local", 0, 1), ("num_stages is 0", "at least 1")),
        (("local", -2, 1), ("num_stages is -2", "at least 1")),
        (("sequential", 2, 0), ("num_microbatches is 0", "at least 1")),
        (("delayed", 2, 4), ("num_microbatches is 4", "delayed takes 1")),
        (("interleaved", 4, 2), ("num_microbatches is 2", "interleaved takes 1")),
        (("zbv", 5, 4), ("num_stages is 5", "zbv takes an even number")),
        (("dualpipe_v", 3, 1), ("num_stages is 3", "dualpipe_v takes an even number")),
    ],
)
def test_build_refuses(arguments, words):
    with pytest.raises(ValueError) as error:
        build(*arguments)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("name", "stages", "chunks", "words"),
    [
        ("interleaved_1f1b", 5, 2, ("num_stages is 5", "multiple of chunks=2")),
        ("interleaved_1f1b", 2, 4, ("num_stages is 2", "multiple of chunks=4")),
        ("interleaved_1f1b", 4, 0, ("chunks is 0", "at least 1")),
        ("interleaved_1f1b", 4, -2, ("chunks is -2", "at least 1")),
        ("1f1b", 4, 2, ("chunks is 2", "schedule 1f1b takes 1")),
        ("local", 4, 4, ("chunks is 4", "schedule local takes 1")),
        ("zb_h1", 4, 2, ("chunks is 2", "schedule zb_h1 takes 1")),
        ("zbv", 4, 4, ("chunks is 4", "schedule zbv takes 2")),
        ("zbv", 4, 1, ("chunks is 1", "schedule zbv takes 2")),
    ],
)
def test_build_refuses_chunks(name, stages, chunks, words):
    with pytest.raises(ValueError) as error:
        build(name, stages, 4, chunks=chunks)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
