"""The model's last units between every block and its head (after OpenReview Wqbi2pUcvb, SegProp).

SegProp trains one segment of a net after the other, each together with the net's last layers, so
that no segment learns without them. Here all blocks train at the same time. The loss of a block is
read behind copies of the last units, whose weights are those of the model, not learned by this loss
and as many batches late as there are blocks between: they come down from block to block. The last
block alone trains the units; every block keeps a head of its own behind them.
"""

from flax import nnx

from jdecouple._errors import first_line
from jdecouple.methods.objectives.base import BlockInfo
from jdecouple.methods.objectives.following import follow
from jdecouple.models.cuts import Chain
from jdecouple.models.renewal import output_of, spelled


def attached_top(info: BlockInfo, count: int) -> nnx.Module | None:
    """Copies of the last `count` units, of those above a block; None for the last block.

    Raises:
        ValueError: They do not take what the block gives.
    """
    if not info.above:
        return None
    start = max(0, len(info.above) - count)
    copies = []
    for number, (unit, _) in enumerate(info.above[start:], info.unit + 1 + start):
        copies.append(nnx.clone(unit))
        follow(copies[-1], number, momentum=0.0)
    top = Chain(*copies)
    if top.inputs:
        raise ValueError(f"a last unit reads {top.inputs[0]!r}, which attached copies cannot")
    try:
        output_of(top, info.features)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"attached is {count}: the last units fail on what block {info.index} gives, "
            f"{spelled(info.features)}: {first_line(error)}"
        ) from error
    return top
