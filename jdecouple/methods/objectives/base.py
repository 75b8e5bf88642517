"""The contract between objectives and routes, and the arithmetic that the losses share."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

from jdecouple.models.sequence import pooled


@dataclasses.dataclass(frozen=True)
class BlockInfo:
    """Where a head is attached.

    Attributes:
        index: Index of the block, from 0.
        num_blocks: Number of blocks of the model; of one that was grown, when it had got the block.
        features: Shape and dtype (`jax.ShapeDtypeStruct`, or a pytree of them) of the block's
            output, batch axis first. Of a sequence (see `jdecouple.models.sequence`) heads
            read the summary: `pooled(features)`.
        num_classes: Number of classes of the labels.
        classifier: The model's classifier (of then), or None.
        init: Initial weights of the head's layers, see `jdecouple.models.layers`.
        param_dtype: Dtype of the head's parameters.
        is_embedding: Whether the block is one that only embeds tokens or patches, and says so by an
            attribute `is_embedding`.
        input: Shape and dtype of the model's input, the first block's `carry["x"]`.
        embedding: What the block embeds its input by, where it begins with a module that does; a
            head that holds it shares its weights.
        received: Shape and dtype of what the block works on: its input, embedded where it does so.
        grown: Whether blocks were added behind those `num_blocks` later.
        above: Units behind it (see `jdecouple.models.cuts`), with their initial weights, of those
            `num_blocks`, and shapes of what each gives; of an objective without a `front` ().
        unit: Index of the block's last unit among those of all blocks.
    """

    index: int
    num_blocks: int
    features: Any
    num_classes: int
    classifier: nnx.Module | None = None
    init: str = "flax"
    param_dtype: Any = jnp.float32
    is_embedding: bool = False
    input: Any = None
    embedding: nnx.Module | None = None
    received: Any = None
    grown: bool = False
    above: tuple[tuple[nnx.Module, Any], ...] = ()
    unit: int = 0

    @property
    def is_last(self) -> bool:
        """Whether the block is the model's last, or was."""
        return self.index == self.num_blocks - 1

    @property
    def size(self) -> int:
        """Numbers in one example's flattened features, of a sequence in its summary.

        Raises:
            TypeError: They are neither one array nor a sequence.
        """
        features = pooled(self.features)
        if not hasattr(features, "shape"):
            raise TypeError(
                f"the output of block {self.index} is of type {type(features).__name__}: this "
                'objective needs one array (or a sequence with "summary")'
            )
        return math.prod(features.shape[1:])

    def options(self, rngs: nnx.Rngs) -> dict[str, Any]:
        """Arguments that all layers of `jdecouple.models.layers` with weights share."""
        return {"init": self.init, "param_dtype": self.param_dtype, "rngs": rngs}


class HeadOutput(NamedTuple):
    """What a head computes from its block's output in training.

    Attributes:
        loss: Scalar that block and head minimise, float32 at least.
        metrics: Terms of the loss by name, unweighted scalars.
        logits: `[batch, classes]` if the head is an exit, else None.
        carry: Entries, batch first, that the head adds to the carry for the blocks above, or
            replaces in it; no gradient flows back through them. "x" and "loss" are the routes'.
        labels: Of the logits, where these are not the carry's "label".
    """

    loss: jax.Array
    metrics: dict[str, jax.Array]
    logits: jax.Array | None
    carry: Mapping[str, Any] = {}
    labels: jax.Array | None = None


@runtime_checkable
class Head(Protocol):
    """Module that an objective adds to a block."""

    def __call__(self, features: Any, carry: Mapping[str, Any]) -> HeadOutput:
        """Loss of the block's output.

        Args:
            features: The block's output.
            carry: "label" holds int labels `[batch]`, "x" the block's input; what else there is
                came with the batch or from the heads below.
        """

    def logits(self, features: Any) -> jax.Array | None:
        """Logits `[batch, classes]` for evaluation; None if the head is no exit."""


@runtime_checkable
class Descending(Protocol):
    """A head whose answer comes down from the last block: evaluation visits it a second time."""

    def turn(self, features: Any) -> Any:
        """At the last block: what its output becomes before it comes down, batch first."""

    def descend(self, target: Any) -> Any:
        """What the block below gets for what came from above; below the first block, logits."""


@runtime_checkable
class Scaling(Protocol):
    """A head of which parts learn at another rate than the rest of the block.

    Attributes:
        lr_scales: Factor on the optimiser's updates, by the attribute of the head that holds the
            part.
    """

    lr_scales: Mapping[str, float]


@runtime_checkable
class Objective(Protocol):
    """What each block minimises; a subclass inherits the defaults, and may have a `front`.

    The objectives of this package are frozen dataclasses, which raise ValueError for an argument
    that is not allowed.

    Attributes:
        needs_classifier: The objective cannot do without the model's classifier.
        trains_classifier: Its last head trains the model's classifier, where there is one, and
            holds it as its attribute `classifier`.
        tokens: What labels of positions, as those of language models, are to it, see
            `jdecouple.methods.objectives.tokens`: "all" are examples, or some that are "drawn" (as
            many of a row as the objective's `positions` says), or it has "none".
        follows_above: Heads have averages of weights of the block above, see
            `jdecouple.methods.objectives.following`.
    """

    needs_classifier: ClassVar[bool] = False
    trains_classifier: ClassVar[bool] = True
    tokens: ClassVar[str] = "all"
    follows_above: ClassVar[bool] = False

    def head(self, info: BlockInfo, rngs: nnx.Rngs) -> nnx.Module | None:
        """Returns the `Head` for a block, or None if the block has no loss of its own."""

    def whole_head(self, info: BlockInfo, rngs: nnx.Rngs) -> nnx.Module | None:
        """Returns a `Head` that reads activations of positions, and their labels, as they are.

        None, here always: `head` gets positions as examples.
        """
        return None


@runtime_checkable
class Fronted(Protocol):
    """An objective whose heads do not read a block's output, but what layers make of it.

    The layers get whole sequences, where a head has their positions or their summary.
    """

    def front(self, info: BlockInfo, rngs: nnx.Rngs) -> nnx.Module | None:
        """Layers between a block and its head, or None."""


def unfit_target(target: Any) -> str | None:
    """What a target is that cannot be reconstructed; None of arrays of floats or bytes."""
    dtype = getattr(target, "dtype", None)
    if dtype is None:
        entries = f" of {', '.join(target)}" if isinstance(target, dict) else ""
        return f"{type(target).__name__}{entries}"
    fits = jnp.issubdtype(dtype, jnp.floating) or dtype == jnp.uint8
    return None if fits else f"{dtype}{list(target.shape)}"


def at_least_float32(x: jax.Array) -> jax.Array:
    """`x` in its own dtype or float32, whichever is wider: losses are not for half precision."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def normalized_rows(x: jax.Array, *, floor: float = 0.0, epsilon: float = 0.0) -> jax.Array:
    """Rows of `x` `[rows, dim]` divided by `max(norm, floor) + epsilon`, with a finite gradient.

    A row of zeros stays zeros and, having no direction, gets the gradient zero.
    """
    squares = jnp.sum(x * x, axis=1, keepdims=True)
    nonzero = squares > 0
    norm = jnp.sqrt(jnp.where(nonzero, squares, 1))
    return jnp.where(nonzero, x / (jnp.maximum(norm, floor) + epsilon), 0)


def inner_products(x: jax.Array) -> jax.Array:
    """`x x'` for `x` `[rows, dim]`, in full precision on accelerators too."""
    return jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST)


def check_batch(z: jax.Array, labels: jax.Array, *, least: int = 1) -> None:
    """Raises ValueError unless `z` is `[batch, dim]`, `labels` `[batch]` and batch >= `least`."""
    if z.ndim != 2 or labels.shape != z.shape[:1]:
        raise ValueError(
            f"z is {z.shape} and labels {labels.shape}: [batch, dim] and [batch] are needed"
        )
    if z.shape[0] < least:
        raise ValueError(f"the batch has {z.shape[0]} examples: at least {least} are needed")
