"""The times of a plan: what they come from, and the placement that is the fastest by them."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from jdecouple._errors import first_line
from jdecouple.pipeline import Proposal, autoplace, make_mesh
from jdecouple.pipeline.design import Design
from jdecouple.pipeline.mesh import placed
from jdecouple.schedules import Costs, Schedule
from jdecouple.train.errors import ConfigError
from jdecouple.train.planning import fit, times
from jdecouple.train.planning.designs import Designer
from jdecouple.train.planning.devices import label, measured_flops
from jdecouple.train.planning.times import Timing, Work
from jdecouple.train.quantities import show
from jdecouple.trainer import Trainer

_REPEATS = 5  # timings of a call
_MOST_DEVICES = 8  # up to which placements of all numbers of stages are tried
_TRIED = 3  # of the fastest placements, whether they fit
_FASTER = 0.99  # of the time, below which a placement is another one's better


@dataclasses.dataclass(frozen=True)
class Clock:
    """What times a design.

    Attributes:
        designer: what it is a design of.
        design: of the placement that is planned.
        works: operations of every block.
        costs: what calls and messages take, where backwards are split and where they are not.
        rate: operations per second of a device, by which other placements are timed.
        speed: what the times come from, in words.
    """

    designer: Designer
    design: Design
    works: tuple[Work, ...]
    costs: Mapping[bool, Costs]
    rate: float
    speed: str

    @classmethod
    def of(cls, designer: Designer, design: Design, measure: bool) -> "Clock":
        """By measured calls, by the speed that is given, or by one that is measured."""
        works, devices = designer.works, designer.devices
        rate, speed = devices.flops, "as given"
        if measure:
            return cls._measured(designer, design)
        if rate is None:
            maps = any(leaf.ndim == 4 for leaf in jax.tree.leaves(design.built.outputs))
            dtype = designer.parts.trainer_arguments()["dtype"]
            rate, what = measured_flops(dtype, maps)
            speed = f"measured here, on {label(jax.local_devices()[0])}, by {what}"
        said = f"times of calls: operations over {show(rate, 'FLOPS')} a device, {speed}"
        said += ", times its speed" if devices.speeds else ""
        costs = dict.fromkeys((False, True), _costs(designer, design, works, rate))
        return cls(designer, design, works, costs, rate, said)

    @classmethod
    def _measured(cls, designer: Designer, design: Design) -> "Clock":
        plans, device = _tables(designer, design), jax.local_devices()[0]
        try:
            calls = times.measured(_maker(designer, design), plans, _batch(designer), _REPEATS)
        except jax.errors.JaxRuntimeError as error:
            raise ConfigError(f"the calls cannot be measured here: {first_line(error)}") from error
        works = designer.works
        rates = [len(group) * designer.devices.speed(group) for group in design.device_groups]
        at_one = _costs(designer, design, works, 1.0)
        costs = {}
        for splits, each in calls.items():
            shared = {(k, kinds): time / rates[k] for (k, kinds), time in each.items()}
            costs[splits] = dataclasses.replace(
                at_one, forward=None, backward=None, weight=None, calls=shared
            )
        own = plans[design.schedule.name]
        rate = sum(times.by_stage(own, at_one)) / sum(times.by_stage(own, costs[own.splits]))
        said = f"times of calls: medians of {_REPEATS} on {label(device)}, measured here"
        return cls(designer, design, works, costs, rate, said)

    def times(self) -> tuple[Timing, ...]:
        """Of every schedule that fits the method, the design's own first."""
        most = self.design.engine.max_in_flight
        plans = _tables(self.designer, self.design).values()
        return tuple(times.timing(table, self.costs[table.splits], most) for table in plans)

    def by_stage(self) -> list[float]:
        """Seconds in which each stage works on a batch, of the design's own schedule."""
        table = next(iter(_tables(self.designer, self.design).values()))
        return times.by_stage(table, self.costs[table.splits])

    def best(self) -> dict[str, Any] | None:
        """The fastest placement on the devices that fits, if it is faster than the design's."""
        own = self._estimate(self.design, self.designer.placement["mesh"]).seconds
        ways = sorted(self._proposals(), key=lambda way: (way.time, sum(way.replicas)))
        for way in ways[:_TRIED]:
            mesh = make_mesh(replicas=way.replicas, devices=self.designer.devices.devices)
            found = self.designer.design(boundaries=way.boundaries, mesh=mesh)
            timing = self._estimate(found, mesh)
            if timing.seconds < _FASTER * own and fit.fits(self.designer.devices, found):
                scale = self.times()[0].seconds / own
                return {
                    "boundaries": list(way.boundaries),
                    "replicas": list(way.replicas),
                    "seconds": scale * timing.seconds,
                    "bubble": timing.bubble,
                }
        return None

    def _estimate(self, design: Design, mesh: Any) -> Timing:
        costs = _costs(self.designer, design, self.works, self.rate)
        table = placed(design.schedule, mesh)
        return times.timing(table, costs, design.engine.max_in_flight)

    def _proposals(self) -> Iterator[Proposal]:
        """The fastest ways, for every number of stages that changes nothing of the results."""
        config, devices = self.designer.config, self.designer.devices
        own, most = len(self.design.stages), min(devices.count, len(self.works))
        free = not self.design.schedule.delayed and devices.count <= _MOST_DEVICES
        for count in range(1, most + 1) if free else (own,):
            try:
                yield autoplace(
                    [work.total for work in self.works],
                    count,
                    devices.count,
                    schedule=self.design.schedule.name,
                    microbatches=config.microbatches,
                    batch_size=config.batch_size,
                    speeds=devices.speeds or None,
                )
            except ValueError:  # it does not divide so, or there are fewer devices than stages
                continue

    def assumed(self) -> tuple[str, ...]:
        """What the times rest on, and bytes."""
        devices, lines = self.designer.devices, [*self.designer.notes]
        if devices.bandwidth == math.inf and not devices.latency:
            lines.append("messages take no time: --link and --latency give them some")
        else:
            speed = f"{show(devices.bandwidth, 'B/s')} and " if devices.bandwidth < math.inf else ""
            lines.append(f"messages: {speed}{show(devices.latency, 's')} each, on a free link")
        for stages, size in self.costs[self.design.schedule.splits].ties:
            users = ", ".join(map(str, stages))
            lines.append(
                f"stages {users} share {show(size, 'B')}: gradients go to stage {stages[0]} and "
                "weights back at the end of every batch, for which they wait"
            )
        if not self.costs[self.design.schedule.splits].calls:
            lines.append("calls: no time for the optimizer, for memory traffic and for dispatch")
        elif self.design.engine.fuse and len(self.design.stages) > 1:
            lines.append("calls were measured apart, though all stages are one")
        elif len(self.design.stages) > 1:
            speeds = ", by the speeds given" if devices.speeds else ""
            lines.append(f"calls take as long on every device as on the one measured{speeds}")
        if any(len(group) > 1 for group in self.design.device_groups):
            lines.append("replicas share the work of a stage evenly")
        lines.append("input: batches are there when they are needed")
        return tuple(lines)


def _tables(designer: Designer, design: Design) -> Mapping[str, Schedule]:
    return times.tables(design, designer.placement["mesh"])


def _costs(designer: Designer, design: Design, works: tuple[Work, ...], rate: float) -> Costs:
    devices = designer.devices
    return times.estimated(design, works, rate, devices.bandwidth, devices.latency, devices.speed)


def _maker(designer: Designer, design: Design) -> Any:
    """Makes trainers of a design's stages as calls apart, on one device that is here."""
    arguments = designer.parts.trainer_arguments() | {"fuse": False}
    return functools.partial(
        Trainer,
        designer.model(nnx.Rngs(designer.config.seed)),
        optimizer=designer.parts.optimizers[-1],
        frozen=designer.frozen,
        boundaries=design.boundaries,
        mesh=make_mesh(len(design.stages), devices=jax.local_devices()[:1]),
        example=_batch(designer),
        **arguments,
    )


def _batch(designer: Designer) -> Mapping[str, np.ndarray]:
    """A batch of the training split."""
    return designer.parts.dataset.train.gather(np.arange(designer.config.batch_size))
