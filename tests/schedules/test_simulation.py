"""Simulated schedules against closed forms, and what holds for any costs."""

import dataclasses
import itertools
import math
import random
from fractions import Fraction

import numpy as np
import pytest

import jdecouple as jd
from jdecouple.schedules import Action, Costs, Kind, Schedule, Simulation, Span, build, simulate

DELAYED = (
    *("delayed", "delayed_forward", "delayed_locked"),
    *("delayed_split", "delayed_forward_split", "delayed_locked_split"),
    "interleaved",
)
F, B, W, S = Kind.FORWARD, Kind.BACKWARD, Kind.WEIGHT, Kind.STEP
close = pytest.approx

SIZES = list(itertools.product([1, 2, 4], [1, 3, 8]))


# --- One batch over equal stages, f forward and b backward, no links ----------------------------


@pytest.mark.parametrize(("stages", "microbatches"), SIZES)
@pytest.mark.parametrize(("forward", "backward"), [(1.0, 1.0), (1.0, 2.0), (3.0, 0.5)])
def test_one_batch_of_equal_stages(stages, microbatches, forward, backward):
    costs = Costs(forward, backward)
    both = forward + backward
    filled = (microbatches + stages - 1) * both
    wanted = {
        "sequential": stages * microbatches * both,
        "gpipe": filled,
        "1f1b": filled,
        "local": filled,
    }
    for name, makespan in wanted.items():
        simulated = simulate(build(name, stages, microbatches), costs)
        assert simulated.makespan == close(makespan)
        assert simulated.busy == close([microbatches * both / makespan] * stages)
        assert simulated.idle == close([1 - microbatches * both / makespan] * stages)
        assert simulated.seconds_per_batch == simulated.makespan
        assert simulated.bytes_moved == 0


@pytest.mark.parametrize(("num_rows", "chunks"), [(2, 2), (4, 2), (3, 4), (1, 3)])
@pytest.mark.parametrize("microbatches", [4, 7, 12])
@pytest.mark.parametrize("backward", [1.0, 2.0])
def test_interleaving_divides_the_bubble(num_rows, chunks, microbatches, backward):
    """Idle time over work is (P - 1) / (V M): arXiv 2104.04473, section 2.2."""
    schedule = build("interleaved_1f1b", num_rows * chunks, microbatches, chunks=chunks)
    simulated = simulate(schedule, Costs(1.0 / chunks, backward / chunks))
    bubble = (num_rows - 1) / chunks
    assert simulated.makespan == close((microbatches + bubble) * (1 + backward))
    assert simulated.busy == close([microbatches / (microbatches + bubble)] * num_rows)


def test_unequal_stages_by_hand():
    """K = 2, M = 2: each start is the later of the row's end and the input's arrival."""
    costs = Costs([1, 2], [3, 4], [5, 6], message_bytes=20, error_bytes=40, bandwidth=10, latency=1)
    simulated = simulate(build("1f1b", 2, 2), costs)
    assert simulated.spans == (
        Span(0, 0, (F,), (0,), 0, 0, 1),
        Span(0, 0, (F,), (1,), 0, 1, 2),
        Span(1, 1, (F, B), (0, 0), 0, 4, 10),  # 1 + latency + 2 s of bytes
        Span(0, 0, (B,), (0,), 0, 15, 18),  # 10 + latency + 4 s of bytes
        Span(1, 1, (F, B), (1, 1), 0, 10, 16),
        Span(0, 0, (B, S), (1, 1), 0, 21, 29),
        Span(1, 1, (S,), (1,), 0, 16, 22),
    )
    assert simulated.makespan == 29
    assert simulated.busy == (13 / 29, 18 / 29)
    assert simulated.bytes_moved == 2 * (20 + 40)


# --- What stages share ---------------------------------------------------------------------------


def test_stages_that_share_parameters_wait_for_one_another():
    """Stages 0 and 2 share 20 bytes: 3 s to the first one, and 3 s back. Stage 1 shares nothing."""
    costs = Costs(1, 1, ties=[((0, 2), 20)], bandwidth=10, latency=1)
    simulated = simulate(build("local", 3, 1), costs, batches=2)
    starts = [(span.stage, span.batch, span.start) for span in simulated.spans]
    # Stage 2 ends at 8 (with messages of a second): stage 0 has its gradient at 11.
    assert starts == [(0, 0, 0), (1, 0, 3), (2, 0, 6), (0, 1, 11), (1, 1, 14), (2, 1, 17)]
    assert simulated.makespan == 19 + 3 + 3
    assert simulated.bytes_moved == 2 * 2 * 20
    table = dataclasses.replace(build("local", 3, 1), placement=(0, 0, 0))  # at once
    assert simulate(table, costs, batches=3).makespan == 3 * 3 * 2


# --- Many batches --------------------------------------------------------------------------------

UNEQUAL = Costs([1.0, 2.0, 1.5], [1.5, 1.0, 0.25], [0.5, 0.25, 2.0], weight=[0.5, 2.0, 0.75])
SUMS = [3.5, 5.25, 4.5]


@pytest.mark.parametrize("name", ["local", *DELAYED])
def test_slowest_stage_sets_the_pace(name):
    """Also under delayed_locked: the next forward does not wait for the batch to reach the top."""
    simulated = simulate(build(name, 3), UNEQUAL, batches=60)
    assert simulated.seconds_per_batch == close(max(SUMS), rel=1e-6)
    assert min(simulated.idle) < 0.05


def test_local_microbatches_pay_one_step_a_batch():
    simulated = simulate(build("local", 3, 4), UNEQUAL, batches=20)
    assert simulated.seconds_per_batch == close(4 * 5 + 0.25)


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_flush_fills_and_drains_for_every_batch(name):
    """The first stage steps at the end of a batch; the others have stepped meanwhile."""
    simulated = simulate(build(name, 4, 8), Costs(1.0, 2.0, 0.5), batches=6)
    assert simulated.seconds_per_batch == close((8 + 4 - 1) * 3 + 0.5)


def test_first_batches_of_a_delayed_schedule_take_their_time():
    simulated = simulate(build("delayed", 3), UNEQUAL)
    assert simulated.makespan == max(SUMS)
    assert [span.end - span.start for span in simulated.spans] == close(SUMS)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("local", sum(SUMS)),
        ("delayed", max(SUMS)),
        # What waits for the newest forward: the stages' forwards in turn, then one trains.
        ("delayed_locked", max(1 + 2.5, 1 + 2 + 3.25, 1 + 2 + 1.5 + 3)),
    ],
)
def test_one_batch_in_flight(name, wanted):
    simulated = simulate(build(name, 3), UNEQUAL, batches=30, max_in_flight=1)
    assert simulated.seconds_per_batch == close(wanted)
    assert simulated.makespan == close(30 * wanted)


def test_batches_in_flight_fill_a_local_pipeline():
    """n batches share a round of sum(SUMS), until the slowest stage is full."""
    schedule = build("local", 4)
    for flying, wanted in ((1, 12.0), (2, 6.0), (3, 4.0), (4, 3.0), (9, 3.0)):
        found = simulate(schedule, Costs(1, 2), batches=50, max_in_flight=flying)
        assert found.seconds_per_batch == close(wanted, rel=0.05)


def test_pace_is_the_slope_of_the_second_half():
    """Filling counts below four batches only."""
    for ends, wanted in (([9], 9), ([9, 10, 12], 4), ([9, 10, 12, 16], 4), ([9, 9, 10, 12, 16], 3)):
        spans = tuple(Span(0, 0, (F,), (0,), batch, 0, end) for batch, end in enumerate(ends))
        early = tuple(span._replace(stage=1, end=span.end / 2) for span in spans)
        found = Simulation(ends[-1], (1.0, 1.0), (1, 1), 0.0, spans + early)
        assert found.seconds_per_batch == wanted


# --- Links and hosts -----------------------------------------------------------------------------


def pace(name: str, stages: int, microbatches: int, **costs: object) -> float:
    schedule = build(name, stages, microbatches)
    return simulate(schedule, Costs(1.0, 1.0, weight=1.0, **costs), batches=41).seconds_per_batch


def test_latency_costs_a_flush_a_round_trip_and_a_local_pipeline_nothing():
    assert pace("local", 4, 1, latency=5.0) == close(pace("local", 4, 1)) == close(3.0)
    late = pace("gpipe", 4, 8, latency=0.5)
    assert late - pace("gpipe", 4, 8) == close(2 * (4 - 1) * 0.5)
    # 1f1b has no microbatch to spare: its stages wait for each error in turn.
    assert pace("1f1b", 4, 8, latency=0.5) > late


def test_latency_of_a_delayed_schedule_hides_behind_the_other_stages():
    """A message up and an error down share the two iterations that they may take."""
    assert pace("delayed", 3, 1, latency=0.0) == close(3.0)
    assert pace("delayed", 3, 1, latency=1.0) == close((2 * 3.0 + 2 * 1.0) / 2)


def test_link_carries_one_message_at_a_time():
    """Messages of 2 s hide behind the 3 s of a stage; messages of 7 s set the pace."""
    assert pace("local", 3, 1, message_bytes=20.0, bandwidth=10.0) == close(3.0)
    assert pace("local", 3, 1, message_bytes=70.0, bandwidth=10.0) == close(7.0)
    assert pace("local", 3, 1, message_bytes=[0, 50], bandwidth=10.0) == close(5.0)


def test_ways_of_a_link_do_not_disturb_one_another():
    """Both of 3 s: neither waits for the other."""
    both = {"message_bytes": 30.0, "error_bytes": 30.0, "bandwidth": 10.0}
    assert pace("delayed", 2, 1, **both) == close((2 * 3.0 + 2 * 3.0) / 2)


@pytest.mark.parametrize("name", [name for name in jd.schedules.names() if name not in DELAYED])
def test_bytes_of_every_boundary_between_rows(name):
    schedule = build(name, 4, 3)
    middle = schedule.device_group(1) != schedule.device_group(2)
    costs = Costs(1, 1, weight=1, message_bytes=[1, 10, 100], error_bytes=[1000, 10**4, 10**5])
    wanted = [1, 10 * middle, 100]
    if name != "local":
        wanted += [1000, 10**4 * middle, 10**5]
    assert simulate(schedule, costs, batches=2).bytes_moved == 2 * 3 * sum(wanted)


def test_nothing_crosses_within_a_row():
    schedule = build("interleaved_1f1b", 3, 2, chunks=3)
    links = {"message_bytes": 7.0, "error_bytes": 9.0, "bandwidth": 1.0, "latency": 4.0}
    simulated = simulate(schedule, Costs(1.0, 2.0, **links))
    assert (simulated.makespan, simulated.bytes_moved) == (18.0, 0.0)
    assert simulated.busy == (1.0,)


def test_hosts_dispatch_one_call_after_another():
    """4 calls of 1 s each fit into a step of 3 s only where two hosts share them."""
    assert pace("local", 4, 1, dispatch=0.5) == close(3.0)
    assert pace("local", 4, 1, dispatch=1.0) == close(4.0)
    assert pace("local", 4, 1, dispatch=1.0, hosts=[0, 0, 1, 1]) == close(3.0)
    assert pace("local", 4, 1, dispatch=2.0, hosts=[0, 0, 1, 1]) == close(4.0)
    assert pace("local", 4, 1, dispatch=2.0, hosts=[0, 0, 0, 1]) == close(6.0)


def test_host_waits_for_the_batch_before_it_dispatches():
    simulated = simulate(build("local", 1), Costs(1, 2, dispatch=0.5), batches=3, max_in_flight=1)
    assert [span.start for span in simulated.spans] == [0.5, 4.0, 7.5]


# --- Times of whole calls -----------------------------------------------------------------------


def test_time_of_a_call_wins_over_the_sum_of_its_actions():
    """Of K = 2, M = 2 by hand above; one call has a time of its own."""
    schedule = build("1f1b", 2, 2)
    sums = Costs([1, 2], [3, 4], [5, 6])
    spans = simulate(schedule, dataclasses.replace(sums, calls={(1, (F, B)): 2.5})).spans
    times = [(span.stage, span.kinds, span.end - span.start) for span in spans]
    assert times == [
        *[(0, (F,), 1)] * 2,
        *[(1, (F, B), 2.5), (0, (B,), 3)],
        *[(1, (F, B), 2.5), (0, (B, S), 8), (1, (S,), 6)],
    ]


@pytest.mark.parametrize("name", jd.schedules.names())
def test_times_of_all_calls_are_enough(name):
    stages = 3 if name in jd.schedules.names(3) else 2
    schedule = build(name, stages, 1 if name in DELAYED else 4)
    sums = {F: [1, 2, 3], B: [2, 3, 4], W: [4, 3, 2], S: [0.5, 0.25, 2]}
    costs = Costs(*(sums[kind][:stages] for kind in (F, B, S)), weight=sums[W][:stages])
    if not schedule.splits:
        sums[B] = [6, 6, 6]
    calls = {
        (stage, kinds): sum(sums[kind][stage] for kind in kinds)
        for stage, kinds, _ in schedule.calls()
    }
    link = {"message_bytes": 1.0, "error_bytes": 2.0, "bandwidth": 4.0}
    wanted = simulate(schedule, dataclasses.replace(costs, **link), batches=3)
    assert simulate(schedule, Costs(calls=calls, **link), batches=3) == wanted


def test_call_without_a_time_is_refused():
    costs = Costs(calls={(0, (F, B, S)): 1.0})
    with pytest.raises(ValueError, match="calls has no time for stage 1: FBS"):
        simulate(build("local", 2), costs)


# --- Activations ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("stages", "microbatches"), SIZES)
def test_peak_of_live_activations(stages, microbatches):
    def peaks(name: str, count: int = microbatches) -> tuple[int, ...]:
        return simulate(build(name, stages, count), Costs(1, 2)).peak_live

    each = range(stages)
    assert peaks("gpipe") == (microbatches,) * stages
    assert peaks("1f1b") == tuple(min(microbatches, stages - k) for k in each)
    assert peaks("sequential") == peaks("local") == (1,) * stages
    assert peaks("delayed", 1) == tuple(max(1, 2 * (stages - 1 - k)) for k in each)
    assert peaks("delayed_locked", 1) == tuple(stages - k for k in each)


def test_peak_of_interleaved_stages():
    """On each row at most 2 (P - 1 - row) + (V - 1) P + 1 over its stages."""
    peaks = simulate(build("interleaved_1f1b", 4, 4), Costs(1, 2)).peak_live
    assert peaks == (4, 3, 2, 1)


# --- Any costs -----------------------------------------------------------------------------------


def arrivals(schedule: Schedule, costs: Costs, spans: tuple[Span, ...]) -> list[list[float]]:
    """When the inputs of each call from other calls are there, without limits on links."""
    parts = schedule.num_microbatches
    ends = {
        (span.stage, kind, span.batch * parts + each): span.end
        for span in spans
        for kind, each in zip(span.kinds, span.microbatches, strict=True)
    }
    found = []
    for span in spans:
        ready = []
        for kind, each in zip(span.kinds, span.microbatches, strict=True):
            for source, needed, _ in schedule.inputs(Action(span.stage, kind, each)):
                if source == span.stage:
                    continue
                key = source, needed, span.batch * parts + each
                late = 0.0
                if schedule.device_group(source) != span.device_group:
                    size = costs.message_bytes if needed is F else costs.error_bytes
                    late = costs.latency + size / costs.bandwidth
                if key in ends:
                    ready.append(ends[key] + late)
        found.append(ready)
    return found


@pytest.mark.parametrize("name", jd.schedules.names())
@pytest.mark.parametrize("seed", range(6))
def test_calls_start_when_they_can_and_no_sooner(name, seed):
    draw = random.Random(f"{name}{seed}")
    stages, microbatches = draw.randint(1, 6), 1 if name in DELAYED else draw.randint(1, 7)
    stages += name not in jd.schedules.names(stages)
    parts = {kind: [draw.uniform(0, 3) for _ in range(stages)] for kind in Kind}
    costs = Costs(
        parts[F],
        parts[B],
        parts[S],
        weight=parts[W],
        message_bytes=draw.uniform(0, 2),
        error_bytes=draw.uniform(0, 2),
        bandwidth=draw.choice([4.0, math.inf]),
        latency=draw.uniform(0, 1),
    )
    schedule = build(name, stages, microbatches)
    simulated = simulate(schedule, costs, batches=5)
    spans = simulated.spans
    calls = [(call.stage, call.kinds, call.microbatches) for call in schedule.calls()]
    assert [(s.stage, s.kinds, s.microbatches) for s in spans] == 5 * calls
    free = [0.0] * schedule.num_device_groups
    both = [sum(each) for each in zip(parts[B], parts[W], strict=True)]
    times = parts if schedule.splits else {**parts, B: both}
    for span, ready in zip(spans, arrivals(schedule, costs, spans), strict=True):
        soonest = max([free[span.device_group], *ready])
        if math.isinf(costs.bandwidth):
            assert span.start == close(soonest)
        assert span.start >= soonest - 1e-9
        assert span.end - span.start == close(sum(times[kind][span.stage] for kind in span.kinds))
        free[span.device_group] = span.end
    assert simulated.makespan == close(max(free))
    assert all(0 <= share <= 1 for share in simulated.idle)
    work = [0.0] * schedule.num_device_groups
    for stage in range(stages):
        one = parts[F][stage] + both[stage]
        work[schedule.device_group(stage)] += 5 * (microbatches * one + costs.step[stage])
    assert simulated.busy == close([each / simulated.makespan for each in work])
    assert max(work) <= simulated.makespan + 1e-9
    if name not in ("local", *DELAYED):  # a microbatch goes up and down, five times in turn
        groups = [schedule.device_group(stage) for stage in range(stages)]
        crossings = sum(below != above for below, above in itertools.pairwise(groups))
        sizes = costs.message_bytes + costs.error_bytes
        path = sum(parts[F]) + sum(parts[B]) + parts[S][0]
        path += parts[W][0] if schedule.splits else sum(parts[W])
        path += crossings * (2 * costs.latency + sizes / costs.bandwidth)
        assert simulated.makespan >= 5 * path - 1e-9


# --- What is given ------------------------------------------------------------------------------


def test_one_number_stands_for_all_and_any_sequence_will_do():
    schedule = build("1f1b", 3, 4)
    wanted = simulate(schedule, Costs(1.5, 2, 0.5, message_bytes=3, bandwidth=2))
    for make in (list, tuple, np.array):
        costs = Costs(
            make([1.5] * 3), make([2] * 3), make([0.5] * 3), message_bytes=make([3] * 2),
            bandwidth=np.float32(2),
        )  # fmt: skip
        assert simulate(schedule, costs) == wanted
    exact = simulate(
        schedule, Costs(Fraction(3, 2), 2, Fraction(1, 2), message_bytes=3, bandwidth=2)
    )
    assert exact.makespan == wanted.makespan


def test_nothing_costs_nothing():
    simulated = simulate(build("gpipe", 2, 2), Costs(0, 0))
    assert (simulated.makespan, simulated.busy, simulated.idle) == (0, (0, 0), (1, 1))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"forward": -1.0}, "forward is -1.0"),
        ({"forward": [1.0, math.nan]}, "forward is nan"),
        ({"backward": math.inf}, "backward is inf"),
        ({"backward": None}, "backward is None"),
        ({"weight": [1, -1]}, "weight is -1"),
        ({"step": [0, "fast"]}, "step is 'fast'"),
        ({"message_bytes": -5}, "message_bytes is -5"),
        ({"error_bytes": [math.inf]}, "error_bytes is inf"),
        ({"latency": -0.1}, "latency is -0.1"),
        ({"dispatch": math.nan}, "dispatch is nan"),
        ({"bandwidth": 0}, "bandwidth is 0"),
        ({"bandwidth": math.nan}, "bandwidth is nan"),
        ({"bandwidth": -2}, "bandwidth is -2"),
        ({"calls": {(0, (F, B)): -1.0}}, "calls[stage 0: FB] is -1.0"),
        ({"calls": {(1, (S,)): math.nan}}, "calls[stage 1: S] is nan"),
        ({"calls": {(1, "FB"): 1.0}}, "calls has the key (1, 'FB')"),
        ({"calls": {(1, ()): 1.0}}, "calls has the key (1, ())"),
        ({"calls": {"F": 1.0}}, "calls has the key 'F'"),
    ],
)
def test_costs_refuse_what_no_cost_can_be(given, words):
    with pytest.raises(ValueError) as error:
        Costs(**{"forward": 1.0, "backward": 2.0} | given)
    message = str(error.value)
    assert message.startswith(words)
    assert "needed" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"forward": [1, 2]}, "forward has 2 values: one number or 3 values"),
        ({"backward": [1]}, "backward has 1 values: one number or 3 values"),
        ({"weight": [1]}, "weight has 1 values: one number or 3 values"),
        ({"step": [1] * 4}, "step has 4 values: one number or 3 values"),
        ({"message_bytes": [1] * 3}, "message_bytes has 3 values: one number or 2 values"),
        ({"error_bytes": []}, "error_bytes has 0 values: one number or 2 values"),
        ({"hosts": [0, 1]}, "hosts has 2 values: one number or 3 values"),
    ],
)
def test_costs_of_another_number_of_stages_are_refused(given, words):
    costs = Costs(**{"forward": 1.0, "backward": 2.0} | given)
    with pytest.raises(ValueError, match=f"^{words}"):
        simulate(build("gpipe", 3, 2), costs)


@pytest.mark.parametrize("label", ["batches", "max_in_flight"])
@pytest.mark.parametrize("count", [0, -1, 1.5])
def test_counts_below_one_are_refused(label, count):
    with pytest.raises(ValueError, match=rf"^{label} is {count}: a whole number of at least 1"):
        simulate(build("local", 2), Costs(1, 2), **{label: count})


def test_broken_schedule_is_refused():
    with pytest.raises(ValueError, match="F0 of stage 1 comes before F0 of stage 0"):
        simulate(Schedule("mine", 2, 1, build("gpipe", 2, 1).actions[1:]), Costs(1, 2))
