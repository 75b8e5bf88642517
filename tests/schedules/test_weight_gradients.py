"""Schedules that split their backwards: grids, bubbles, and what weight gradients cost."""

import pytest

import jdecouple as jd
from jdecouple.schedules import Action, Costs, Kind, Schedule, Span, build, simulate

V_SHAPED = ("zbv", "dualpipe_v")
F, B, W, S = Kind.FORWARD, Kind.BACKWARD, Kind.WEIGHT, Kind.STEP
close = pytest.approx

GRIDS = {
    ("zb_h1", 1, 2): "stage 0 | F0 B0 W0 F1 B1 W1 S1",
    ("zb_h1", 2, 3): """
stage 0 | F0 F1 .  B0 W0 F2 B1 W1 B2 W2 S2
stage 1 | .  F0 B0 F1 B1 W0 F2 B2 W1 W2 S2""",
    ("zb_h1", 4, 2): """
stage 0 | F0 F1 .  .  .  .  .  B0 W0 B1 W1 S1
stage 1 | .  F0 F1 .  .  .  B0 .  B1 W0 W1 S1
stage 2 | .  .  F0 F1 .  B0 .  B1 W0 W1 S1 .
stage 3 | .  .  .  F0 B0 F1 B1 W0 W1 S1 .  .""",
    ("zb_h1", 3, 6): """
stage 0 | F0 F1 F2 .  .  B0 W0 F3 B1 W1 F4 B2 W2 F5 B3 W3 B4 W4 B5 W5 S5
stage 1 | .  F0 F1 .  B0 F2 B1 W0 F3 B2 W1 F4 B3 W2 F5 B4 W3 B5 W4 W5 S5
stage 2 | .  .  F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 F4 B4 W2 F5 B5 W3 W4 W5 S5""",
    ("zbv", 1, 2): "stage 0 | F0 B0 W0 F1 B1 W1 S1",
    ("zbv", 2, 3): """
stage 0 | F0 .  .  .  F1 B0 W0 .  .  .  F2 B1 W1 .  .  .  B2 W2 S2 .
stage 1 | .  F0 B0 W0 .  .  .  F1 B1 W1 .  .  .  F2 B2 W2 .  .  .  S2""",
    ("zbv", 4, 2): """
stage 0 | F0 F1 .  .  .  .  .  .  .  B0 W0 .  B1 W1 S1 .
stage 1 | .  F0 .  F1 .  .  .  B0 W0 .  .  B1 W1 S1 .  .
stage 2 | .  .  F0 .  F1 B0 W0 .  .  B1 W1 .  .  .  S1 .
stage 3 | .  .  .  F0 B0 W0 F1 B1 W1 .  .  .  .  .  .  S1""",
    ("dualpipe_v", 2, 3): """
stage 0 | F0 .  F1 .  .  .  B0 W0 F2 .  .  .  B1 W1 .  .  B2 W2 S2 .
stage 1 | .  F0 .  B0 W0 F1 .  .  .  B1 W1 F2 .  .  B2 W2 .  .  .  S2""",
    ("dualpipe_v", 6, 1): """
stage 0 | F0 .  .  .  .  .  .  .  .  .  .  .  B0 W0 S0 .
stage 1 | .  F0 .  .  .  .  .  .  .  .  .  B0 W0 S0 .  .
stage 2 | .  .  F0 .  .  .  .  .  .  .  B0 W0 S0 .  .  .
stage 3 | .  .  .  F0 .  .  .  .  B0 W0 .  .  .  S0 .  .
stage 4 | .  .  .  .  F0 .  .  B0 W0 .  .  .  .  .  S0 .
stage 5 | .  .  .  .  .  F0 B0 W0 .  .  .  .  .  .  .  S0""",
    ("delayed_split", 1, 1): "stage 0 | F0 B0 W0 S0",
    ("delayed_split", 2, 1): """
stage 0 | B-2 W-2 S-2 F0
stage 1 | F-1 B-1 W-1 S-1""",
    ("delayed_forward_split", 2, 1): """
stage 0 | F0  B-2 W-2 S-2
stage 1 | F-1 B-1 W-1 S-1""",
    ("delayed_locked_split", 2, 1): """
stage 0 | F0  B-1 W-1 S-1 .
stage 1 | .   F0  B0  W0  S0""",
}


@pytest.mark.parametrize(("name", "stages", "microbatches"), GRIDS)
def test_grid(name, stages, microbatches):
    schedule = build(name, stages, microbatches)
    assert str(schedule) == GRIDS[name, stages, microbatches].strip()


def test_stages_in_a_v():
    for name in ("zbv", "dualpipe_v"):
        assert build(name, 6).placement == (0, 1, 2, 2, 1, 0)
        assert build(name, 2, 3).placement == (0, 0)
        assert build(name, 1, 3).actions == build("zb_h1", 1, 3).actions
    assert set(jd.schedules.names()) - set(jd.schedules.names(5)) == {"zbv", "dualpipe_v"}
    assert jd.schedules.names(1) == jd.schedules.names(4) == jd.schedules.names()


# --- The bubble of consecutive batches ----------------------------------------------------------


def bubble(schedule: Schedule, costs: Costs) -> float:
    """Seconds a batch in which the busiest device waits, once batches follow one another."""
    batches = 12
    simulated = simulate(schedule, costs, batches=batches)
    work = max(simulated.busy) * simulated.makespan / batches
    return simulated.seconds_per_batch - work


@pytest.mark.parametrize("stages", [1, 2, 4, 6, 8])
@pytest.mark.parametrize("extra", [0, 1, 5])
def test_bubbles_as_published(stages, extra):
    """arXiv 2401.10241, for M of at least K; of dualpipe_v half the published, see there."""
    costs, microbatches, size = Costs(1, 1, weight=1), stages + extra, stages // 2
    found = {
        name: bubble(build(name, stages, microbatches), costs)
        for name in ("1f1b", "zb_h1", *(name for name in V_SHAPED if stages % 2 == 0))
    }
    wanted = {"1f1b": 3 * (stages - 1), "zb_h1": stages - 1, "zbv": 0, "dualpipe_v": size - 1}
    assert found == close({name: wanted[name] for name in found}, abs=1e-9)
    if "zbv" in found:  # of one batch alone
        alone = simulate(build("zbv", stages, microbatches), costs).makespan
        assert alone == close(2 * microbatches * 3 + size - 1)


@pytest.mark.parametrize("times", [(1, 1.25, 0.75), (2, 1, 0.5), (1, 2, 1)])
def test_bubbles_where_times_differ(times):
    forward, backward, weight = times
    costs = Costs(forward, backward, weight=weight)
    for stages in (2, 4, 6):
        whole = bubble(build("1f1b", stages, 8), costs)
        assert whole == close((stages - 1) * (forward + backward + weight))
        late = bubble(build("zb_h1", stages, 8), costs)
        assert late == close((stages - 1) * (forward + backward - weight))
        short = bubble(build("zbv", stages, 8), costs)
        assert 0 <= short <= late / 2 + 1e-9


@pytest.mark.parametrize("stages", [2, 4, 8])
@pytest.mark.parametrize("microbatches", [1, 2, 3, 8, 17])
def test_what_a_device_of_split_backwards_holds(stages, microbatches):
    """A microbatch counts once a stage: with two stages a device each is half as large."""
    most = {"zb_h1": stages, "zbv": stages, "dualpipe_v": stages + 1}
    for name, limit in most.items():
        schedule = build(name, stages, microbatches)
        live = [0] * schedule.num_device_groups
        peak = list(live)
        for stage, kind, _ in schedule.actions:
            group = schedule.device_group(stage)
            live[group] += (kind is F) - (kind is W)
            peak[group] = max(peak[group], live[group])
        assert max(peak) <= limit
        if microbatches > stages:
            assert set(peak) == {limit}
    peaks = simulate(build("zb_h1", stages, microbatches), Costs(1, 1, weight=1)).peak_live
    assert peaks == (min(stages, microbatches),) * stages


# --- Delayed: an error leaves before the weight gradient ----------------------------------------


@pytest.mark.parametrize("whole", ["delayed", "delayed_locked"])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_split_backwards_change_no_delay(whole, stages):
    schedule, plain = build(f"{whole}_split", stages), build(whole, stages)
    assert tuple(action for action in schedule.actions if action.kind is not W) == plain.actions
    waiting = [[each.in_flight(stage) for stage in range(stages)] for each in (schedule, plain)]
    assert waiting[0] == waiting[1]


def test_an_error_of_a_delayed_schedule_leaves_before_the_weight_gradient():
    assert [(call.stage, call.kinds) for call in build("delayed_split", 3).calls()] == [
        (0, (B, W, S, F)),  # sends no error
        (1, (B,)),
        (1, (W, S, F)),
        (2, (F, B)),
        (2, (W, S)),
    ]
    assert [(call.stage, call.kinds) for call in build("delayed_locked_split", 2).calls()] == [
        (0, (F,)),
        (1, (F, B)),
        (1, (W, S)),
        (0, (B, W, S)),
    ]


def pace(name: str, stages: int, latency: float) -> float:
    costs = Costs(1.0, 1.0, weight=1.0, latency=latency)
    return simulate(build(name, stages), costs, batches=49).seconds_per_batch


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("latency", [0.25, 0.75, 2.0])
def test_early_errors_hide_latency(stages, latency):
    """f, b and w of 1 s each.

    From a forward below the last stage to its next one go a message up, the work of the last stage
    but its weight gradient, the error, and the whole work of a stage: two iterations.
    """
    assert pace("delayed", stages, latency) == close(3 + latency)
    wanted = max(3, (2 + 3 + 2 * latency) / 2)
    assert pace("delayed_split", stages, latency) == close(wanted, rel=0.01)
    # A batch goes up in one iteration, and its errors come down in K - 1.
    messages = 2 * (stages - 1) * latency
    late = max(3, (3 * stages + messages) / stages)
    assert pace("delayed_locked", stages, latency) == close(late, rel=0.03)
    early = max(3, (2 * stages + 1 + messages) / stages)
    assert pace("delayed_locked_split", stages, latency) == close(early, rel=0.03)


# --- Times of weight gradients -------------------------------------------------------------------

ORDER = ((0, F), (1, F), (1, B), (1, W), (1, S), (0, B), (0, W), (0, S))
SPLIT = Schedule("mine", 2, 1, tuple(Action(*each, 0) for each in ORDER))


def test_weight_gradient_takes_its_own_time():
    """The error leaves before it; a schedule that does not split takes both in one."""
    costs = Costs([1, 2], [3, 4], [0.5, 0.25], weight=[10, 20], latency=1)
    simulated = simulate(SPLIT, costs)
    assert simulated.spans == (
        Span(0, 0, (F,), (0,), 0, 0, 1),
        Span(1, 1, (F, B), (0, 0), 0, 2, 8),
        Span(1, 1, (W, S), (0, 0), 0, 8, 28.25),
        Span(0, 0, (B, W, S), (0, 0, 0), 0, 9, 22.5),
    )
    whole = simulate(build("sequential", 2, 1), costs)
    assert [span.end for span in whole.spans] == [1, 28.25, 42.75]
    assert whole == simulate(
        build("sequential", 2, 1), Costs([1, 2], [13, 24], costs.step, latency=1)
    )


def test_weight_gradient_without_a_time_is_refused():
    with pytest.raises(ValueError, match=r"stage 1: WS: that or forward, backward and weight are"):
        simulate(SPLIT, Costs(1, 2))
    calls = {(1, (W, S)): 1.0, (0, (B, W, S)): 2.0}
    assert simulate(SPLIT, Costs(1, 2, calls=calls)).makespan == 1 + 3 + 2


def test_what_is_forwarded_lives_until_its_weight_gradient():
    actions = [(F, 0), (B, 0), (F, 1), (B, 1), (W, 0), (W, 1), (S, 1)]
    schedule = Schedule("mine", 1, 2, tuple(Action(0, *each) for each in actions))
    assert simulate(schedule, Costs(1, 1, weight=1)).peak_live == (2,)
