"""AugLocal's objective: cross-entropy of layers such as those above (arXiv 2402.17318)."""

import dataclasses
from typing import ClassVar

from flax import nnx

from jdecouple._errors import require_int, require_number
from jdecouple.methods.objectives.base import BlockInfo, Objective
from jdecouple.methods.objectives.cross_entropy import CrossEntropy, CrossEntropyHead
from jdecouple.methods.objectives.exits import normed
from jdecouple.methods.objectives.maps import is_map
from jdecouple.models import layers
from jdecouple.models.cuts import Chain
from jdecouple.models.renewal import output_of, renewed
from jdecouple.models.sequence import pooled


def spaced(first: int, count: int, depth: int) -> list[int]:
    """Indices of `depth` of `count` units, uniformly spaced, the last of all among them.

    Halves are rounded to even, as in the authors' code.

    >>> spaced(1, 15, 3), spaced(8, 8, 5), spaced(13, 3, 5)
    ([5, 10, 15], [9, 10, 12, 13, 15], [13, 14, 15])

    Args:
        first: index of the first of the units.
        count: number of units.
        depth: how many of them, or all where there are no more.
    """
    if depth >= count:
        return [*range(first, first + count)]
    return [round(first - 1 + count / depth * i) for i in range(1, depth + 1)]


@dataclasses.dataclass(frozen=True)
class AugmentedNet(Objective):
    """Cross-entropy of an auxiliary net at every block but the last, which has the model's end.

    The net is a fresh copy of units above, uniformly spaced, and a readout: of maps their means and
    a dense layer, which BatchNorm precedes if the net has one unit; of all else LayerNorm and a
    dense layer. Units of residual nets are as wide as those that they copy, and halve the sides of
    maps that are still larger, one by one.

    Attributes:
        depth: Units in the net of the first block.
        decay: Share of `depth` - 1 by which the last net but one is shallower; between the two the
            depth falls linearly. 0: all are of one depth.
    """

    depth: int = 3
    decay: float = 0.5
    trains_classifier: ClassVar[bool] = True

    def __post_init__(self):
        require_int(1, depth=self.depth)
        require_number(decay=self.decay)
        if self.decay > 1:
            raise ValueError(f"decay is {self.decay}: a number from 0 to 1 is needed")

    def depth_at(self, index: int, num_blocks: int) -> int:
        """Units in the net of a block below the last.

        >>> [AugmentedNet(depth=5).depth_at(index, 11) for index in range(10)]
        [5, 5, 5, 4, 4, 4, 4, 3, 3, 3]
        """
        fall = index * self.decay / (num_blocks - 2) if num_blocks > 2 else 0.0
        return max(1, round(self.depth * (1 - fall) + fall))

    def front(self, info: BlockInfo, rngs: nnx.Rngs) -> nnx.Module | None:
        """The copies for any block but the last.

        Raises:
            ValueError: A unit has no copy that fits.
        """
        if info.is_last:
            return None
        copies: list[nnx.Module] = []
        features, first = info.features, info.unit + 1
        for index in spaced(first, len(info.above), self.depth_at(info.index, info.num_blocks)):
            unit, output = info.above[index - first]
            copies.append(renewed(unit, features, output, **info.options(rngs)))
            features = output_of(copies[-1], features)
        return Chain(*copies)

    def head(self, info: BlockInfo, rngs: nnx.Rngs) -> nnx.Module | None:
        """Readout for any block; the last one's is the model's classifier.

        Raises:
            ValueError: There is no classifier and the last block's output is no logits.
        """
        if info.is_last:
            return CrossEntropy().head(info, rngs)
        options = info.options(rngs)
        if not is_map(info.features):
            info = dataclasses.replace(info, features=pooled(info.features))
            dense = layers.linear(info.size, info.num_classes, **options)
            return CrossEntropyHead(nnx.Sequential(pooled, *normed(info), dense))
        channels = info.features.shape[-1]
        norm = []
        if self.depth_at(info.index, info.num_blocks) == 1:
            norm = [layers.BatchNorm(channels, param_dtype=info.param_dtype, rngs=rngs)]
        dense = layers.linear(channels, info.num_classes, **options)
        return CrossEntropyHead(nnx.Sequential(layers.GlobalAveragePool(), *norm, dense))
