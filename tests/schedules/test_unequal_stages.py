"""What stages of unequal cost take: by formula, and as the documentation has it."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from jdecouple.pipeline.partition import balance
from jdecouple.schedules import Costs, build, simulate

PAGE = Path(__file__).resolve().parents[2] / "docs" / "schedules.md"
COSTS = ([1, 1], [1, 2], [2, 1], [1, 1, 1, 3], [3, 1, 1, 1], [1, 3, 1, 1], [1, 4, 2, 1, 3, 1])
MICROBATCHES = 8


def pace(name: str, costs: Sequence[float], chunks: int | None = None) -> float:
    """Time of a batch; that of every stage is a third forward and two thirds backward."""
    stages = len(costs)
    parts = 1 if name in ("local", "interleaved") or "delayed" in name else MICROBATCHES
    third = [cost / 3 / parts for cost in costs]
    schedule = build(name, stages, parts, chunks=chunks)
    played = simulate(schedule, Costs(third, third, weight=third), batches=8 * stages)
    return played.seconds_per_batch


@pytest.mark.parametrize("costs", COSTS, ids=str)
def test_formulas(costs):
    slowest, close = max(costs), pytest.approx
    for name in ("local", "delayed", "delayed_locked"):
        assert pace(name, costs) == close(slowest)
    flush = (sum(costs) + (MICROBATCHES - 1) * slowest) / MICROBATCHES
    assert pace("gpipe", costs) == close(flush)
    assert pace("1f1b", [*sorted(costs)]) == close(flush)  # the slowest last
    assert pace("1f1b", costs) <= flush + 1e-9
    even = 1 + (len(costs) - 1) / 3 / MICROBATCHES
    assert pace("zb_h1", [1] * len(costs)) == close(even)
    if slowest > 1:  # what the others wait is more than the bubble
        assert pace("zb_h1", costs) == close(slowest)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_interleaved_stages_fill_their_devices(size, chunks):
    """By `local` a device waits for its own later stages."""
    costs = [1 + (3 * stage) % 4 for stage in range(size * chunks)]
    busiest = max(sum(costs[device::size]) for device in range(size))
    assert pace("interleaved", costs, chunks) == pytest.approx(busiest)
    table = build("interleaved", size * chunks, chunks=chunks)
    equal = Costs(1.0, 2.0)
    played = simulate(table, equal, batches=8 * len(costs))
    assert played.seconds_per_batch == pytest.approx(3 * chunks)
    plain = dataclasses.replace(build("local", size * chunks), placement=table.placement)
    played = simulate(plain, equal, batches=8 * len(costs))
    assert played.seconds_per_batch == pytest.approx(3 * ((chunks - 1) * size + 1))


def test_interleaved_stages_hide_a_link():
    """A carry has as long as the other stages of the devices take."""
    table, costs = build("interleaved", 4), Costs(1.0, 2.0, latency=3.0)
    assert simulate(table, costs, batches=40).seconds_per_batch == pytest.approx(6)


def test_unequal_blocks_that_only_turns_spread_evenly():
    """The example of the documentation: two devices, four blocks."""
    costs = [3, 2, 1, 2]
    first, second = balance(costs, 2)
    assert max(sum(costs[first:second]), sum(costs[second:])) == 5
    assert pace("interleaved", costs) == pytest.approx(sum(costs) / 2)
    assert "costs 3, 2, 1 and 2" in PAGE.read_text()


def test_table_of_the_documentation():
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    start = next(i for i, line in enumerate(lines) if "1 : 1 : 1 : 3" in line)
    header, *rows = [re.findall(r"[^|]+", line) for line in lines[start : start + 6]]
    columns = [[int(x) for x in cell.split(":")] for cell in header[2:] if ":" in cell]
    assert len(columns) == 5
    found = {}
    for names, _, *cells in rows:
        for name in re.findall(r"`(\w+)`", names):
            found[name] = [cell.strip() for cell in cells]
    names = "local delayed delayed_forward delayed_locked interleaved gpipe 1f1b zb_h1"
    assert [*found] == names.split()
    for name, cells in found.items():
        assert [f"{pace(name, costs):.3f}" for costs in columns] == cells[:5], name
