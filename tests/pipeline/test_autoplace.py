"""Boundaries and replicas that the simulation finds best."""

import itertools

import jax
import nets
import pytest

import jdecouple as jd
from jdecouple.pipeline import autoplace
from jdecouple.pipeline.partition import balance


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
