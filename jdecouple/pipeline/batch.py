"""What the Trainer takes in: batches like its example, cut into microbatches."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdecouple._errors import require_int
from jdecouple.methods.routes import Carry


@dataclasses.dataclass(frozen=True)
class PlacedBatch:
    """One global batch or several on the devices; made by `Trainer.put`.

    Attributes:
        parts: one carry a microbatch, [batch, ...] or [T, batch, ...]; None on a process that does
            not run the first stage. With engine "spmd" the microbatches are stacked in one carry.
        count: T, or None for a batch that was given alone.
    """

    parts: tuple[Carry | None, ...]
    count: int | None = None


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """Checks and cuts global batches.

    Attributes:
        example: `jax.ShapeDtypeStruct`s of a batch.
        microbatches: M.
        replicas: into which every microbatch must divide.
    """

    example: Carry
    microbatches: int
    replicas: int

    def __post_init__(self) -> None:
        require_int(1, microbatches=self.microbatches)

    def checked(self, batch: Mapping[str, Any], num_classes: int) -> list[Carry]:
        """The microbatches of a batch that `check_batch` and `check_like` accept."""
        check_batch(batch, num_classes)
        check_like(batch, self.example, any_size=False)
        return self.split(batch)

    def split(self, batch: Mapping[str, Any]) -> list[Carry]:
        """Cuts a batch (of arrays or of shapes) into microbatches; ValueError if it cannot."""
        count, parts = batch["label"].shape[0], self.microbatches
        if count % (parts * self.replicas):
            raise ValueError(
                f"a batch of {count} does not divide into {parts} microbatch(es) on "
                f"{self.replicas} replica(s)"
            )
        size = count // parts

        def cut(leaf: Any, part: int) -> Any:
            if isinstance(leaf, jax.ShapeDtypeStruct):
                return jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype)
            return leaf if parts == 1 else leaf[part * size : (part + 1) * size]

        return [
            jax.tree.map(lambda leaf, part=part: cut(leaf, part), dict(batch))
            for part in range(parts)
        ]


def check_batch(batch: Any, num_classes: int | None = None) -> None:
    """Checks a batch {"x": [batch, ...], "label": [batch]}; its numbers where they are on the host.

    Raises:
        TypeError: not a mapping of arrays, or labels that are no integers.
        ValueError: wrong shapes, labels outside `num_classes`, non-finite numbers.
    """
    if not isinstance(batch, Mapping) or not {"x", "label"} <= batch.keys():
        given = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise TypeError(f"batch is {given}: a mapping with 'x' and 'label' is needed")
    labels = batch["label"]
    if not hasattr(labels, "dtype") or not jnp.issubdtype(labels.dtype, jnp.integer):
        given = getattr(labels, "dtype", type(labels).__name__)
        raise TypeError(f"batch['label'] is of {given}: an array of integers is needed")
    if labels.ndim != 1 or not labels.shape[0]:
        raise ValueError(f"batch['label'] has shape {labels.shape}: [batch] is needed")
    for path, leaf in jax.tree_util.tree_leaves_with_path(dict(batch)):
        where = f"batch{jax.tree_util.keystr(path)}"
        if not hasattr(leaf, "shape") or leaf.shape[:1] != labels.shape:
            given = getattr(leaf, "shape", type(leaf).__name__)
            raise ValueError(f"{where} has shape {given}: {labels.shape[0]} labels were given")
        _check_finite(where, leaf)
    check_labels(labels, num_classes)


def check_labels(labels: Any, num_classes: int | None) -> None:
    """Raises ValueError for a label on the host that is no class."""
    if isinstance(labels, np.ndarray) and num_classes is not None:
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes:
            wrong = low if low < 0 else high
            raise ValueError(f"label {wrong} is out of range: 0 to {num_classes - 1} is allowed")


def _check_finite(where: str, leaf: Any) -> None:
    """Looks at host arrays alone: waiting for a device would stall the pipeline."""
    if not isinstance(leaf, np.ndarray) or not np.issubdtype(leaf.dtype, np.floating):
        return
    # The sum is finite unless an entry is not (or it overflows: then look closer).
    with np.errstate(over="ignore", invalid="ignore"):
        total = leaf.sum()
    if not np.isfinite(total) and not np.isfinite(leaf).all():
        example = int(np.argwhere(~np.isfinite(leaf))[0][0])
        raise ValueError(f"{where} is not finite at example {example}")


def check_like(batch: Mapping[str, Any], example: Mapping[str, Any], *, any_size: bool) -> None:
    """Raises ValueError unless a batch has the entries, shapes and dtypes of the example.

    Others would compile anew, or fail on another process. With `any_size` the number of examples
    may differ.
    """

    def listing(tree: Mapping[str, Any]) -> str:
        leaves = jax.tree_util.tree_leaves_with_path(dict(tree))
        return ", ".join(
            f"{jax.tree_util.keystr(path, simple=True)} {_type(leaf, any_size)}"
            for path, leaf in leaves
        )

    given, wanted = listing(batch), listing(example)
    if given != wanted:
        raise ValueError(f"the batch holds {given}: the example held {wanted}")


def _type(leaf: Any, any_size: bool) -> str:
    sizes = ["batch" if any_size else str(leaf.shape[0]), *map(str, leaf.shape[1:])]
    return f"{jax.dtypes.canonicalize_dtype(leaf.dtype)}[{', '.join(sizes)}]"
