"""SCPL's objective: a supervised contrastive loss at every block (arXiv 2602.00062)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jdecouple._errors import require_bool, require_int, require_number, require_one_of
from jdecouple.methods.objectives.base import (
    BlockInfo,
    HeadOutput,
    Objective,
    at_least_float32,
    check_batch,
    inner_products,
    normalized_rows,
)
from jdecouple.methods.objectives.cross_entropy import cross_entropy
from jdecouple.methods.objectives.maps import pool_maps, pooled_info
from jdecouple.methods.objectives.tokens import POSITIONS
from jdecouple.models import layers


def supervised_contrastive(
    z: jax.Array, labels: jax.Array, temperature: float = 0.1, *, count_self: bool = True
) -> jax.Array:
    """Supervised contrastive loss.

    >>> z = jnp.array([[1.0, 0.0], [2.0, 0.1], [0.0, 3.0]])
    >>> for labels in ([0, 0, 1], [0, 1, 1]):  # the second pairs examples that point apart
    ...     print(f"{supervised_contrastive(z, jnp.array(labels)):.3f}")
    0.000
    1.660

    Rows are L2-normalised. An example's loss is minus the sum, over the *other* examples of its
    class, of the log-probability of that example among all others, divided by the size of its
    class. SCPL's code counts the example itself as well, InfoPro's does not. An example alone in
    its class contributes 0.

    Args:
        z: `[batch, dim]`, not yet normalised.
        labels: `[batch]`, int.
        temperature: Divisor of the cosines, positive.
        count_self: Whether the size of a class includes the example itself.

    Returns:
        Scalar, mean over the batch, float32 at least.

    Raises:
        ValueError: The shapes do not fit or the temperature is not positive.
    """
    check_batch(z, labels)
    require_number(positive=True, temperature=temperature)
    logits = inner_products(normalized_rows(at_least_float32(z), floor=1e-12)) / temperature
    others = ~jnp.eye(z.shape[0], dtype=bool)
    # In a batch of one nothing is left to sum over; any finite stand-in will do, it gets no weight.
    candidates = others if z.shape[0] > 1 else ~others
    log_probability = logits - jax.nn.logsumexp(logits, axis=1, keepdims=True, where=candidates)
    same = labels[:, None] == labels[None, :]
    positives = same & others
    total = jnp.sum(jnp.where(positives, log_probability, 0), axis=1)
    count = jnp.sum(same if count_self else positives, axis=1)
    return -jnp.mean(total / jnp.maximum(count, 1))


class SupervisedContrastiveHead(nnx.Module):
    """Projector under the contrastive loss; at the last block the model's classifier as well."""

    def __init__(self, objective: "SupervisedContrastive", info: BlockInfo, rngs: nnx.Rngs):
        self.temperature = objective.temperature
        self.count_self = objective.count_self
        self.head_pool = objective.head_pool
        size = pooled_info(info, self.head_pool).size
        hidden, out = objective.hidden, objective.features
        widths = {"mlp": (hidden, out), "linear": (out,), "identity": ()}[objective.projector]
        self.projector = layers.perceptron(size, widths, **info.options(rngs))
        self.classifier = info.classifier if info.is_last else None

    def __call__(self, features: Any, carry: Mapping[str, Any]) -> HeadOutput:
        """Loss of `features` `[batch, ...]`, or a sequence, under `carry["label"]`."""
        labels = carry["label"]
        z = self.projector(pool_maps(features, self.head_pool))
        loss = supervised_contrastive(z, labels, self.temperature, count_self=self.count_self)
        metrics = {"contrastive": loss}
        logits = self.logits(jax.lax.stop_gradient(features))
        if logits is not None:
            metrics["cross_entropy"] = cross_entropy(logits, labels)
            loss = loss + metrics["cross_entropy"]
        return HeadOutput(loss, metrics, logits)

    def logits(self, features: Any) -> jax.Array | None:
        """Logits `[batch, classes]` at the last block, else None."""
        return None if self.classifier is None else self.classifier(features)


@dataclasses.dataclass(frozen=True)
class SupervisedContrastive(Objective):
    """Supervised contrastive loss of every block's projected output.

    The last head also trains the model's classifier, by cross-entropy on the detached features.

    Attributes:
        projector: "mlp" (flatten, dense `hidden`, ReLU, dense `features`), "linear" (flatten, dense
            `features`) or "identity" (flatten).
        hidden: Width of the hidden layer of "mlp".
        features: Width of the projector's output.
        temperature: Divisor of the cosines.
        count_self: Whether the loss divides by the count of a class that includes the example.
        head_pool: Average maps over this many bins a side before the projector; 0: do not, as in
            the paper. The classifier reads the whole map.
        positions: Positions of every row that are drawn as examples where labels are those of
            positions, as in language models.
    """

    projector: str = "mlp"
    hidden: int = 512
    features: int = 1024
    temperature: float = 0.1
    head_pool: int = 0
    count_self: bool = True
    positions: int = POSITIONS
    tokens: ClassVar[str] = "drawn"
    needs_classifier: ClassVar[bool] = True

    def __post_init__(self):
        require_one_of(("mlp", "linear", "identity"), projector=self.projector)
        require_int(1, hidden=self.hidden, features=self.features)
        require_number(positive=True, temperature=self.temperature)
        require_int(0, head_pool=self.head_pool)
        require_bool(count_self=self.count_self)
        require_int(1, positions=self.positions)

    def head(self, info: BlockInfo, rngs: nnx.Rngs) -> nnx.Module:
        """Head for any block.

        Raises:
            ValueError: The model has no classifier.
        """
        if info.is_last and info.classifier is None:
            raise ValueError("the contrastive objective needs a model with a classifier")
        return SupervisedContrastiveHead(self, info, rngs)
