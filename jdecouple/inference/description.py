"""What a network is, without its weights and its data: kept with every checkpoint of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jdecouple import methods, models
from jdecouple.data.inputs import Inputs, Numbers, from_json
from jdecouple.growth import phases
from jdecouple.methods import Method
from jdecouple.pipeline import build

FORMAT = 1


class Network(NamedTuple):
    """What a description stands for, with initial weights.

    Attributes:
        model: blocks and classifier.
        method: what the heads are from.
        built: the units of the blocks, and shapes of what they receive.
    """

    model: models.Model
    method: Method
    built: build.BuiltModel


@dataclasses.dataclass(frozen=True)
class Description:
    """All that it takes to build a trained network again.

    Attributes:
        inputs: what it reads.
        class_names: what it tells apart.
        model: name of the builder, and all of its options.
        method: name of the method, and all of its arguments.
        seed: of the run; the keys of heads and of initial weights.
        dtype: compute dtype, None for that of the weights.
        boundaries: index of the first block of every stage.
        batch_size: examples of a batch in evaluation.
        growth: numbers of blocks of a network that grows, in turn; () if it does not.
        num_blocks: which of these it had.
    """

    inputs: Inputs
    class_names: Sequence[str]
    model: tuple[str, Mapping[str, Any]]
    method: tuple[str, Mapping[str, Any]]
    seed: int
    dtype: str | None
    boundaries: tuple[int, ...]
    batch_size: int
    growth: tuple[int, ...] = ()
    num_blocks: int = 0

    def build(self) -> Network:
        """Builds the network.

        Raises:
            ValueError: a model or method of that name is not registered, or takes other arguments.
        """
        inputs, name, options = self.inputs, *self.model
        method = methods.get(self.method[0], **self.method[1])
        rngs = nnx.Rngs(self.seed)
        num_classes = len(self.class_names)
        model = models.get(name)(num_classes, **inputs.model_arguments(), **options, rngs=rngs)
        transform = inputs.transform("none")
        carry = build.model_input(build.abstract(self.example()), transform)
        if self.growth:
            grown = phases(model, method, self.growth, carry, num_classes, seed=self.seed)
            model = grown[self.growth.index(self.num_blocks)]
        dtype = None if self.dtype is None else jnp.dtype(self.dtype)
        built = build.build_units(model, method, carry, num_classes, self.seed, dtype)
        return Network(model, method, built)

    def example(self) -> dict[str, Any]:
        """Shapes of a batch in evaluation."""
        shape, dtype = self.inputs.example
        entries = self.inputs.entries(np.empty((self.batch_size, *shape), dtype))
        shape = (self.batch_size, *self.inputs.label_shape)
        return build.abstract(entries | {"label": np.empty(shape, np.int32)})

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads; options that JSON does not hold are left out."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for owner in ("model", "method"):
            name, options = values[owner]
            plain = {key: value for key, value in options.items() if _is_plain(value)}
            values[owner] = {"name": name, "arguments": plain}
        names = self.class_names
        values["class_names"] = len(names) if isinstance(names, Numbers) else list(names)
        return {"format": FORMAT, **values, "inputs": self.inputs.to_json()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Description:
        """The description that `to_json` wrote; ValueError for one of a later version."""
        values = {key: _tuples(entry) for key, entry in value.items()}
        if (number := values.pop("format")) != FORMAT:
            raise ValueError(f"its description has format {number}: this program reads {FORMAT}")
        for owner in ("model", "method"):
            values[owner] = values[owner]["name"], values[owner]["arguments"]
        if isinstance(names := values["class_names"], int):
            values["class_names"] = Numbers(names)
        return cls(**values | {"inputs": from_json(value["inputs"])})


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _tuples(value: Any) -> Any:
    """The tuples that JSON made lists."""
    if isinstance(value, Mapping):
        return {key: _tuples(entry) for key, entry in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
