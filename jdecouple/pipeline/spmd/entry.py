"""Numbers that are read from an array of many, when they are needed."""

from typing import Any

import jax
import numpy as np


class Entry(np.lib.mixins.NDArrayOperatorsMixin):
    """One entry of an array that may not have been computed yet, or several below one another.

    It converts like a scalar of `jax.Array` does: by `float()`, format, `jax.device_get` and
    `jnp.asarray`; operators and NumPy's functions convert it too. To cut it out on the device would
    cost a dispatch for every number.

    Args:
        table: the array.
        index: row (or a slice of rows) and column.
    """

    __slots__ = ("_index", "_table")

    def __init__(self, table: Any, index: tuple[Any, int]):
        self._table, self._index = table, index

    def column(self, count: int) -> "Entry":
        """So many entries from this one on downwards."""
        row, column = self._index
        return Entry(self._table, (slice(row, row + count), column))

    @property
    def shape(self) -> tuple[int, ...]:
        """() of one entry, [count] of several."""
        row = self._index[0]
        return (row.stop - row.start,) if isinstance(row, slice) else ()

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the scalar."""
        return self._table.dtype

    def is_ready(self) -> bool:
        """Whether it has been computed."""
        return self._table.is_ready()

    def block_until_ready(self) -> "Entry":
        """Waits until it has been computed."""
        self._table.block_until_ready()
        return self

    def copy_to_host_async(self) -> None:
        """Begins to bring it to the host."""
        self._table.copy_to_host_async()

    def item(self) -> float:
        """The number; waits for it."""
        return np.asarray(self._table)[self._index].item()

    def __float__(self) -> float:
        return float(self.item())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(np.asarray(self._table)[self._index], dtype)

    def __jax_array__(self) -> jax.Array:
        return self._table[self._index]

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        plain = (np.asarray(each) if isinstance(each, Entry) else each for each in inputs)
        return getattr(ufunc, method)(*plain, **options)

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec)

    def __bool__(self) -> bool:
        return bool(self.item())

    def __repr__(self) -> str:
        return repr(self.__array__())
