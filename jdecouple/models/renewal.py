"""Fresh copies of blocks, of which auxiliary nets are made."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
from flax import nnx

from jdecouple._errors import first_line
from jdecouple.models.channels import handed_entries, read_entries
from jdecouple.models.cuts import Chain


@runtime_checkable
class Renewable(Protocol):
    """A block that can be made anew for activations of another shape."""

    def anew(self, received: Any, output: Any, **options: Any) -> nnx.Module:
        """A fresh block of its kind.

        Args:
            received: shapes of what it gets.
            output: shapes of what this block gives in its own place: the fresh one has as many
                channels, and as many pixels as it comes to.
            **options: `init`, `param_dtype` and `rngs`.
        """


def units_of(blocks: Iterable[nnx.Module]) -> list[nnx.Module]:
    """The units of blocks in a row: those of a local module, or a block itself."""
    found: list[Any] = []
    for block in blocks:
        found += block.layers if isinstance(block, Chain) else [block]
    return found


def outputs_of(blocks: Sequence[nnx.Module], outputs: Sequence[Any], received: Any) -> list[Any]:
    """Shapes of what the units of blocks give, from those of blocks and of what the first gets."""
    found: list[Any] = []
    for block, output in zip(blocks, outputs, strict=True):
        for unit in units_of([block])[:-1]:
            received = output_of(unit, received)
            found.append(received)
        received = output
        found.append(output)
    return found


def output_of(block: nnx.Module, received: Any) -> Any:
    """Shapes of what a block gives for shapes of what it gets."""
    block = nnx.clone(block)
    block.eval()
    return jax.eval_shape(block, received)


def spelled(shapes: Any) -> Any:
    """Shapes as an error tells them, such as "float32[8, 3]" for every leaf."""
    return jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", shapes)


def redrawn(block: nnx.Module, rngs: nnx.Rngs) -> nnx.Module:
    """A copy whose weights are drawn as those of the block were: its own, in another order.

    Rows of weights of two axes and more, all axes but the last, change places: so each is as likely
    as the first, whatever drew it. Vectors, such as biases and scales, stay as they are.
    """
    copy = nnx.clone(block)
    for _, variable in nnx.to_flat_state(nnx.state(copy, nnx.Param)):
        value = variable.get_value()
        if value.ndim > 1:
            rows = jax.random.permutation(rngs.params(), value.reshape(-1, value.shape[-1]))
            variable.set_value(rows.reshape(value.shape))
    return copy


def renewed(block: nnx.Module, received: Any, output: Any, **options: Any) -> nnx.Module:
    """A fresh copy of a block that takes `received`; the arguments are those of `Renewable.anew`.

    Raises:
        ValueError: the block is not `Renewable` and fails on it, or reads or hands on entries.
    """
    name = type(block).__name__
    if entries := (*read_entries(block), *handed_entries(block)):
        raise ValueError(f"a block ({name}) shares {entries[0]!r} with others: its copies cannot")
    if isinstance(block, Renewable):
        return block.anew(received, output, **options)
    copy = redrawn(block, options["rngs"])
    try:
        output_of(copy, received)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"a copy of a block ({name}) fails on {spelled(received)}, and it has no method anew: "
            f"{first_line(error)}"
        ) from error
    return copy
