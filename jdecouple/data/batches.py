"""Batches of a split: an endless reshuffled stream for training, one ordered pass to evaluate."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jdecouple._errors import require_int
from jdecouple.data.splits import Split

if TYPE_CHECKING:
    import grain

Batch = dict[str, np.ndarray]
# The examples of all batches of an epoch, and the lengths that their texts are padded to.
Plan = tuple[np.ndarray, np.ndarray | None]


def steps_per_epoch(split: Split, batch_size: int) -> int:
    """Number of full batches in one pass; the rest of a pass is dropped.

    Raises:
        ValueError: `batch_size` is not a whole number between 1 and the size of the split.
    """
    require_int(1, batch_size=batch_size)
    if batch_size > len(split):
        raise ValueError(
            f"batch_size is {batch_size}: the {split.name} split has {len(split)} examples"
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
    buckets: Sequence[int] = (),
    in_a_row: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Batches without end, the examples in a new order in each epoch.

    >>> from jdecouple.data import load
    >>> batches = train_batches(load("digits").train, 32, seed=0)
    >>> batch = next(batches)
    >>> batch["x"].shape, batch["label"].shape, batches.get_state()
    ((32, 8, 8, 1), (32,), {'next_index': 1})
    >>> batches.close()

    Batch number b is a function of the arguments and b alone, so an iterator resumes exactly from
    its state, `{"next_index": b}`. The order is drawn for an epoch at once with NumPy: grain's own
    per-element shuffle costs 1.5 ms of interpreter time a batch of 128, which is as long as a small
    model's step.

    Args:
        split: what to read.
        batch_size: examples a batch; an epoch drops the examples that fill no batch.
        seed: of the order, not negative.
        start: number of the first batch.
        threads: threads that read ahead (twice as many batches as threads).
        share: positions in a batch that are read, the same in all; the others are zero. By default
            all.
        buckets: rising lengths, the last that of the longest text. Texts of about the same length
            then make a batch, which is padded to the first of these lengths that holds them.
        in_a_row: batches of one bucket that follow one another; the last ones of a bucket are
            fewer.

    Returns:
        A grain iterator over `{"x": [batch_size, H, W, C], "label": int32 [batch_size]}`, of texts
        with x int32 [batch_size, length], with `get_state()`, `set_state(state)`
        (JSON-serialisable) and `close()`.

    Raises:
        ValueError: `batch_size` does not fit the split, `start` is negative, `in_a_row` is not
            positive, or the buckets do not hold all examples.
    """
    steps = steps_per_epoch(split, batch_size)
    require_int(0, start=start)
    require_int(1, in_a_row=in_a_row)
    if buckets and (longest := split.lengths.max()) > buckets[-1]:
        raise ValueError(f"buckets is {tuple(buckets)}: the longest example has {longest} words")

    @functools.lru_cache(maxsize=2)
    def plan(epoch: int) -> Plan:
        generator = np.random.Generator(np.random.PCG64([seed, epoch]))
        order = generator.permutation(len(split))
        if not buckets:
            return order[: steps * batch_size].reshape(steps, batch_size), None
        return _bucketed(order, split.lengths, buckets, batch_size, in_a_row, generator)

    def read(number: int) -> Batch:
        epoch, step = divmod(number, steps)
        rows, lengths = plan(epoch)
        batch = _gather(split, rows[step], share)
        return batch if lengths is None else {**batch, "x": batch["x"][:, : lengths[step]]}

    import grain  # training on batches of one's own works without it

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    iterator = iter(grain.MapDataset.range(sys.maxsize).map(read).to_iter_dataset(options))
    iterator.set_state({"next_index": start})
    return iterator


def _bucketed(
    order: np.ndarray,
    text_lengths: np.ndarray,
    buckets: Sequence[int],
    batch_size: int,
    in_a_row: int,
    generator: np.random.Generator,
) -> Plan:
    """Cuts an epoch into batches of one bucket each, so many `in_a_row`, else in random order.

    What fills no batch of a bucket goes up into the next, so that an epoch has as many batches as
    without buckets.
    """
    rows, lengths, runs, start = [], [], [], 0
    rest, bucket_of = order[:0], np.searchsorted(buckets, text_lengths[order])
    for number, length in enumerate(buckets):
        rest = np.concatenate([rest, order[bucket_of == number]])
        full = len(rest) // batch_size
        rows.append(rest[: full * batch_size].reshape(full, batch_size))
        lengths.append(np.full(full, length))
        runs += np.split(np.arange(start, start + full), range(in_a_row, full, in_a_row))
        start += full
        rest = rest[full * batch_size :]
    runs = [run for run in runs if len(run)]
    shuffled = np.concatenate([runs[number] for number in generator.permutation(len(runs))])
    return np.concatenate(rows)[shuffled], np.concatenate(lengths)[shuffled]


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
    require_int(1, batch_size=batch_size)
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
    rows = split.gather(indices[share if len(share) else [0]])
    batch = {name: np.zeros((len(indices), *x.shape[1:]), x.dtype) for name, x in rows.items()}
    for name, x in rows.items():
        batch[name][share] = x[: len(share)]
    return batch
