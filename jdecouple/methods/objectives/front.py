"""Heads as a training builds them: over positions of sequences, behind layers of their own."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from jdecouple.methods.objectives.attached_top import attached_top
from jdecouple.methods.objectives.base import (
    BlockInfo,
    Descending,
    Fronted,
    HeadOutput,
    Objective,
)
from jdecouple.methods.objectives.tokens import token_head
from jdecouple.models.renewal import output_of


class FrontedHead(nnx.Module):
    """A head that reads what `front` makes of a block's output."""

    def __init__(self, front: Any, head: Any):
        self.front, self.head = front, head

    def __call__(self, features: Any, carry: Mapping[str, Any]) -> HeadOutput:
        """Loss of `features`."""
        return self.head(self.front(features), carry)

    def logits(self, features: Any) -> jax.Array | None:
        """Logits for evaluation; None if the head is no exit."""
        return self.head.logits(self.front(features))


def build_head(
    objective: Objective,
    info: BlockInfo,
    rngs: nnx.Rngs,
    length: int | None = None,
    attached: int = 0,
) -> nnx.Module | None:
    """The objective's head for a block, behind its front; None if the block has no loss of its own.

    Args:
        objective: what the block minimises.
        info: where the head is attached.
        rngs: source of its initial weights.
        length: positions of a row, where labels are those of positions.
        attached: how many of the model's last units are the front, for an objective without one.

    Raises:
        ValueError: they do not fit one another.
    """
    if attached:
        front = attached_top(info, attached)
    else:
        front = objective.front(info, rngs) if isinstance(objective, Fronted) else None
    if front is not None:
        info = dataclasses.replace(info, features=output_of(front, info.features))
    if length is None:
        head = objective.head(info, rngs)
    else:
        head = token_head(objective, info, length, rngs)
    if front is None or head is None:
        return head
    if isinstance(head, Descending):
        raise ValueError(
            f"{type(objective).__name__} has an answer that comes down from block to block: it "
            "cannot have layers in front of its heads"
        )
    return FrontedHead(front, head)
