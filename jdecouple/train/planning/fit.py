"""Whether a design fits into the memory of its devices, and what would."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from jdecouple.pipeline.design import Design
from jdecouple.pipeline.mesh import described, make_mesh
from jdecouple.pipeline.plan.device_bytes import planned_bytes
from jdecouple.train.errors import ConfigError
from jdecouple.train.planning.designs import Designer
from jdecouple.train.planning.devices import Devices, label
from jdecouple.train.quantities import show

_NOTHING = "neither more stages nor a smaller batch fit"
_KINDS = ("weights", "statistics", "optimizer", "queues", "messages", "working")


def held(design: Design) -> tuple[dict[str, Any], ...]:
    """What a plan says of every group of devices: which stages, and bytes by kind on each."""
    return tuple(
        {
            "device": ", ".join(map(label, found.devices)),
            "stages": list(found.stages),
            **{kind: getattr(found, kind) for kind in (*_KINDS, "total", "least", "most", "ahead")},
        }
        for found in planned_bytes(design, jax.default_backend())
    )


def limit(devices: Devices, design: Design, rows: Sequence[dict[str, Any]]) -> str:
    """The memory that there is, and whether it is enough, in words."""
    if devices.memory == math.inf:
        return "memory of the devices: not given"
    whose = "of this machine, for all devices" if devices.shared else "of each device"
    said = f", {devices.note}" if devices.note and not devices.at_hand else ""
    surely = fits(devices, design, rows, ("most", "ahead"))
    enough = "it is enough" if surely else "it may not be enough"
    return f"memory {whose}: {show(devices.memory, 'B')}{said}: {enough}"


def check(designer: Designer, design: Design, rows: Sequence[dict[str, Any]]) -> None:
    """Raises ConfigError where a device needs more than it has, and says what would fit.

    What it needs is the lower end of the estimate, so that no run is refused that may fit.
    """
    devices = designer.devices
    if fits(devices, design, rows, ("least",)):
        return
    worst = max(rows, key=lambda row: row["least"])
    parts = ", ".join(f"{kind} {show(worst[kind], 'B')}" for kind in _KINDS if worst[kind])
    stages = ", ".join(map(str, worst["stages"]))
    each = "each of " if "," in worst["device"] else ""
    who, need = f"{each}{worst['device']} (stage {stages})", worst["least"]
    if devices.shared:
        who, need = "this machine, with all stages,", _sum(design, [row["least"] for row in rows])
        parts = f"at most, for stage {stages}: {parts}"
    raise ConfigError(
        f"{who} needs at least {show(need, 'B')} ({parts}), but it has "
        f"{show(devices.memory, 'B')}; {_remedy(designer, design)}"
    )


def fits(
    devices: Devices,
    design: Design,
    rows: Sequence[dict[str, Any]] | None = None,
    kinds: Sequence[str] = ("total",),
) -> bool:
    """Whether the devices have what a design needs, as the sum of some kinds."""
    rows = held(design) if rows is None else rows
    sizes = [sum(row[kind] for kind in kinds) for row in rows]
    needed = _sum(design, sizes) if devices.shared else max(sizes)
    return needed <= devices.memory


def _sum(design: Design, sizes: Iterable[int]) -> int:
    """Bytes of all devices, from those of a device of every group."""
    groups = dict.fromkeys(design.device_groups)
    return sum(size * len(own) for size, own in zip(sizes, groups, strict=True))


def _remedy(designer: Designer, design: Design) -> str:
    """The fewest stages and the batch that fit, as the end of the line that refuses a run."""
    found = [_stages(designer, design), _batch(designer, design)]
    if any(found):
        return f"what fits: {' or '.join(filter(None, found))}"
    return "no smaller batch fits" if designer.devices.shared else _NOTHING


def _stages(designer: Designer, design: Design) -> str:
    """The fewest stages, each on devices of its own, that fit: found by halving."""
    now, most, data = len(design.stages), len(design.built.units), designer.config.mesh.data
    if designer.devices.shared or designer.config.mesh.replicas is not None:
        return ""

    def good(count: int) -> bool:
        mesh = make_mesh(count, data, devices=described(count * data))
        try:
            return fits(designer.devices, designer.design(num_stages=count, mesh=mesh))
        except ValueError:  # a schedule that so many stages do not go into
            return False

    if now == most or (count := _least(good, now + 1, most)) is None:
        return ""
    key = "num_stages" if designer.config.num_stages is not None else "mesh.stages"
    return f"config.{key}={count} on {count * data} devices"


def _least(good: Callable[[int], bool], low: int, high: int) -> int | None:
    """The least number from which on something holds; None if there is none."""
    if not good(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if good(middle) else (middle + 1, high)
    return low


def _batch(designer: Designer, design: Design) -> str:
    """The largest batch that fits, of those that divide as the given one does: found by halving."""
    size, placed = designer.config.batch_size, designer.placement
    step = designer.config.microbatches * placed["mesh"].shape["data"]
    fixed = {"num_stages": len(design.stages), "boundaries": design.boundaries}

    def outcome(count: int) -> bool | None:
        try:
            smaller = designer.design(count * step, **{**placed, **fixed})
        except ValueError:  # a batch that a layer is too small for
            return None
        return fits(designer.devices, smaller)

    count = _least(lambda count: outcome(count) is False, 1, size // step)
    if count is None or count == 1 or not outcome(count - 1):
        return ""
    return f"config.batch_size={(count - 1) * step}"
