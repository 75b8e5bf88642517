"""Cross-entropy at every block: early exits under the synchronous route, greedy learning locally.

BranchyNet (Teerapittayanon et al., arXiv 1709.01686) trains the exits jointly; Belilovsky et al.
("Greedy layerwise learning can scale to ImageNet", arXiv 1812.11446) cut the blocks apart.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
from flax import nnx

from jdecouple.methods.objectives.base import BlockInfo, HeadOutput, require_number, require_whole
from jdecouple.methods.objectives.cross_entropy import CrossEntropy, CrossEntropyHead
from jdecouple.methods.objectives.maps import pool_maps, pooled_site
from jdecouple.models import layers


class ExitHead(CrossEntropyHead):
    """A classifier under weighted cross-entropy; it reads the features as they are."""

    def __init__(self, classifier: nnx.Module | None, weight: float):
        super().__init__(classifier)
        self.weight = weight

    def __call__(self, features: Any, carry: Mapping[str, Any]) -> HeadOutput:
        """Loss of `features` under `carry["label"]`."""
        output = super().__call__(features, carry)
        return output._replace(loss=self.weight * output.loss)


class PooledExitHead(ExitHead):
    """A dense layer on pooled features, under weighted cross-entropy."""

    def __init__(self, objective: "Exits", weight: float, site: BlockInfo, rngs: nnx.Rngs):
        size = pooled_site(site, objective.head_pool).size
        readout = layers.perceptron(size, (site.num_classes,), **site.options(rngs))
        super().__init__(readout, weight)
        self.head_pool = objective.head_pool

    def logits(self, features: Any) -> jax.Array:
        """Logits `[batch, classes]` of this exit."""
        return super().logits(pool_maps(features, self.head_pool))


@dataclasses.dataclass(frozen=True)
class Exits:
    """Weighted cross-entropy of an exit at every block.

    The exit of the last block is the model's classifier, or its output where there is none; every
    other block gets one dense layer.

    Attributes:
        weights: Weight of each block's loss; a single number (or a tuple of one) is that of all.
        head_pool: The dense layers read feature maps averaged over this many bins a side; 0: whole.

    Raises:
        ValueError: An argument is not among those allowed.
    """

    weights: float | tuple[float, ...] = (1.0,)
    head_pool: int = 1
    needs_classifier: ClassVar[bool] = False
    trains_classifier: ClassVar[bool] = True

    def __post_init__(self):
        weights = self.weights if isinstance(self.weights, list | tuple) else (self.weights,)
        object.__setattr__(self, "weights", tuple(weights))
        for weight in weights:
            require_number(weights=weight)
        if not any(weights):
            raise ValueError(f"weights must hold a number above 0, got {self.weights}")
        require_whole(head_pool=self.head_pool)

    def head(self, site: BlockInfo, rngs: nnx.Rngs) -> nnx.Module:
        """Head for any block.

        Raises:
            ValueError: There are other numbers of weights and of blocks, or there is no classifier
                and the last block's output is no logits.
        """
        assert isinstance(self.weights, tuple)
        if len(self.weights) not in (1, site.num_blocks):
            raise ValueError(
                f"weights has {len(self.weights)} numbers: 1 or one for each of the "
                f"{site.num_blocks} blocks is needed"
            )
        weight = self.weights[site.index if len(self.weights) > 1 else 0]
        if site.is_last:
            CrossEntropy().head(site, rngs)  # refuses features that are no logits
            return ExitHead(site.classifier, weight)
        return PooledExitHead(self, weight, site, rngs)
