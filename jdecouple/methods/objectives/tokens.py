"""Labels of positions: heads that take the positions of sequences as examples.

Where a batch has labels `[batch, length]`, every position of a block's output, `[batch, length,
width]` or such an "h" in a dict, is an example to a head: it gets rows `[examples, width]` and
labels `[examples]` and need not know of sequences. A label below 0 is none. The positions of a map
are its pixels, row by row; one of fewer pixels than labels answers for squares of them.

What an objective compares examples for, it compares a few positions of every row for: they are
drawn anew in every step, from those with a label. Its own classifiers train on these, too.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jdecouple.methods.objectives.base import BlockInfo, HeadOutput, Objective
from jdecouple.models import layers
from jdecouple.models.tokens import states

POSITIONS = 16
"""Of every row, that are drawn."""


class TokenHead(nnx.Module):
    """A head over positions; of some that are drawn if `positions` is above 0.

    `length` is the number of labels of a row, as far as maps are concerned.
    """

    def __init__(self, head: Any, positions: int, length: int, rngs: nnx.Rngs):
        self.head = head
        self.positions, self.length = positions, length
        self.keys = rngs.positions.fork() if positions else None

    @property
    def classifier(self) -> Any:
        """The model's classifier, where the head trains it."""
        return getattr(self.head, "classifier", None)

    def __call__(self, features: Any, carry: Mapping[str, Any]) -> HeadOutput:
        """Loss of `features` under `carry["label"]` `[batch, length]`."""
        h, labels = by_position(features, self.length), carry["label"]
        length = h.shape[1]
        if self.keys is not None and self.positions < length:
            places = drawn(self.keys(), labels >= 0, self.positions)
            h = jnp.take_along_axis(h, places[..., None], axis=1)
            labels = jnp.take_along_axis(labels, places, axis=1)
        found: dict[str, Any] = {"label": jnp.maximum(labels, 0).reshape(-1)}
        if self.keys is None:
            found["is_labelled"] = (labels >= 0).reshape(-1)
        output = self.head(h.reshape(-1, h.shape[-1]), found)
        logits = output.logits
        if logits is not None:
            logits = logits.reshape(*labels.shape, -1)
        return HeadOutput(output.loss, output.metrics, logits, labels=labels)

    def logits(self, features: Any) -> jax.Array | None:
        """Logits `[batch, length, classes]` for evaluation; None if the head is no exit."""
        h = by_position(features, self.length)
        logits = self.head.logits(h.reshape(-1, h.shape[-1]))
        return None if logits is None else logits.reshape(*h.shape[:2], -1)


def by_position(features: Any, length: int) -> Any:
    """States `[batch, length, width]` of features; those of a map for every one of its squares."""
    h = states(features)
    if getattr(h, "ndim", 0) != 4:
        return h
    batch, *pixels, width = h.shape
    side = math.isqrt(length // math.prod(pixels))
    if side**2 * math.prod(pixels) != length:
        raise ValueError(f"a map of {pixels[0]} x {pixels[1]} pixels has no {length} squares")
    return jnp.repeat(jnp.repeat(h, side, axis=1), side, axis=2).reshape(batch, length, width)


def drawn(key: jax.Array, labelled: jax.Array, count: int) -> jax.Array:
    """Different positions of every row, int `[batch, count]`, of those that are labelled.

    They are taken again from the first where there are fewer.
    """
    order = jnp.argsort(jax.random.uniform(key, labelled.shape) + ~labelled, axis=1)
    few = jnp.maximum(jnp.sum(labelled, axis=1, keepdims=True), 1)
    return jnp.take_along_axis(order, jnp.arange(count) % few, axis=1)


def token_head(
    objective: Objective, info: BlockInfo, length: int, rngs: nnx.Rngs
) -> nnx.Module | None:
    """The objective's head for a block of a net whose labels are `length` positions of a row.

    Raises:
        ValueError: the objective has no such labels, the features are neither sequences nor maps
            that fit, or the head has BatchNorm.
    """
    if objective.tokens not in ("all", "drawn"):
        raise ValueError(
            f"{type(objective).__name__} has no loss of positions, but the labels are [batch, "
            "length]: other methods have"
        )
    h = jax.eval_shape(lambda x: by_position(x, length), info.features)
    if getattr(h, "ndim", 0) != 3:
        given = getattr(h, "shape", type(h).__name__)
        raise ValueError(
            f"the output of block {info.index} is {given}: labels of positions need [batch, "
            "length, width]"
        )
    if (whole := objective.whole_head(info, rngs)) is not None:
        return whole
    positions = getattr(objective, "positions", POSITIONS) if objective.tokens == "drawn" else 0
    sequence = dataclasses.replace(info, features=h)
    head = objective.head(by_positions(sequence, positions), rngs)
    if head is None:
        return None
    if any(isinstance(node, layers.BatchNorm) for _, node in nnx.iter_graph(head)):
        raise ValueError(
            f"the head of block {info.index} has BatchNorm, whose means would tell positions of "
            "later ones: choose one without (aux='norm' of dgl, batch_norm=False of deinforeg)"
        )
    return TokenHead(head, positions, length if states(info.features).ndim == 4 else 0, rngs)


def by_positions(info: BlockInfo, positions: int = 0) -> BlockInfo:
    """Where a head is that reads positions as examples: all, or so many of every row."""
    h = states(info.features)
    count = h.shape[0] * (min(positions, h.shape[1]) or h.shape[1])
    rows = jax.ShapeDtypeStruct((count, h.shape[2]), h.dtype)
    return dataclasses.replace(info, features=rows)
