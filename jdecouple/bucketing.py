"""Texts of several lengths in one run: a trainer for each, between which the state passes."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jdecouple.config import ConfigError
from jdecouple.state import State
from jdecouple.trainer import Trainer


def check_buckets(trainer: Trainer) -> None:
    """Raises ConfigError for a run that needs all its batches to have one shape."""
    reason = ""
    if trainer.schedule.overlapping:
        reason = f"batches of one length must wait in the queues of method {trainer.method.name}"
    elif jax.process_count() > 1:
        reason = "several processes need batches of one length"
    if reason:
        raise ConfigError(f"config.data.buckets is set, but {reason}: leave it at None")


def by_length(
    trainer: Trainer, example: Mapping[str, Any], make: Callable[..., Trainer]
) -> Callable[[Mapping[str, Any]], Trainer]:
    """Finds the trainer of a batch by the length of its texts.

    Weights and the optimiser's state have the same shapes for any length, so that the state of one
    trainer is one of the others.

    Args:
        trainer: that of the example.
        example: a batch of the longest texts.
        make: makes a trainer like it for `example=...`, at the first batch of its length.

    Returns:
        A function from a batch {"x": [batch, length], ...} to its trainer. It raises ValueError if
        the weights of another length have another shape.
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
    state: State = trainer.abstract()
    return {name: (leaf.shape, leaf.dtype) for name, leaf in trainer.arrays(state).items()}
