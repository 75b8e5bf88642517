"""Metrics of a step in few arrays, which are cut when they are read."""

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class JoinedMetrics:
    """Metrics as a compiled call gives them: an array that it gives costs the host time.

    Attributes:
        arrays: [..., n], one for every dtype.
        names: of the entries of each.
        single: those that are not joined.
    """

    arrays: tuple[jax.Array, ...]
    single: dict[str, jax.Array]
    names: tuple[tuple[str, ...], ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, metrics: Mapping[str, jax.Array], single: Collection[str] = ()) -> "JoinedMetrics":
        """Joins traced scalars, or arrays [T], but for the `single` ones."""
        names = defaultdict(list)
        for name, value in metrics.items():
            if name not in single:
                names[str(value.dtype)].append(name)
        return cls(
            tuple(jnp.stack([metrics[name] for name in own], axis=-1) for own in names.values()),
            {name: metrics[name] for name in single if name in metrics},
            tuple(map(tuple, names.values())),
        )


class StepMetrics(Mapping[str, jax.Array]):
    """Metrics of a step by their names, as futures: reading one does not wait for the step."""

    def __init__(self, parts: Iterable["JoinedMetrics | Mapping[str, jax.Array]"]):
        self._parts = tuple(parts)

    @cached_property
    def _places(self) -> dict[str, tuple[jax.Array, int | None]]:
        """Found when a metric is read: most steps' never are."""
        places: dict[str, tuple[jax.Array, int | None]] = {}
        for part in self._parts:
            if isinstance(part, StepMetrics):
                places |= part.places()
            elif isinstance(part, JoinedMetrics):
                for array, names in zip(part.arrays, part.names, strict=True):
                    places |= {name: (array, i) for i, name in enumerate(names)}
                places |= {name: (value, None) for name, value in part.single.items()}
            else:
                places |= {name: (value, None) for name, value in part.items()}
        self._parts = ()
        return places

    def __getitem__(self, name: str) -> jax.Array:
        array, index = self._places[name]
        if index is not None:
            with jax.debug_nans(False):  # one that does not exist is nan
                array = jax.lax.dynamic_index_in_dim(_own(array), index, -1, keepdims=False)
            self._places[name] = array, None
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        return repr(dict(self))

    def without(self, name: str) -> "StepMetrics":
        """All but one, whether or not it is there."""
        others = StepMetrics(())
        others._places = {key: place for key, place in self._places.items() if key != name}
        return others

    def places(self) -> Mapping[str, tuple[jax.Array, int | None]]:
        """The array that each is in, and its number there; None where it is alone."""
        return self._places


jax.tree_util.register_pytree_with_keys(
    StepMetrics,
    lambda metrics: (
        [(jax.tree_util.DictKey(name), metrics[name]) for name in sorted(metrics)],
        tuple(sorted(metrics)),
    ),
    lambda names, values: StepMetrics([dict(zip(names, values, strict=True))]),
)


def on_host(rows: Sequence[StepMetrics]) -> list[dict[str, np.ndarray]]:
    """Metrics of several calls, for which it waits."""
    arrays = {id(array): array for row in rows for array, _ in row.places().values()}
    found = jax.device_get({key: _own(array) for key, array in arrays.items()})

    def entry(array: jax.Array, index: int | None) -> np.ndarray:
        return found[id(array)] if index is None else found[id(array)][..., index]

    return [{name: entry(*place) for name, place in row.places().items()} for row in rows]


def _own(array: Any) -> Any:
    """The array, which every device has, on one of this process."""
    return array.addressable_data(0) if isinstance(array, jax.Array) else array
