"""The phases of a run whose model grows: which blocks there are, and from which step on."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jdecouple import growth
from jdecouple.methods import Method
from jdecouple.models import Model
from jdecouple.optim import Schedule
from jdecouple.train.config import ConfigError
from jdecouple.train.rules import MOST
from jdecouple.trainer import Trainer

TrainerOf = Callable[[Mapping[str, Any]], Trainer]


class Phase(NamedTuple):
    """The steps in which a model has one number of blocks.

    Attributes:
        start: steps that are trained before it.
        trainer: trains its blocks.
        trainer_of: the trainer of a batch, see `jdecouple.train.run.Run`.
        learning_rate: by the number of batches that a block was trained on before.
    """

    start: int
    trainer: Trainer
    trainer_of: TrainerOf
    learning_rate: Schedule


def starts(config: ConfigDict, steps_per_epoch: int) -> tuple[int, ...]:
    """Steps that are trained before each phase, (0,) where nothing grows.

    Raises:
        ConfigError: a phase without a step, or one that begins too late to count.
    """
    section = config.growth
    if section.blocks is None:
        return (0,)
    if section.steps is not None:
        return section.steps
    steps = tuple(round(min(epoch * steps_per_epoch, 2 * MOST)) for epoch in section.epochs)
    given = f"config.growth.epochs is {section.epochs}: of {steps_per_epoch} steps an epoch"
    if steps[-1] > MOST:
        raise ConfigError(f"{given} at most {MOST} steps are allowed")
    if any(now >= later for now, later in itertools.pairwise(steps)):
        listed = ", ".join(map(str, steps))
        raise ConfigError(f"{given} they are the steps {listed}, which must increase")
    return steps


def scheduled(config: ConfigDict, starts: Sequence[int], total_steps: int) -> list[int]:
    """Steps in which the learning rate of each phase takes its course.

    Where what exists is frozen, a block is trained in one phase alone, and the course is the
    phase's. Else it is the run's, and every block begins it when it begins.
    """
    if not config.growth.freeze:
        return [total_steps] * len(starts)
    ends = (*starts[1:], max(total_steps, starts[-1] + 1))
    return [end - start for start, end in zip(starts, ends, strict=True)]


def models(
    config: ConfigDict, model: Model, method: Method, carry: Mapping[str, Any], num_classes: int
) -> list[tuple[Model, Sequence[int]]]:
    """The model of every phase, and which of its blocks are frozen.

    Raises:
        ValueError: numbers of blocks that do not fit, or a method that is not local.
    """
    counts = config.growth.blocks
    if counts is None:
        return [(model, ())]
    grown = growth.phases(model, method, counts, carry, num_classes, seed=config.seed)
    frozen = [range(count if config.growth.freeze else 0) for count in (0, *counts[:-1])]
    return list(zip(grown, frozen, strict=True))


def fewer(placement: Mapping[str, Any], whole: Trainer, count: int) -> dict[str, Any]:
    """Where the first `count` blocks lie, from where all do and the trainer of these."""
    if placement["boundaries"] is None:
        return {**placement, "num_stages": min(count, len(whole.stages))}
    begun = tuple(block for block in whole.boundaries if block < count)
    return {**placement, "boundaries": begun, "num_stages": len(begun)}
