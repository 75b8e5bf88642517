"""Designs of a configuration's training: as it is given, and with other stages and batches."""

import collections
import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from jdecouple import data
from jdecouple.data import tfds_sets
from jdecouple.models import Model
from jdecouple.pipeline.build import abstract, model_input
from jdecouple.pipeline.design import Design, make_design
from jdecouple.pipeline.mesh import make_mesh
from jdecouple.pipeline.partition import balance
from jdecouple.pipeline.wire import coded
from jdecouple.train import config as configuration
from jdecouple.train import phases
from jdecouple.train.errors import one_line
from jdecouple.train.parts import Parts, prepare
from jdecouple.train.planning.devices import Devices
from jdecouple.train.planning.times import Work, work_of
from jdecouple.train.run import placement

_BATCHES = 100  # of random images, of which there is a pool
_MOST_LAYERS = 3  # kinds of them, in the name of a block
_CONTAINERS = nnx.Sequential | nnx.List | nnx.Dict


@dataclasses.dataclass(frozen=True)
class Designer:
    """Makes designs of a run for some devices; of its data one example is read.

    Attributes:
        parts: what the configuration asks for.
        devices: where it is to run.
        row: shapes and dtypes of an example, by name.
        data: name of the data set.
        notes: what is taken to be so, in words.
        names: what every block is made of, once a model has been made.
    """

    parts: Parts
    devices: Devices
    row: Mapping[str, jax.ShapeDtypeStruct]
    data: str
    notes: tuple[str, ...] = ()
    names: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, config: ConfigDict | Mapping, devices: Devices) -> "Designer":
        """For a configuration; ConfigError as `jdecouple.train.parts.prepare` raises it."""
        config = configuration.validate(config)
        config.data.download = False
        if config.data.buckets:  # texts of one length, the longest
            config.data.max_length, config.data.buckets = config.data.buckets[-1], None
        name: str = config.data.name
        notes: tuple[str, ...] = ()
        if random := _stand_in(config):
            config = random
            notes = (f"data set {name} is not prepared here: shapes are those that TFDS tells",)
        parts = prepare(config)
        with one_line(config):
            example = parts.dataset.train.gather(np.arange(1))
        row = {key: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for key, x in example.items()}
        return cls(parts, devices, abstract(row), name, notes)

    @property
    def config(self) -> ConfigDict:
        """The complete configuration."""
        return self.parts.config

    def design(self, batch_size: int | None = None, **changes: Any) -> Design:
        """The design of a placement; the arguments are those of the Trainer."""
        again = batch_size is None and not isinstance(changes.get("boundaries"), str)
        return self._design(self.alone.built if again else self.model, batch_size, changes)

    def _design(self, model: Any, batch_size: int | None, changes: Mapping[str, Any]) -> Design:
        config, parts = self.config, self.parts
        example = self._example(batch_size or config.batch_size)
        arguments: dict[str, Any] = {
            "schedule": config.schedule,
            "engine": config.engine,
            "frozen": self.frozen,
        }
        arguments |= {**parts.trainer_arguments(), **changes}
        return make_design(
            model,
            optimizer=parts.optimizers[-1],
            example=example,
            **arguments,
        )

    def given(self) -> Design:
        """The design of the placement that the configuration asks for, or leaves open."""
        return self.design(**self.placement)

    @cached_property
    def alone(self) -> Design:
        """The design of a single stage, whose units all placements have."""
        mesh = make_mesh(devices=self.devices.devices)
        changes: dict[str, Any] = {"num_stages": 1, "mesh": mesh}
        return self._design(self.model, None, changes | {"engine": "mpmd"})

    @cached_property
    def works(self) -> tuple[Work, ...]:
        """Operations of every block."""
        return work_of(self.alone)

    @cached_property
    def placement(self) -> dict[str, Any]:
        """The placement that the configuration asks for; where it leaves the boundaries, balanced.

        Blocks are balanced by their operations, as the Trainer does.
        """
        blocks, devices = len(self.alone.built.units), self.devices.devices
        placed = placement(self.config, lambda **_: self.alone, blocks, devices)
        placed.pop("proposal", None)
        stages = placed.get("num_stages") or placed["mesh"].shape["stage"]
        if placed["boundaries"] is None and stages <= blocks:
            placed["boundaries"] = balance([work.total for work in self.works], stages)
        return placed

    def model(self, rngs: nnx.Rngs) -> Model:
        """The whole model, from a source of keys; one that grows as it is at last."""
        config, parts = self.config, self.parts
        with one_line(config.model, "config.model"):
            model = parts.make_model(rngs)
        self.names[:] = map(_layers, model.blocks)
        if config.growth.blocks is None:
            return model
        carry = model_input(self._example(config.batch_size), parts.transform)
        with one_line(config.growth, "config.growth"):
            classes = parts.dataset.num_classes
            return phases.models(config, model, parts.method, carry, classes)[-1][0]

    def _example(self, count: int) -> dict[str, Any]:
        rows = self.row.items()
        return {key: jax.ShapeDtypeStruct((count, *x.shape), x.dtype) for key, x in rows}

    @property
    def frozen(self) -> Sequence[int]:
        """The blocks that the last phase of growth leaves as they are."""
        counts = self.config.growth.blocks
        return range(counts[-2]) if counts and len(counts) > 1 and self.config.growth.freeze else ()


def _stand_in(config: ConfigDict) -> ConfigDict | None:
    """The configuration on random images, in place of those of a TFDS set that is not prepared."""
    section = config.data
    if section.name in data.names() or ":" in section.name:
        return None
    found = tfds_sets.unprepared_images(section.name, section.data_dir)
    if found is None:
        return None
    (height, width, channels), classes = found
    side = section.image_size or (height if height == width else None)
    if side is None or channels not in (1, 3):
        return None
    random = copy.deepcopy(config)
    random.data.name, random.data.data_dir = "synthetic", None
    random.data.image_size, random.data.channels, random.data.num_classes = side, channels, classes
    random.data.synthetic_size = _BATCHES * config.batch_size
    return random


def _layers(block: nnx.Module) -> str:
    """The layers of a block, such as "2 Conv, 2 BatchNorm, MaxPool"."""
    nodes = [node for _, node in nnx.iter_graph(block) if isinstance(node, nnx.Module)]
    parents = {
        id(node)
        for node in nodes
        for child in vars(node).values()
        if isinstance(child, nnx.Module | nnx.List | nnx.Dict)
    }
    leaves = [n for n in nodes if id(n) not in parents and not isinstance(n, _CONTAINERS)]
    names = collections.Counter(type(leaf).__name__ for leaf in leaves)
    listed = [f"{count} {name}" if count > 1 else name for name, count in names.items()]
    more = [f"{len(listed) - _MOST_LAYERS} more"] if len(listed) > _MOST_LAYERS else []
    return ", ".join([*listed[:_MOST_LAYERS], *more]) or type(block).__name__


def block_rows(design: Design, names: Sequence[str], works: Sequence[Work]) -> tuple[dict, ...]:
    """What a plan says of every block with its head."""
    rows = []
    for unit, name, output, work in zip(
        design.built.units, names, design.built.outputs, works, strict=True
    ):
        params = jax.tree.leaves(jax.eval_shape(unit.initial)[0])
        leaves = jax.tree.leaves(output)
        rows.append(
            {
                "block": unit.index,
                "module": name,
                "output": " ".join(str(list(leaf.shape)) for leaf in leaves),
                "parameters": sum(leaf.size for leaf in params),
                "flops": work.total,
                "weight_bytes": size_of(params),
                "output_bytes": size_of(leaves),
            }
        )
    return tuple(rows)


def stage_rows(
    design: Design, works: Sequence[Work], seconds: Sequence[float], label: Callable[[Any], str]
) -> tuple:
    """What a plan says of every stage, which works so many seconds on a batch."""
    own = [sum(works[unit.index].total for unit in stage.units) for stage in design.stages]
    sent = [size_of(coded(stage.carry, stage.wire)) for stage in design.stages[1:]]
    return tuple(
        {
            "stage": stage.index,
            "first_block": stage.units[0].index,
            "last_block": stage.units[-1].index,
            "devices": [label(device) for device in devices],
            "flops": flops,
            "share": flops / (sum(own) or 1.0),
            "seconds": time,
            "message_bytes": size,
            "remat": stage.remat,
        }
        for stage, devices, flops, time, size in zip(
            design.stages, design.device_groups, own, seconds, [*sent, 0], strict=True
        )
    )


def size_of(tree: Any) -> int:
    """Bytes of the arrays of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
