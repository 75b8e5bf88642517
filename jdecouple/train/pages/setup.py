"""How a run was set up: stages and devices, what they did when, its configuration."""

import io
from collections.abc import Mapping
from typing import Any

from flax import traverse_util
from ml_collections import ConfigDict

from jdecouple import methods, schedules
from jdecouple._errors import first_line
from jdecouple._files import resolved
from jdecouple.train import config as configuration
from jdecouple.train.config import chosen
from jdecouple.train.options import OWNERS, options
from jdecouple.train.pages import again
from jdecouple.train.pages.page import Code, Fold, Note, Picture, Piece, Section, Table, Text
from jdecouple.train.pages.record import Record

_COSTS = schedules.Costs(1e-3, 1e-3, 0.25e-3, weight=1e-3)  # seconds that a drawn one assumes
_BATCHES = 4  # that are drawn


def stages(record: Record) -> Section:
    """Which blocks each stage has, where it ran, and when it does what."""
    pieces: list[Piece] = []
    try:
        rows = _stages(record)
        if rows:
            pieces.append(Table("Stages", ["stage", "blocks", "devices"], rows))
        pieces += _timeline(record, len(rows))
    except Exception as error:  # as of a schedule that this program does not know
        pieces.append(Note(f"The timeline cannot be drawn: {first_line(error)}."))
    return Section("Stages, devices and timeline", pieces)


def _stages(record: Record) -> list[tuple[str, str, str]]:
    begins, devices = record.content.get("boundaries"), record.content.get("devices")
    if not begins or not devices:
        return []
    ends = [*begins[1:], record.extra.get("num_blocks")]
    rows = []
    for stage, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        # A net that grows has not yet the blocks of all stages.
        last = "the last" if end is None or end <= begin else end - 1
        blocks = f"{begin}" if last == begin else f"{begin} to {last}"
        # More stages than groups of devices go round.
        rows.append((str(stage), blocks, ", ".join(map(str, devices[stage % len(devices)]))))
    return rows


def _timeline(record: Record, count: int) -> list[Piece]:
    """The measured picture of a profiled run, else the schedule's, simulated."""
    measured = record.folder / "timeline.png"
    if measured.is_file():
        alt = "When each stage ran which call, measured: a line a stage, time to the right."
        return [Picture(measured.read_bytes(), alt, "Measured with config.profile.")]
    if record.config is None or not count:
        return [Note("Neither a measured timeline nor what a schedule needs is there.")]
    if count == 1:
        return [Text("All blocks are on one stage: there is no pipeline to draw.")]
    config = record.config
    method = methods.get(config.method.name, **chosen(config, "method"))
    name = method.route.schedules[0] if config.schedule == "auto" else config.schedule
    schedule = schedules.build(name, count, config.microbatches)
    played = schedules.simulate(schedule, _COSTS, batches=_BATCHES)
    buffer = io.BytesIO()
    schedules.draw(played.spans, title=f"schedule {name}, simulated").savefig(buffer, format="png")
    caption = (
        f"Schedule {name}, drawn for {_BATCHES} batches of stages alike: a backward takes twice as "
        "long as a forward, and a message no time. Nothing of it is measured: config.profile does."
    )
    alt = f"When each of {count} stages runs which call under schedule {name}, simulated."
    grid = Code(f"Grid of schedule {name}", str(schedule))
    return [
        Picture(buffer.getvalue(), alt, caption),
        Fold("The same as a grid of one batch: F forward, B backward, S step", [grid]),
    ]


def settings(record: Record) -> Section:
    """What differs from the defaults, the whole, how it changed, and the command."""
    content = record.content.get("config")
    if not isinstance(content, dict):
        return Section("Configuration", [Note("It is not known: config.json cannot be read.")])
    pieces: list[Piece] = []
    if record.config is None:
        written = [(key, _said(value)) for key, value in flat(content).items()]
        pieces.append(Table("As config.json has it", ["key", "value"], written))
    else:
        values, defaults = flat(record.config), default_values(record.config)
        every = [(key, values.get(key, defaults[key]), defaults[key]) for key in sorted(defaults)]
        rows = [(key, _said(value), _said(default)) for key, value, default in every]
        changed = [row for row in rows if row[1] != row[2]]
        columns = ["key", "value", "default"]
        pieces += [
            Table("What differs from the defaults", columns, changed),
            Fold(f"All {len(rows)} keys", [Table("The whole", columns, rows)]),
        ]
    pieces += _history(record.content.get("history"))
    return Section("Configuration", [*pieces, *_command(record)])


def _history(changes: Any) -> list[Piece]:
    if not changes:
        return [Text("No key has changed since the run began.")]
    names = ("step", "key", "old", "new")
    rows = [[_said(change[name]) for name in names] for change in changes]
    return [Table("Keys that changed on the way: each from its step on", names, rows)]


def _command(record: Record) -> list[Piece]:
    """The command that makes the run again, or why there is none."""
    if record.config is None:
        return []
    found = again.command(record.config, f"runs/{resolved(record.folder).name}-again")
    if found is None:
        return [Note("No command line says this configuration; config.json has it whole.")]
    said = "This command makes the run again, in another workdir."
    if record.content.get("history"):
        said += " It has the last values of all keys from its first step on."
    if record.config.mesh.stages is None and record.config.mesh.replicas is None:
        said += " Stages spread over the devices that there are."
    return [Text(said), Code("The command", again.spelt(found))]


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Values by key, such as "mesh.stages"."""
    values = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    return traverse_util.flatten_dict(values, sep=".")


def default_values(config: ConfigDict) -> dict[str, Any]:
    """The defaults of all keys, and of the options of what a configuration chooses."""
    found = flat(configuration.default())
    for section in OWNERS:
        for key, (_, value) in options(section, config[section].name).items():
            found[f"{section}.{key}"] = value
    return {key: found.get(key) for key in {**found, **flat(config)}}


def _said(value: Any) -> str:
    """A value as the command line takes it."""
    return str(tuple(value) if isinstance(value, list) else value)
