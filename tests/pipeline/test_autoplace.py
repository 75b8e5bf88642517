"""Boundaries and replicas that the simulation finds best."""

import itertools

import jax
import nets
import pytest

import jdecouple as jd
from jdecouple.pipeline import autoplace
from jdecouple.pipeline.partition import balance
from jdecouple.schedules import Costs


def test_early_blocks_get_more_devices():
    """The first block costs as much as all others: half of the devices are its."""
    found = autoplace([4, 1, 1, 1, 1], 2, 4)
    assert found.boundaries == (0, 1)
    assert found.replicas == (2, 2)
    assert found.time == pytest.approx(1 / 4)
    assert found.idle == pytest.approx((0, 0))
    assert str(found).startswith("4.00 times one device")


@pytest.mark.parametrize("devices", [3, 4, 5])
def test_nothing_is_better_for_a_local_method(devices):
    """Against every way, tried out: the slowest stage sets the pace."""
    costs = [5.0, 1.0, 2.0, 3.0, 1.5]
    times = [
        max(sum(costs[a:b]) / count for (a, b), count in zip(parts, replicas, strict=True))
        for cuts in itertools.combinations(range(1, 5), 2)
        for replicas in itertools.product(range(1, devices), repeat=3)
        if sum(replicas) <= devices
        for parts in [list(itertools.pairwise((0, *cuts, 5)))]
    ]
    assert autoplace(costs, 3, devices).time == pytest.approx(min(times) / sum(costs))


def test_devices_that_do_not_help_are_left():
    assert autoplace([1, 1, 1], 3, 4).replicas == (1, 1, 1)


def test_the_bubble_counts():
    """With one microbatch the stages of gpipe take turns: all devices to the costly one."""
    found = autoplace([5, 1], 2, 4, schedule="gpipe")
    assert found.replicas == (3, 1)
    assert found.time == pytest.approx((5 / 3 + 1) / 6)
    assert autoplace([5, 1], 2, 4, schedule="gpipe", microbatches=8).time < found.time
    times = [
        autoplace([1, 1], 2, 2, schedule=name, microbatches=4).time for name in ("1f1b", "zb_h1")
    ]
    # Of the 8 that one device does: 4 microbatches, and a bubble of one or of its third.
    assert times == pytest.approx([(4 + 1) / 8, (4 + 1 / 3) / 8])


def test_stages_share_devices_as_the_schedule_says():
    """On as many groups as stages: each has its own, two of four do all, and share their work."""
    assert autoplace([1] * 4, 4, 4, schedule="interleaved").time == pytest.approx(1 / 4)
    found = autoplace([1] * 4, 4, 4, schedule="zbv", microbatches=4)
    assert found.time == pytest.approx(1 / 2)
    assert found.idle == pytest.approx((0, 0, 0, 0))
    found = autoplace([1] * 4, 4, 6, schedule="zbv", microbatches=4)
    assert found.replicas == (2, 1, 2, 1)
    assert found.time == pytest.approx(1 / 4)
    with pytest.raises(ValueError, match="schedule zbv takes an even number"):
        autoplace([1] * 3, 3, 3, schedule="zbv")


def test_a_microbatch_divides_among_the_replicas():
    assert autoplace([3, 1], 2, 4, batch_size=16).replicas != (3, 1)
    assert autoplace([3, 1], 2, 4, batch_size=12).replicas == (3, 1)


@pytest.mark.parametrize("schedule", ["local", "1f1b"])
def test_a_slow_device_gets_less(schedule):
    """In proportion; equal stages would take 3/2 of the time."""
    options = {"schedule": schedule, "microbatches": 1 if schedule == "local" else 1000}
    found = autoplace([1.0] * 6, 2, 2, speeds=[1, 0.5], **options)
    assert found.boundaries == (0, 4)
    assert found.time == pytest.approx(4 / 6, rel=0.01)
    assert autoplace([1.0] * 6, 2, 2, speeds=[0.5, 1], **options).boundaries == (0, 2)
    table = jd.schedules.build(schedule, 2, options["microbatches"])
    third = [[work / options["microbatches"] / 3 for work in works] for works in ([3, 6], [4, 4])]
    equal, balanced = (
        jd.schedules.simulate(table, Costs(x, x, weight=x), batches=8).seconds_per_batch
        for x in third
    )
    assert equal / balanced == pytest.approx(6 / 4, rel=0.01)
    assert balanced == pytest.approx(6 * found.time, rel=1e-9)


@pytest.mark.parametrize("speeds", [[1, 0.25, 1], [0.3, 1, 2], [1, 1, 0.2]])
def test_nothing_is_better_on_unequal_devices(speeds):
    """Against every way, tried out: the slowest of replicas that share a batch sets their pace."""
    costs, times = [5.0, 1.0, 2.0, 3.0, 1.5], []
    for cut, first, second in itertools.product(range(1, 5), (1, 2), (1, 2)):
        if first + second <= 3:
            rates = (
                first * min(speeds[:first]),
                second * min(speeds[first : first + second]),
            )
            times.append(max(sum(costs[:cut]) / rates[0], sum(costs[cut:]) / rates[1]))
    found = autoplace(costs, 2, 3, speeds=speeds)
    assert found.time == pytest.approx(min(times) / sum(costs))


@pytest.mark.parametrize("speeds", [[1], [1, 0], [1, float("inf")], [1, -1], [1, 1, 1]])
def test_speeds_that_are_none(speeds):
    words = ("speeds are (1", "each of 2 devices")
    nets.assert_clear(ValueError, words, lambda: autoplace([1, 1], 2, 2, speeds=speeds))


def test_replicas_weigh_in_the_split():
    assert balance([1, 1, 1, 1], 2, (3, 1)) == (0, 3)
    assert balance([1, 1, 1, 1], 2) == (0, 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([], 1, 1), ("costs are ()",)),
        (([1, 0], 1, 1), ("costs are (1, 0)", "above 0")),
        (([1, 1], 3, 4), ("num_stages is 3", "2 blocks")),
        (([1, 1], 2, 1), ("num_devices is 1", "2")),
        (([1, 1], 2, 17), ("num_devices is 17", "16")),
        (([1, 1], 2, 2, 3, 7), ("batch of 7", "3 microbatch")),
    ],
)
def test_what_is_refused(arguments, words):
    costs, stages, devices, *rest = arguments
    options = dict(zip(("microbatches", "batch_size"), rest, strict=False))
    schedule = {"schedule": "gpipe"} if rest else {}
    nets.assert_clear(
        ValueError, words, lambda: autoplace(costs, stages, devices, **schedule, **options)
    )


def test_the_trainer_tells_the_costs_of_its_blocks():
    costs = nets.build("bp", model=nets.mlp(depth=3)).block_costs()
    assert len(costs) == 3
    assert all(cost > 0 for cost in costs)
    mesh = jd.make_mesh(replicas=autoplace(costs, 2, 3).replicas)
    assert mesh.shape["stage"] == 2
    assert len(jax.devices()) >= 3
