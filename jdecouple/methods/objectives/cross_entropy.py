"""Cross-entropy at the end of the network: the objective of backpropagation."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jdecouple.methods.objectives.base import BlockInfo, HeadOutput, Objective, at_least_float32


def cross_entropy(
    logits: jax.Array, labels: jax.Array, counts: jax.Array | None = None
) -> jax.Array:
    """Mean softmax cross-entropy in nats, float32 at least.

    Args:
        logits: `[batch, classes]`.
        labels: `[batch]`, int, in [0, classes).
        counts: `[batch]`, whether an example counts; None: all do. Without any the mean is 0.
    """
    logits = at_least_float32(logits)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if counts is None:
        return jnp.mean(losses)
    return jnp.sum(jnp.where(counts, losses, 0)) / jnp.maximum(jnp.sum(counts), 1)


class CrossEntropyHead(nnx.Module):
    """A classifier (None: the features are the logits) under weighted cross-entropy.

    The carry's "is_labelled", where it is there, says which examples have a label.
    """

    weight: float = 1.0

    def __init__(self, classifier: nnx.Module | None, weight: float = 1.0):
        self.classifier, self.weight = classifier, weight

    def __call__(self, features: Any, carry: Mapping[str, Any]) -> HeadOutput:
        """Loss of `features` under `carry["label"]`."""
        logits = self.logits(features)
        loss = cross_entropy(logits, carry["label"], carry.get("is_labelled"))
        return HeadOutput(self.weight * loss, {"cross_entropy": loss}, logits)

    def logits(self, features: Any) -> jax.Array:
        """Logits `[batch, classes]`."""
        return features if self.classifier is None else self.classifier(features)


@dataclasses.dataclass(frozen=True)
class CrossEntropy(Objective):
    """Cross-entropy of the final logits; only the last block has a head."""

    def head(self, info: BlockInfo, rngs: nnx.Rngs) -> nnx.Module | None:
        """Head for the last block, None for the others.

        Raises:
            ValueError: There is no classifier and the last block's output is no logits.
        """
        if not info.is_last:
            return None
        if info.classifier is None:
            shape = getattr(info.features, "shape", None)
            if shape is None or len(shape) != 2 or shape[1] != info.num_classes:
                raise ValueError(
                    f"the last block outputs {shape or type(info.features).__name__}: without a "
                    f"classifier logits [batch, {info.num_classes}] are needed"
                )
        return CrossEntropyHead(info.classifier)
