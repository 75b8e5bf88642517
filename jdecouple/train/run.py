"""From a configuration to what it stands for: data set, model, method, optimiser and trainer."""

import dataclasses
import functools
import inspect
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from jdecouple import data, methods, models
from jdecouple.methods.objectives.maps import is_map
from jdecouple.pipeline import Proposal, autoplace, make_mesh
from jdecouple.pipeline.build import abstract, model_input
from jdecouple.pipeline.diagnostics import SufficientDirection
from jdecouple.train import config as configuration
from jdecouple.train import memory, phases, rates
from jdecouple.train.config import chosen
from jdecouple.train.errors import ConfigError, one_line
from jdecouple.train.hosts import MultiProcess
from jdecouple.train.phases import Phase, TrainerOf
from jdecouple.train.profile import WARM_UP_STEPS
from jdecouple.train.rules import DTYPES, MOST
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
    config = configuration.validate(config)
    with one_line(config.data, "config.data"):
        dataset = load_data(config)
        transform = dataset.transform(config.data.augment, **_augmentation(config))
    with one_line(config.method, "config.method"):
        method = methods.get(config.method.name, **method_arguments(config, dataset))
    with one_line(config):
        steps_per_epoch = data.steps_per_epoch(dataset.train, config.batch_size)
        example = dataset.train.gather(np.arange(config.batch_size))
    _check_validation(config, dataset)
    total_steps = config.steps or config.epochs * steps_per_epoch
    accumulate = max(config.accumulate, method.route.accumulate)  # not both, says the trainer
    _check_length(config, total_steps)
    starts = phases.starts(config, steps_per_epoch)
    _check_accumulate(config, [*starts, total_steps], accumulate)
    with one_line(config.optimizer, "config.optimizer"):
        lengths = phases.scheduled(config, starts, total_steps)
        schedules = [rates.schedule(config, steps, steps_per_epoch) for steps in lengths]
        optimizers = [rates.optimizer(config, each, accumulate) for each in schedules]
    with one_line(config.model, "config.model"):
        make_model = functools.partial(_model, config, dataset)
        carry = model_input(abstract(example), transform)
        memory.check_state(config, make_model, method, optimizers[-1], dataset, carry)
        model = make_model(nnx.Rngs(config.seed))
    with one_line(config.growth, "config.growth"):
        parts = phases.models(config, model, method, carry, dataset.num_classes)
    with one_line(config):
        make_trainer = functools.partial(
            Trainer,
            method=method,
            microbatches=config.microbatches,
            num_classes=dataset.num_classes,
            seed=config.seed,
            transform=transform,
            dtype=DTYPES[config.dtype],
            clip_norm=config.clip_norm,
            accumulate=config.accumulate,
            ema=config.ema,
            remat=config.remat,
            fuse=False if config.profile else None,  # a timeline shows stages
            max_in_flight=config.max_in_flight,
            gradient_norms=config.gradient_norms,
        )
        makers = [
            functools.partial(make_trainer, part, optimizer=optimizer, frozen=frozen)
            for (part, frozen), optimizer in zip(parts, optimizers, strict=True)
        ]
        probe = functools.partial(makers[-1], example=example)
        placement = _placement(config, probe, len(model.blocks))
        proposal = placement.pop("proposal", None)
        placement |= {"schedule": config.schedule, "engine": config.engine}

        def phase(number: int, placement: Mapping[str, Any]) -> Phase:
            make = functools.partial(makers[number], **placement)
            trainer = make(example=example)
            rate = rates.by_batches(schedules[number], accumulate)
            return Phase(starts[number], trainer, by_length(trainer, example, make), rate)

        last = phase(-1, placement)
        trainer = last.trainer
        trainer.check_steps(config.chunk)
        _check_pool(config, trainer)
        _check_parts(config, trainer)
        diagnose = SufficientDirection(trainer) if config.sufficient_direction else None
        placements = [phases.fewer(placement, trainer, len(p.blocks)) for p, _ in parts[:-1]]
        all_phases = (*map(phase, range(len(placements)), placements), last)
    if config.data.buckets:
        check_buckets(trainer)
    for each in all_phases:
        check_processes(each.trainer, config)
    return Run(
        config,
        dataset,
        trainer,
        total_steps,
        config.eval_every or steps_per_epoch,
        diagnose,
        last.trainer_of,
        all_phases,
        proposal,
    )


def _check_validation(config: ConfigDict, dataset: data.Dataset) -> None:
    """Raises ConfigError for early stopping without examples to judge it by."""
    if config.early_stopping.patience is not None and not len(dataset.validation):
        raise ConfigError(
            f"config.early_stopping.patience is {config.early_stopping.patience}: data set "
            f"{dataset.name!r} has no validation split to judge it by; set config.data.validation"
        )


def _check_parts(config: ConfigDict, trainer: Trainer) -> None:
    """Raises ConfigError for a part of the texts that no block reads."""
    read = {name for stage in trainer.stages for unit in stage.units for name in unit.inputs}
    parts = [f"x_{number}" for number in range(1, len(config.data.parts or ()))]
    if unread := [name for name in parts if name not in read]:
        raise ConfigError(
            f"config.data.parts is {config.data.parts}: no block of model {config.model.name!r} "
            f"reads {unread[0]}; set config.model.further or give fewer parts"
        )


def _check_length(config: ConfigDict, total_steps: int) -> None:
    """Raises ConfigError for a run that is too long to count, or for what it is too short for."""
    if total_steps > MOST:
        raise ConfigError(
            f"config.epochs is {config.epochs}: at most {MOST} steps are allowed, these are "
            f"{total_steps}"
        )
    needed = WARM_UP_STEPS + (config.profile or 0)
    if config.profile and needed > total_steps:
        raise ConfigError(
            f"config.profile is {config.profile}: it needs {needed} steps, as the first "
            f"{WARM_UP_STEPS} are not traced, but the run has {total_steps}"
        )


def _check_accumulate(config: ConfigDict, ends: Sequence[int], accumulate: int) -> None:
    """Raises ConfigError for more batches to an optimizer's step than are trained between ends."""
    lengths = [later - now for now, later in itertools.pairwise(ends) if later > now]
    if accumulate > (steps := min(lengths)):
        key = "accumulate" if config.accumulate == accumulate else "method.accumulate"
        part = "the run has" if len(lengths) == 1 else "growth leaves a net"
        raise ConfigError(
            f"config.{key} is {accumulate}: {part} {steps} step(s), so that its optimizer would "
            "not step once"
        )


def _check_pool(config: ConfigDict, trainer: Trainer) -> None:
    """Raises ConfigError for bins of heads that no feature map of the model has pixels for."""
    bins = config.method.get("head_pool")
    if not bins or bins == methods.arguments(config.method.name).get("head_pool"):
        return
    maps = [leaf for leaf in trainer.block_outputs() if is_map(leaf)]
    if bins > (most := max((max(leaf.shape[1:3]) for leaf in maps), default=0)):
        reason = f"the largest feature map is {most} pixels wide" if maps else "there are no maps"
        raise ConfigError(
            f"config.method.head_pool is {bins}: {reason} in model {config.model.name!r}"
        )


def _placement(
    config: ConfigDict, make_trainer: Callable[..., Trainer], num_blocks: int
) -> dict[str, Any]:
    """The Trainer's arguments on stages and devices: as given, or with the "proposal" of them."""
    section, devices = config.mesh, len(jax.devices())
    boundaries = config.boundaries if config.split is None else config.split
    given = {"num_stages": config.num_stages, "boundaries": boundaries}
    if section.replicas is not None:
        return {**given, "mesh": make_mesh(replicas=section.replicas)}
    stages = config.num_stages if section.stages is None else section.stages
    if stages is None:
        stages = max(1, min(num_blocks, devices // max(1, section.data)))
    if not section.propose:
        return {**given, "mesh": make_mesh(stages, section.data)}
    probe = make_trainer(num_stages=1, mesh=make_mesh(1))
    schedule = probe.method.route.schedules[0] if config.schedule == "auto" else config.schedule
    proposal = autoplace(
        probe.block_costs(),
        stages,
        devices,
        schedule=schedule,
        microbatches=config.microbatches,
        batch_size=config.batch_size,
    )
    mesh = make_mesh(replicas=proposal.replicas)
    return {"boundaries": proposal.boundaries, "mesh": mesh, "proposal": proposal}


def load_data(config: ConfigDict) -> data.Dataset:
    """The data set of a complete configuration; ValueError or ConfigError where there is none."""
    memory.check_data(config)
    options = inspect.signature(data.load).parameters
    section = {key: value for key, value in config.data.items() if key in options}
    if config.data.buckets:
        section["max_length"] = config.data.buckets[-1]
    return data.load(**section, seed=config.seed)


def _augmentation(config: ConfigDict) -> dict[str, Any]:
    """The options of the augmentation that are set."""
    defaults = data.augment.OPTIONS.items()
    return {key: config.data[key] for key, value in defaults if config.data[key] != value}


def _model(config: ConfigDict, dataset: data.Dataset, rngs: nnx.Rngs) -> models.Model:
    name, inputs = config.model.name, dataset.model_arguments()
    what = f"data set {dataset.name!r} holds {dataset.kind}"
    if not _takes(name, inputs):
        fitting = ", ".join(x for x in models.names() if _takes(x, inputs)) or "no model"
        raise ConfigError(f"config.model.name is {name!r}: {what}, which {fitting} read")
    model = models.get(name)(dataset.num_classes, **inputs, rngs=rngs, **chosen(config, "model"))
    height, width = getattr(dataset, "image_shape", (0, 0))[:2]
    if height != width and not any(
        isinstance(layer, models.layers.GlobalAveragePool)
        for module in (model.blocks[-1], model.classifier)
        for _, layer in nnx.iter_graph(module)
    ):
        raise ConfigError(
            f"config.model.name is {name!r}, which reads square images, but {what} of "
            f"{height} x {width} pixels; set config.data.image_size or take a ResNet"
        )
    return model


def _takes(model: str, inputs: Mapping[str, Any]) -> bool:
    try:
        inspect.signature(models.get(model)).bind_partial(**inputs)
    except TypeError:
        return False
    return True


def method_arguments(config: ConfigDict, dataset: data.Dataset) -> dict[str, Any]:
    """What the configuration sets, and the images' statistics where the method asks for them."""
    allowed = methods.arguments(config.method.name)
    known = {key: value for key, value in dataset.method_arguments().items() if key in allowed}
    return known | chosen(config, "method")


def check_buckets(trainer: Trainer) -> None:
    """Raises ConfigError for a run that needs all its batches to have one shape."""
    if trainer.schedule.overlapping:
        reason = f"batches of one length must wait in the queues of method {trainer.method.name}"
    elif jax.process_count() > 1:
        reason = "several processes need batches of one length"
    else:
        return
    raise ConfigError(f"config.data.buckets is set, but {reason}: leave it at None")


def by_length(
    trainer: Trainer, example: Mapping[str, Any], make: Callable[..., Trainer]
) -> Callable[[Mapping[str, Any]], Trainer]:
    """Finds the trainer of a batch {"x": [batch, length], ...} by the length of its texts.

    Weights and the optimiser's state have the same shapes for any length, so that the state of one
    trainer is one of the others; the returned function raises ValueError where they have not.

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
    return {name: (leaf.shape, leaf.dtype) for name, leaf in leaves.items()}


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
