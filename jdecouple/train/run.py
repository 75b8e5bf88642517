"""From a configuration to what it stands for: data set, model, method, optimiser and trainer."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from jdecouple import data, methods
from jdecouple.methods.objectives.maps import is_map
from jdecouple.pipeline import Proposal, autoplace, make_mesh
from jdecouple.pipeline.build import abstract, model_input
from jdecouple.pipeline.design import Design
from jdecouple.pipeline.diagnostics import SufficientDirection
from jdecouple.train import memory, phases, rates
from jdecouple.train.errors import ConfigError, one_line
from jdecouple.train.hosts import MultiProcess
from jdecouple.train.parts import prepare
from jdecouple.train.phases import Phase, TrainerOf
from jdecouple.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class Run:
    """What a configuration stands for, built and checked, with nothing on disk yet.

    Where the model grows, the trainer is that of the whole model.
    """

    config: ConfigDict
    dataset: data.Dataset
    trainer: Trainer
    total_steps: int
    eval_every: int
    diagnose: SufficientDirection | None
    trainer_of: TrainerOf
    """The trainer of a batch: `trainer`, or one like it for texts of another length."""
    phases: tuple[Phase, ...]
    """More than one where the model grows."""
    proposal: Proposal | None = None
    """What `mesh.propose` chose."""

    def trainer_for(self, start: Mapping[str, Any] | None) -> Trainer:
        """The trainer of the state of a checkpoint, which says `start` beside its arrays."""
        length = (start or {}).get("length")
        return self.trainer if length is None else self.trainer_of({"x": np.empty((0, length))})

    @property
    def grows(self) -> tuple[int, ...]:
        """Steps after which blocks are added."""
        return tuple(phase.start for phase in self.phases[1:])

    def at(self, step: int) -> "Run":
        """The run with the trainer that trains step number `step`, the first being 1.

        A state of that step is this trainer's, until blocks are added for the next.
        """
        begun = [phase for phase in self.phases if phase.start < step]
        _, trainer, trainer_of, _ = begun[-1] if begun else self.phases[0]
        return dataclasses.replace(self, trainer=trainer, trainer_of=trainer_of)


def build(config: ConfigDict | Mapping) -> Run:
    """Builds data set, model, method, optimiser and trainer of a configuration.

    Raises:
        ConfigError: in one line, whatever is wrong with the values or the data.
    """
    prepared = prepare(config)
    config, dataset, method = prepared.config, prepared.dataset, prepared.method
    optimizers, starts = prepared.optimizers, prepared.starts
    with one_line(config):
        example = dataset.train.gather(np.arange(config.batch_size))
    with one_line(config.model, "config.model"):
        carry = model_input(abstract(example), prepared.transform)
        memory.check_state(config, prepared.make_model, method, optimizers[-1], dataset, carry)
        model = prepared.make_model(nnx.Rngs(config.seed))
    with one_line(config.growth, "config.growth"):
        parts = phases.models(config, model, method, carry, dataset.num_classes)
    with one_line(config):
        make_trainer = functools.partial(Trainer, **prepared.trainer_arguments())
        makers = [
            functools.partial(make_trainer, part, optimizer=optimizer, frozen=frozen)
            for (part, frozen), optimizer in zip(parts, optimizers, strict=True)
        ]
        probe = functools.partial(makers[-1], example=example)
        placed = placement(config, probe, len(model.blocks))
        proposal = placed.pop("proposal", None)
        placed |= {"schedule": config.schedule, "engine": config.engine}

        def phase(number: int, placement: Mapping[str, Any]) -> Phase:
            make = functools.partial(makers[number], **placement)
            trainer = make(example=example)
            rate = rates.by_batches(prepared.schedules[number], prepared.accumulate)
            return Phase(starts[number], trainer, by_length(trainer, example, make), rate)

        last = phase(-1, placed)
        trainer = last.trainer
        memory.check_stages(trainer)
        check_design(config, trainer.design)
        diagnose = SufficientDirection(trainer) if config.sufficient_direction else None
        placements = [phases.fewer(placed, trainer, len(p.blocks)) for p, _ in parts[:-1]]
        all_phases = (*map(phase, range(len(placements)), placements), last)
    for each in all_phases:
        check_processes(each.trainer, config)
    return Run(
        config,
        dataset,
        trainer,
        prepared.total_steps,
        config.eval_every or prepared.steps_per_epoch,
        diagnose,
        last.trainer_of,
        all_phases,
        proposal,
    )


def check_design(config: ConfigDict, design: Design) -> None:
    """Raises ValueError, in one line, for values that do not fit the stages that they led to."""
    design.check_steps(config.chunk)
    _check_pool(config, design)
    _check_parts(config, design)


def _check_parts(config: ConfigDict, design: Design) -> None:
    """Raises ConfigError for a part of the texts that no block reads."""
    read = {name for stage in design.stages for unit in stage.units for name in unit.inputs}
    parts = [f"x_{number}" for number in range(1, len(config.data.parts or ()))]
    if unread := [name for name in parts if name not in read]:
        raise ConfigError(
            f"config.data.parts is {config.data.parts}: no block of model {config.model.name!r} "
            f"reads {unread[0]}; set config.model.further or give fewer parts"
        )


def _check_pool(config: ConfigDict, design: Design) -> None:
    """Raises ConfigError for bins of heads that no feature map of the model has pixels for."""
    bins = config.method.get("head_pool")
    if not bins or bins == methods.arguments(config.method.name).get("head_pool"):
        return
    maps = [leaf for leaf in design.block_outputs() if is_map(leaf)]
    if bins > (most := max((max(leaf.shape[1:3]) for leaf in maps), default=0)):
        reason = f"the largest feature map is {most} pixels wide" if maps else "there are no maps"
        raise ConfigError(
            f"config.method.head_pool is {bins}: {reason} in model {config.model.name!r}"
        )


def placement(
    config: ConfigDict,
    make_trainer: Callable[..., Any],
    num_blocks: int,
    devices: Sequence[Any] | None = None,
) -> dict[str, Any]:
    """The Trainer's arguments on stages and devices: as given, or with the "proposal" of them.

    `make_trainer` makes a Trainer or the design of one; the devices are by default JAX's.
    """
    section, count = config.mesh, len(jax.devices() if devices is None else devices)
    boundaries = config.boundaries if config.split is None else config.split
    given = {"num_stages": config.num_stages, "boundaries": boundaries}
    make = functools.partial(make_mesh, devices=devices)
    if section.replicas is not None:
        return {**given, "mesh": make(replicas=section.replicas)}
    stages = config.num_stages if section.stages is None else section.stages
    if stages is None:
        stages = max(1, min(num_blocks, count // max(1, section.data)))
    if not section.propose:
        return {**given, "mesh": make(stages, section.data)}
    probe = make_trainer(num_stages=1, mesh=make(1))
    schedule = probe.method.route.schedules[0] if config.schedule == "auto" else config.schedule
    proposal = autoplace(
        probe.block_costs(),
        stages,
        count,
        schedule=schedule,
        microbatches=config.microbatches,
        batch_size=config.batch_size,
    )
    mesh = make(replicas=proposal.replicas)
    return {"boundaries": proposal.boundaries, "mesh": mesh, "proposal": proposal}


def by_length(
    trainer: Trainer, example: Mapping[str, Any], make: Callable[..., Trainer]
) -> Callable[[Mapping[str, Any]], Trainer]:
    """Finds the trainer of a batch {"x": [batch, length], ...} by the length of its texts.

    Weights and the optimiser's state have the same shapes for any length, so that a trainer can
    take over the state of another; the returned function raises ValueError where they have not.

    Args:
        trainer: that of `example`, a batch of the longest texts.
        example: that batch.
        make: makes a trainer like it for `example=...`, at the first batch of its length.
    """
    trainers = {example["x"].shape[1]: trainer}

    def find(batch: Mapping[str, Any]) -> Trainer:
        length = batch["x"].shape[1]
        if length not in trainers:
            shorter = {**example, "x": example["x"][:, :length]}
            other = make(example=shorter, boundaries=trainer.boundaries, engine=trainer.engine)
            if _shapes(other) != _shapes(trainer):
                raise ValueError(
                    "buckets need a model and heads whose weights do not depend on the length of "
                    f"a text: those for {length} words have other shapes"
                )
            trainers[length] = other
        return trainers[length]

    return find


def _shapes(trainer: Trainer) -> dict[str, Any]:
    leaves = trainer.to_arrays(trainer.abstract())
    own = {name: leaf for name, leaf in leaves.items() if not name.startswith("stage_")}
    return {name: (leaf.shape, leaf.dtype) for name, leaf in own.items()}


def check_processes(trainer: Trainer, config: ConfigDict) -> None:
    """Raises ConfigError for what several processes cannot do."""
    if jax.process_count() == 1:
        return
    for key in ("profile", "sufficient_direction"):
        if config[key]:
            raise ConfigError(f"config.{key} is {config[key]}: it needs a run of one process")
    used = frozenset().union(*(placement.processes for placement in trainer.placements))
    if idle := sorted({*range(jax.process_count())} - used):
        phase, remedy = "", ""
        if config.growth.blocks is not None:
            phase = f" of the first {len(trainer.model.blocks)} block(s)"
            remedy = ", or config.growth.blocks that begins with more"
        raise ConfigError(
            f"the stages{phase} take no device of process {', '.join(map(str, idle))}: "
            f"{jax.process_count()} processes with {len(jax.devices())} device(s) need more "
            f"config.mesh.stages or a larger config.mesh.data{remedy}"
        )


def check_alike(config: ConfigDict, processes: MultiProcess) -> None:
    """Raises ConfigError on the first process if another one was started for another run."""
    if processes.count != jax.process_count():
        raise ConfigError(
            f"jax.distributed runs {jax.process_count()} processes: give train_and_evaluate what "
            "jdecouple.train.hosts.join returned"
        )
    own = json.loads(config.to_json())
    for index, (_, other, _) in enumerate(processes.collect(own)):
        for key in own:
            if other[key] != own[key]:
                difference = f"{other[key]}, process 0 {own[key]}"
                raise ConfigError(f"process {index} has config.{key} = {difference}")
