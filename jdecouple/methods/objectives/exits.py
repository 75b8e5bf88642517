"""Cross-entropy at every block: early exits under the synchronous route, greedy learning locally.

BranchyNet (Teerapittayanon et al., arXiv 1709.01686) trains the exits jointly; Belilovsky et al.
("Greedy layerwise learning can scale to ImageNet", arXiv 1812.11446) cut the blocks apart.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx

from jdecouple._errors import require_int, require_number
from jdecouple.methods.objectives.base import BlockInfo, Objective
from jdecouple.methods.objectives.cross_entropy import CrossEntropy, CrossEntropyHead
from jdecouple.methods.objectives.maps import pool_maps, pooled_info
from jdecouple.models import layers


class ExitHead(CrossEntropyHead):
    """A dense layer on pooled features, under weighted cross-entropy."""

    def __init__(self, objective: "Exits", weight: float, info: BlockInfo, rngs: nnx.Rngs):
        size = pooled_info(info, objective.head_pool).size
        readout = layers.perceptron(size, (info.num_classes,), **info.options(rngs))
        super().__init__(readout, weight)
        self.head_pool = objective.head_pool

    def logits(self, features: Any) -> jax.Array:
        """Logits `[batch, classes]` of this exit."""
        return super().logits(pool_maps(features, self.head_pool))


@dataclasses.dataclass(frozen=True)
class Exits(Objective):
    """Weighted cross-entropy of an exit at every block.

    The exit of the last block is the model's classifier, or its output where there is none; every
    other block gets one dense layer.

    Attributes:
        weights: Weight of each block's loss; a single number (or a tuple of one) is that of all.
        head_pool: The dense layers read feature maps averaged over this many bins a side; 0: whole.
    """

    weights: float | tuple[float, ...] = (1.0,)
    head_pool: int = 1

    def __post_init__(self):
        weights = self.weights if isinstance(self.weights, list | tuple) else (self.weights,)
        object.__setattr__(self, "weights", tuple(weights))
        for weight in weights:
            require_number(weights=weight)
        if not any(weights):
            raise ValueError(f"weights is {self.weights}: a number above 0 is needed")
        require_int(0, head_pool=self.head_pool)

    def head(self, info: BlockInfo, rngs: nnx.Rngs) -> nnx.Module:
        """Head for any block.

        Raises:
            ValueError: There are other numbers of weights and of blocks, or there is no classifier
                and the last block's output is no logits.
        """
        assert isinstance(self.weights, tuple)
        if len(self.weights) not in (1, info.num_blocks):
            raise ValueError(
                f"weights has {len(self.weights)} numbers: 1 or one for each of the "
                f"{info.num_blocks} blocks is needed"
            )
        weight = self.weights[info.index if len(self.weights) > 1 else 0]
        if info.is_last:
            CrossEntropy().head(info, rngs)  # refuses features that are no logits
            return CrossEntropyHead(info.classifier, weight)
        return ExitHead(self, weight, info, rngs)
