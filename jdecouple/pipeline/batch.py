"""What the Trainer takes in: batches like its example, cut into microbatches."""

import collections
import dataclasses
import functools
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdecouple._errors import first_line, require_int
from jdecouple.methods.routes import Carry


@dataclasses.dataclass(frozen=True)
class PlacedBatch:
    """One global batch or several on the devices; made by `Trainer.put`.

    Attributes:
        parts: one carry a microbatch, [batch, ...] or [T, batch, ...]; None on a process that does
            not run the first stage. With engine "spmd" the microbatches are stacked in one carry.
        count: T, or None for a batch that was given alone.
        made_for: what a trainer must agree in to take it.
    """

    parts: tuple[Carry | None, ...]
    count: int | None = None
    made_for: Any = None


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

    def checked(self, batch: Mapping[str, Any], labels: "LabelCheck") -> list[Carry]:
        """The microbatches of a batch that `as_arrays`, `labels` and `check_like` accept."""
        arrays = as_arrays(batch)
        check_like(arrays, self.example, any_size=False)
        labels(arrays["label"])
        return self.split(arrays)

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


def as_arrays(batch: Any) -> Carry:
    """Reads a batch {"x": [batch, ...], "label": [batch]} as NumPy and JAX arrays.

    Labels may be those of positions, [batch, length], -1 where one does not count.

    What NumPy can read becomes a NumPy array in one of JAX's dtypes: tensors, data frames, lists of
    numbers or of examples. A tensor on an accelerator becomes a JAX array where it is. The numbers
    of NumPy arrays are checked; those of JAX arrays are not, because waiting for a device would
    stall the pipeline.

    Raises:
        TypeError: not a mapping of arrays of numbers, or labels that are no integers.
        ValueError: wrong shapes, or numbers that are not finite or too large.
    """
    if not isinstance(batch, Mapping) or not {"x", "label"} <= batch.keys():
        given = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise TypeError(f"batch is {given}: a mapping with 'x' and 'label' is needed")
    if wrong := [key for key in batch if not isinstance(key, str)]:
        raise TypeError(f"batch has the key {wrong[0]!r}: keys are texts")
    labels = _array((jax.tree_util.DictKey("label"),), batch["label"])
    if not _is_a(labels.dtype, jnp.integer):
        raise TypeError(f"batch['label'] is of {labels.dtype}: an array of integers is needed")
    if labels.ndim not in (1, 2) or not labels.size:
        raise ValueError(
            f"batch['label'] has shape {labels.shape}: [batch] (or [batch, length]) is needed"
        )
    flat, structure = jax.tree_util.tree_flatten_with_path(
        {**batch, "label": labels}, is_leaf=functools.partial(_is_one, labels.shape[0])
    )
    arrays = [leaf if leaf is labels else _array(path, leaf) for path, leaf in flat]
    for (path, _), array in zip(flat, arrays, strict=True):
        if array.shape[:1] != labels.shape[:1]:
            raise ValueError(
                f"{_where(path)} has shape {array.shape}: {labels.shape[0]} labels were given"
            )
    return jax.tree.unflatten(structure, arrays)


def as_inputs(batch: Any, example: Mapping[str, Any] | None = None) -> Carry:
    """Reads {"x": [batch, ...]} as `as_arrays` does; its labels are zeros, whatever was given.

    The example tells a list of arrays from one array, and the dtype of labels.

    Raises:
        TypeError, ValueError: what `as_arrays` refuses.
    """
    if not isinstance(batch, Mapping) or "x" not in batch:
        given = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise TypeError(f"batch is {given}: a mapping with 'x' is needed")
    first, like = batch["x"], None if example is None else example["x"]
    while isinstance(first, Mapping) or (isinstance(like, list | tuple) and first):
        first, like = (_first_child(tree) for tree in (first, like))
    count = np.shape(first)[0] if np.shape(first) else 0
    if not count:
        raise ValueError("batch['x'] holds no examples")
    if example is None:
        return as_arrays({**batch, "label": np.zeros(count, np.int32)})
    label = example["label"]
    return as_arrays({**batch, "label": np.zeros((count, *label.shape[1:]), label.dtype)})


def each_batch(data: Any) -> Iterator:
    """The batches of data: of an iterable, or one alone; TypeError for what is neither."""
    if isinstance(data, Mapping):
        return iter([data])
    try:
        return iter(data)
    except TypeError:
        given = type(data).__name__
        raise TypeError(f"data is a {given}: batches or one batch are needed") from None


def _first_child(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return next(iter(tree.values()), None)
    return tree[0] if isinstance(tree, list | tuple) and tree else None


def _where(path: Any) -> str:
    return f"batch{jax.tree_util.keystr(path)}"


def _is_one(count: int, node: Any) -> bool:
    """Whether a node is to be read as one array: a list, unless it is of arrays [count, ...]."""
    if not isinstance(node, list | tuple):
        return isinstance(node, Iterator)
    while isinstance(node, list | tuple) and node:
        node = node[0]
    return np.shape(node)[:1] != (count,)


def _array(path: Any, leaf: Any) -> Any:
    """Reads one leaf of a batch."""
    if type(leaf) is not np.ndarray:
        if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
            return leaf
        leaf = _read(path, leaf)
        if not isinstance(leaf, np.ndarray):
            return leaf
    if not (_is_a(leaf.dtype, jnp.number) or leaf.dtype == bool):
        raise TypeError(f"{_where(path)} is of {leaf.dtype}: an array of numbers is needed")
    if leaf.dtype.itemsize >= 8 or not leaf.dtype.isnative:
        leaf = _converted(path, leaf)
    if _is_a(leaf.dtype, jnp.floating):
        _check_finite(path, leaf)
    return leaf


_is_a = functools.cache(jnp.issubdtype)


def _converted(path: Any, array: np.ndarray) -> np.ndarray:
    """The array in JAX's own dtype; ValueError for an integer that this cannot hold."""
    dtype = jax.dtypes.canonicalize_dtype(array.dtype.newbyteorder("="))
    if _is_a(dtype, jnp.integer) and array.size:
        for number in (int(array.min()), int(array.max())):
            if not np.iinfo(dtype).min <= number <= np.iinfo(dtype).max:
                raise ValueError(f"{_where(path)} holds {number}, which is no {dtype}")
    with np.errstate(over="ignore"):
        return array.astype(dtype, copy=False)


def _read(path: Any, leaf: Any) -> Any:
    try:
        return np.asarray(leaf)
    except Exception as error:  # tensors raise many kinds: on a device, with a gradient, bfloat16
        try:
            return jnp.from_dlpack(leaf)
        except Exception:  # what NumPy said is of more help
            raise TypeError(
                f"{_where(path)} is a {type(leaf).__name__} that cannot be read as an array: "
                f"{first_line(error)}"
            ) from error


def _check_finite(path: Any, leaf: np.ndarray) -> None:
    # The sum is finite unless an entry is not (or it overflows: then look closer).
    with np.errstate(over="ignore", invalid="ignore"):
        total = leaf.sum()
    if not np.isfinite(total) and not np.isfinite(leaf).all():
        example = int(np.argwhere(~np.isfinite(leaf))[0][0])
        raise ValueError(f"{_where(path)} is not finite at example {example}, as {leaf.dtype}")


class LabelCheck:
    """Looks for labels that are no class: on the host at once, on devices when they can be read.

    Waiting for a device would stall the pipeline, so labels that are still on their way there are
    looked at by a later call.
    """

    def __init__(self, num_classes: int):
        self._num_classes = num_classes
        self._waiting: collections.deque[Any] = collections.deque()
        self._lock = threading.Lock()  # batches may be put by one thread and used by another

    def __call__(self, labels: Any) -> None:
        """Raises ValueError for a label of these, or of earlier ones, that is no class."""
        if isinstance(labels, np.ndarray):
            check_labels(labels, self._num_classes)
        elif labels.is_fully_addressable:
            self._waiting.append(labels)
        self.look(labels)

    def look(self, newest: Any = None, *, wait: bool = False) -> None:
        """Looks at the labels that can be read by now, or at all; ValueError as in a call."""
        while self._waiting:
            with self._lock:
                if not self._waiting or not (wait or _is_ready(self._waiting[0])):
                    return
                labels = self._waiting.popleft()
            if not labels.is_deleted():
                earlier = "" if labels is newest else " (in a batch that was given before)"
                check_labels(labels, self._num_classes, earlier)


def _is_ready(array: Any) -> bool:
    return array.is_deleted() or array.is_ready()


def check_labels(labels: Any, num_classes: int, note: str = "") -> None:
    """Raises ValueError for a label that is no class; waits for a device.

    Of the labels of positions, [batch, length], -1 is none.
    """
    if isinstance(labels, jax.ShapeDtypeStruct):
        return
    numbers = np.asarray(labels)
    least = -1 if numbers.ndim > 1 else 0
    low, high = int(numbers.min()), int(numbers.max())
    if low < least or high >= num_classes:
        wrong = low if low < least else high
        raise ValueError(
            f"label {wrong} is out of range: {least} to {num_classes - 1} is allowed{note}"
        )


def check_like(batch: Mapping[str, Any], example: Mapping[str, Any], *, any_size: bool) -> None:
    """Raises ValueError unless a batch has the entries, shapes and dtypes of the example.

    Others would compile anew, or fail on another process. With `any_size` the number of examples
    may differ.
    """
    leaves, *structure = jax.tree.flatten(dict(batch))
    likes, *wanted_structure = jax.tree.flatten(dict(example))
    if structure == wanted_structure and all(
        leaf.dtype == like.dtype and leaf.shape[any_size:] == like.shape[any_size:]
        for leaf, like in zip(leaves, likes, strict=True)
    ):
        return  # of most batches; the texts below take longer

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
