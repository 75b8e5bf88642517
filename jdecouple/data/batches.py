"""Batches of a split: an endless reshuffled stream for training, one ordered pass to evaluate."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from jdecouple.data.splits import Split

Batch = dict[str, np.ndarray]


def steps_per_epoch(split: Split, batch_size: int) -> int:
    """Number of full batches in one pass; the rest of a pass is dropped.

    Raises:
        ValueError: `batch_size` is not a whole number between 1 and the size of the split.
    """
    _check_batch_size(batch_size)
    if batch_size > len(split):
        raise ValueError(
            f"batch_size={batch_size} given; the {split.name} split has {len(split)} examples"
        )
    return len(split) // batch_size


def train_batches(
    split: Split,
    batch_size: int,
    *,
    seed: int,
    start: int = 0,
    threads: int = 2,
    share: np.ndarray | None = None,
) -> grain.DatasetIterator[Batch]:
    """Batches without end, the examples in a new order in each epoch.

    Batch number b is a function of the split, `batch_size`, `seed` and b alone, so an iterator
    resumes exactly from its state, `{"next_index": b}`. The order is drawn for a whole epoch at
    once with NumPy: grain's own per-element shuffle costs 1.5 ms of interpreter time a batch of
    128, which is as long as a small model's step.

    Args:
        split: what to read.
        batch_size: examples a batch; an epoch drops the examples that fill no batch.
        seed: of the order, not negative.
        start: number of the first batch.
        threads: threads that read ahead (twice as many batches as threads).
        share: positions in a batch that are read, the same in all; the others are zero. By default
            all.

    Returns:
        A grain iterator over `{"x": [batch_size, H, W, C], "label": int32 [batch_size]}` with
        `get_state()`, `set_state(state)` (JSON-serialisable) and `close()`.

    Raises:
        ValueError: `batch_size` does not fit the split, or `start` is negative.
    """
    steps = steps_per_epoch(split, batch_size)
    if start < 0:
        raise ValueError(f"start={start} given; a batch number of at least 0 wanted")

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        generator = np.random.Generator(np.random.PCG64([seed, epoch]))
        return generator.permutation(len(split))

    def read(number: int) -> Batch:
        epoch, step = divmod(number, steps)
        return _gather(split, order(epoch)[step * batch_size : (step + 1) * batch_size], share)

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    iterator = iter(grain.MapDataset.range(sys.maxsize).map(read).to_iter_dataset(options))
    iterator.set_state({"next_index": start})
    return iterator


def evaluation_batches(
    split: Split, batch_size: int, *, share: np.ndarray | None = None
) -> Iterator[Batch]:
    """One pass in order; the last batch holds what is left.

    Args:
        split: what to read.
        batch_size: examples a batch.
        share: positions in a full batch that are read; the others are zero, as are all positions
            of the last batch without any share. By default all.

    Raises:
        ValueError: `batch_size` is not a whole number of at least 1, or the split is empty.
    """
    _check_batch_size(batch_size)
    if not len(split):
        raise ValueError(f"the {split.name} split is empty")

    def read(first: int) -> Batch:
        indices = np.arange(first, min(first + batch_size, len(split)))
        cut = share is not None and len(share) and len(indices) < batch_size
        return _gather(split, indices, None if cut else share)

    return map(read, range(0, len(split), batch_size))


def _gather(split: Split, indices: np.ndarray, share: np.ndarray | None) -> Batch:
    """Examples of a split; where there is a share, it alone is read, and the rest is zero."""
    if share is None or len(share) == len(indices):
        return split.gather(indices)
    # With no share one example is read nevertheless, to tell the shapes.
    found = split.gather(indices[share if len(share) else [0]])
    batch = {name: np.zeros((len(indices), *x.shape[1:]), x.dtype) for name, x in found.items()}
    for name, leaf in found.items():
        batch[name][share] = leaf[: len(share)]
    return batch


def _check_batch_size(batch_size: Any) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} given; a whole number of at least 1 wanted")
