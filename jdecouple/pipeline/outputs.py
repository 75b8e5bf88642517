"""Shapes of what the blocks of a net give."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

from jdecouple._errors import first_line
from jdecouple.methods.routes import Carry, Unit
from jdecouple.models.channels import NO_CHANNELS, Alive, alive, handed_entries
from jdecouple.models.renewal import spelled


class Output(NamedTuple):
    """Shapes of what a block gives: its output, the "x" behind it; and the channels around it."""

    features: Any
    sent: Any
    channels: Alive


def block_outputs(blocks: Sequence[nnx.Module], carry: Carry, dtype: Any = None) -> list[Any]:
    """Shapes of what every block gives, from those of the carry that the first receives.

    Raises:
        ValueError: a block fails.
    """
    return [output.features for output in outputs_of_blocks(blocks, carry, dtype)]


def outputs_of_blocks(blocks: Sequence[nnx.Module], carry: Carry, dtype: Any) -> list[Output]:
    """Shapes of what every block gives, and its channels; as `block_outputs`."""
    outputs: list[Output] = []
    for index, (block, channels) in enumerate(zip(blocks, alive(blocks), strict=True)):
        if both := [name for name in handed_entries(block) if name in carry]:
            raise ValueError(f"block {index} hands on {both[0]!r}, which the batch has: rename one")
        received = {**carry, "x": outputs[-1].sent} if outputs else carry
        outputs.append(block_output(index, block, received, dtype, channels))
    return outputs


def block_output(
    index: int, block: nnx.Module, carry: Carry, dtype: Any, channels: Alive = NO_CHANNELS
) -> Output:
    """Shapes of what a block gives for those of its carry; ValueError where the block fails."""
    unit = Unit.build(index, block, None, dtype, channels)
    if missing := [name for name in unit.entries if name not in carry]:
        raise ValueError(
            f"block {index} ({type(block).__name__}) reads {missing[0]!r}: the batch holds "
            f"{', '.join(sorted(carry))}, and no block before hands it on"
        )
    read = {name: carry[name] for name in unit.entries}
    try:
        sent = jax.eval_shape(
            lambda params, stats, read: unit.train(params, stats, read, jax.random.key(0))[0],
            *jax.eval_shape(unit.initial),
            read,
        )
        return Output(unit.features(sent), sent, channels)
    except (TypeError, ValueError) as error:
        x = carry["x"] if len(read) == 1 else read
        raise ValueError(
            f"block {index} ({type(block).__name__}) fails on an input of {spelled(x)}: "
            f"{first_line(error)}"
        ) from error
