"""Cross-entropy at every block: early exits under the synchronous route, greedy learning locally.

BranchyNet (Teerapittayanon et al., arXiv 1709.01686) trains the exits jointly; Belilovsky et al.
("Greedy layerwise learning can scale to ImageNet", arXiv 1812.11446) cut the blocks apart.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
from flax import nnx

from jdecouple.models import layers
from jdecouple.objectives.base import HeadOutput, Site, require_number
from jdecouple.objectives.cross_entropy import CrossEntropy, CrossEntropyHead

POOLS = ("average", "flatten")


class ExitHead(CrossEntropyHead):
    """A classifier under weighted cross-entropy."""

    def __init__(self, classifier: nnx.Module | None, weight: float):
        super().__init__(classifier)
        self.weight = weight

    def __call__(self, features: jax.Array, message: Mapping[str, Any]) -> HeadOutput:
        """Loss of `features` under `message["label"]`."""
        output = super().__call__(features, message)
        return output._replace(loss=self.weight * output.loss)


@dataclasses.dataclass(frozen=True)
class Exits:
    """Weighted cross-entropy of an exit at every block.

    The exit of the last block is the model's classifier, or its output where there is none; every
    other block gets one dense layer.

    Attributes:
        weights: Weight of each block's loss; a single number (or a tuple of one) is that of all.
        pool: What the dense layers read: "average", the mean over the pixels of a feature map
            (anything else is flattened), or "flatten".

    Raises:
        ValueError: An argument is not among those allowed.
    """

    weights: float | tuple[float, ...] = (1.0,)
    pool: str = "average"
    needs_classifier: ClassVar[bool] = False
    trains_classifier: ClassVar[bool] = True

    def __post_init__(self):
        weights = self.weights if isinstance(self.weights, list | tuple) else (self.weights,)
        object.__setattr__(self, "weights", tuple(weights))
        for weight in weights:
            require_number(weights=weight)
        if not any(weights):
            raise ValueError(f"weights must hold a number above 0, got {self.weights}")
        if self.pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {self.pool!r}")

    def head(self, site: Site, rngs: nnx.Rngs) -> nnx.Module:
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
        options = {"init": site.init, "param_dtype": site.param_dtype, "rngs": rngs}
        if self.pool == "average" and len(getattr(site.features, "shape", ())) == 4:
            channels = site.features.shape[-1]
            readout = layers.linear(channels, site.num_classes, **options)
            return ExitHead(nnx.Sequential(layers.GlobalAveragePool(), readout), weight)
        return ExitHead(layers.perceptron(site.size, (site.num_classes,), **options), weight)
