"""A plan of a run: what is trained where, the bytes and the time that it takes, before it is."""

import argparse
import dataclasses
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from jdecouple._errors import first_line, require_int
from jdecouple.train import cli as train_cli
from jdecouple.train import run
from jdecouple.train.errors import ConfigError, one_line
from jdecouple.train.planning import fit, tables
from jdecouple.train.planning.designs import Designer, block_rows, stage_rows
from jdecouple.train.planning.devices import Devices, label
from jdecouple.train.planning.timed import Clock
from jdecouple.train.quantities import parse

_FLAGS = {
    "memory": ("B", "SIZE", "bytes of each device, such as 16GB"),
    "link": ("B/s", "SPEED", "bytes a second between devices, such as 12GB/s"),
    "latency": ("s", "TIME", "seconds of a message beside its bytes, such as 50us"),
    "flops": ("FLOPS", "SPEED", "operations a second of each device, such as 8TFLOPS"),
}
_OWN = (
    "[--devices N] [--speeds S ...] "
    + "".join(f"[--{name} {kind}] " for name, (_, kind, _) in _FLAGS.items())
    + "[--measure] [--format text|json] "
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run would be; `str` gives tables for people, `to_json` the same as JSON.

    Attributes:
        model: name of the network, as `method`, `data` and `dtype` are names.
        method: what trains it.
        data: what it is trained on.
        dtype: what is computed in.
        batch_size: examples of a step.
        microbatches: parts of a batch.
        microbatch_size: examples of a part.
        blocks: of every block, with its head: "module", "output" (shape for a microbatch),
            "parameters", "flops" (of a microbatch, forward and backward), "weight_bytes" and
            "output_bytes".
        engine: "mpmd" or "spmd".
        fused: whether all stages are one compiled call.
        stages: of every stage its blocks, devices, operations, the "seconds" in which it works on a
            batch, and what it sends.
        schedule: name of the schedule.
        grid: the schedule, a line for each stage.
        memory: bytes of every device by kind.
        memory_limit: how many there are, and whether they are enough, in words.
        times: of every schedule that fits the method, the run's own first, "seconds" of a batch and
            the "bubble", the share of the devices' time in which they wait, and the "groups" of
            devices that work.
        speed: what the times come from, in words.
        best: the fastest "boundaries" and "replicas" that were found; None where no others are
            faster.
        assumed: what else the figures rest on, in words.
    """

    model: str
    method: str
    data: str
    dtype: str
    batch_size: int
    microbatches: int
    microbatch_size: int
    blocks: tuple[Mapping[str, Any], ...]
    engine: str
    fused: bool
    stages: tuple[Mapping[str, Any], ...]
    schedule: str
    grid: tuple[str, ...]
    memory: tuple[Mapping[str, Any], ...]
    memory_limit: str
    times: tuple[Mapping[str, Any], ...]
    speed: str
    best: Mapping[str, Any] | None
    assumed: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Its values by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def to_json(self) -> str:
        """All of it as a JSON object."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        return tables.text_of(self.to_dict())


def plan(
    config: ConfigDict | Mapping, devices: Devices | None = None, *, measure: bool = False
) -> Plan:
    """Plans the run of a configuration; trains nothing and writes nothing.

    >>> from jdecouple.train import presets
    >>> from jdecouple.train.plan import Devices
    >>> gpus = Devices(3, memory=16e9, flops=8e12, bandwidth=12e9, latency=50e-6)
    >>> found = plan(presets.load("quickstart"), gpus)
    >>> len(found.stages), [time["schedule"] for time in found.times]
    (3, ['local', 'interleaved'])

    Args:
        config: as `jdecouple.train.loop.train_and_evaluate` takes it. Of a growing model the last
            phase is planned, of texts the longest.
        devices: what to plan for; by default the devices at hand.
        measure: whether every call of the stages is compiled and timed on one device at hand, which
            needs memory for them. Without it times are operations over the speed of a device, and
            nothing is compiled where that speed is given.

    Raises:
        ConfigError: bad values or input, or a run that does not fit into the devices' memory, in
            one line.
    """
    devices = Devices.here() if devices is None else devices
    designer = Designer.of(config, devices)
    config = designer.config
    with one_line(config):
        design = designer.given()
        run.check_design(config, design)
        held = fit.held(design)
        fit.check(designer, design, held)
        clock = Clock.of(designer, design, measure)
        times = clock.times()
        best = clock.best()
    return Plan(
        **{key: config[key].name for key in ("model", "method")},
        data=designer.data,
        dtype=config.dtype,
        batch_size=config.batch_size,
        microbatches=config.microbatches,
        microbatch_size=config.batch_size // config.microbatches,
        blocks=block_rows(design, designer.names, clock.works),
        engine=design.engine.name,
        fused=design.engine.fuse,
        stages=stage_rows(design, clock.works, clock.by_stage(), label),
        schedule=design.schedule.name,
        grid=tuple(str(design.schedule).splitlines()),
        memory=held,
        memory_limit=fit.limit(devices, design, held),
        times=tuple(time._asdict() for time in times),
        speed=clock.speed,
        best=best,
        assumed=clock.assumed(),
    )


def main(argv: Sequence[str]) -> None:
    """Plans a run: its blocks, stages and schedule, the bytes and the time that it needs.

    Nothing is trained, downloaded or written. A run that does not fit into memory is refused in one
    line that says what would. The configuration is given as to `train`. Devices are those at hand,
    or as they are described.
    """
    parser = argparse.ArgumentParser(
        prog="jdecouple plan",
        usage=f"%(prog)s --config FILE {_OWN}[--config.KEY=VALUE ...]",
        description=inspect.getdoc(main),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--devices", type=int, metavar="N", help="devices, which need not be here")
    said = "of each device beside one of --flops, or that at hand, such as 1 0.5"
    parser.add_argument("--speeds", type=float, nargs="+", metavar="S", help=said)
    for name, (_, kind, said) in _FLAGS.items():
        parser.add_argument(f"--{name}", metavar=kind, help=said)
    parser.add_argument("--measure", action="store_true", help="time every call on a device here")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="of the output")
    try:
        given, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigError(first_line(error)) from error
    described = {
        name: parse(f"--{name}", getattr(given, name), unit)
        for name, (unit, *_) in _FLAGS.items()
        if getattr(given, name) is not None
    }
    arguments = [parser.prog, *rest]
    config, _ = train_cli.parse(arguments, _OWN)
    if train_cli.parse_process_spec(arguments):
        raise ConfigError("plan needs one process, and not several of one run")
    if given.measure and given.flops:
        raise ConfigError("--flops and --measure both say how fast a device is: give one of them")
    devices = _devices(given.devices, given.speeds, described)
    found = plan(config, devices, measure=given.measure)
    print(found.to_json() if given.format == "json" else found)


def _devices(
    count: int | None, speeds: Sequence[float] | None, described: Mapping[str, float]
) -> Devices:
    """The devices at hand, or so many; each as it is described, and as fast."""
    names = {"link": "bandwidth"}
    changes: dict[str, Any] = {names.get(name, name): x for name, x in described.items()}
    if speeds is not None:
        count = len(speeds) if count is None else count
        changes |= {"speeds": tuple(speeds)}
    if count is not None:
        with one_line():
            require_int(1, **{"--devices": count})
        changes |= {"count": count, "shared": False, "at_hand": False}
    if "memory" in changes:
        changes |= {"shared": False, "note": ""}
    with one_line():
        return dataclasses.replace(Devices.here(), **changes)
