"""PredSim's objective: local prediction and similarity matching (arXiv 1901.06656)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jdecouple._errors import require_int, require_number, require_one_of
from jdecouple.methods.objectives.base import BlockInfo, HeadOutput, Objective
from jdecouple.methods.objectives.cross_entropy import cross_entropy
from jdecouple.methods.objectives.maps import is_map, pooled_info
from jdecouple.methods.objectives.similarity_matching import similarity_matching
from jdecouple.methods.objectives.tokens import POSITIONS
from jdecouple.models import layers
from jdecouple.models.resampling import adaptive_average_pool
from jdecouple.models.sequence import pooled


class PredictionSimilarityHead(nnx.Module):
    """A decoder of the labels, and a layer whose output's similarities are matched: an exit.

    At the last block the model's classifier, where there is one, is the exit instead.
    """

    def __init__(self, objective: "PredictionSimilarity", info: BlockInfo, rngs: nnx.Rngs):
        self.objective = objective
        self.num_classes = info.num_classes
        info = pooled_info(info, 0)
        options = info.options(rngs)
        self.pooled: tuple[int, int] | None = None
        self.deviation = False
        if is_map(info.features):
            _, height, width, channels = info.features.shape
            self.layer: nnx.Module = layers.conv(channels, channels, **options)
            self.pooled = _pooled_size(height, width, channels, objective.dim_in_decoder)
            self.deviation = objective.statistic == "deviation" and height * width > 1
            size = math.prod(self.pooled) * channels
        else:
            size = info.size
            self.layer = nnx.Sequential(
                layers.Flatten(), layers.linear(size, size, use_bias=False, **options)
            )
        readout = layers.linear(size, self.num_classes, **options)
        readout.kernel.set_value(jnp.zeros_like(readout.kernel.get_value()))
        self.decoder = nnx.Sequential(layers.Flatten(), readout)
        self.classifier = info.classifier if info.is_last else None

    def __call__(self, features: Any, carry: Mapping[str, Any]) -> HeadOutput:
        """Loss of `features` `[batch, ...]`, or a sequence, under `carry["label"]`."""
        labels, weights = carry["label"], self.objective
        compared = self.layer(pooled(features))
        if not self.deviation:
            compared = compared.reshape(compared.shape[0], -1)
        logits = self._decode(features)
        metrics = {
            "cross_entropy": cross_entropy(logits, labels),
            "similarity": similarity_matching(compared, labels, self.num_classes),
        }
        loss = weights.prediction * metrics["cross_entropy"]
        loss = loss + weights.similarity * metrics["similarity"]
        if self.classifier is not None:
            logits = self.classifier(jax.lax.stop_gradient(features))
            metrics["classifier"] = cross_entropy(logits, labels)
            loss = loss + weights.classifier * metrics["classifier"]
        return HeadOutput(loss, metrics, logits)

    def logits(self, features: Any) -> jax.Array:
        """Logits `[batch, classes]` of this exit."""
        return self._decode(features) if self.classifier is None else self.classifier(features)

    def _decode(self, features: Any) -> jax.Array:
        features = pooled(features)
        if self.pooled is not None:
            features = adaptive_average_pool(features, *self.pooled)
        return self.decoder(features)


def _pooled_size(height: int, width: int, channels: int, most: int) -> tuple[int, int]:
    """Sides, halved in turn (rounding up), of a map of at most `most` numbers, or of one pixel."""
    rows, columns, factor = height, width, 1
    while rows * columns * channels > most and rows * columns > 1:
        factor *= 2
        rows = -(-height // factor)
        if rows * columns * channels > most:
            columns = -(-width // factor)
    return rows, columns


@dataclasses.dataclass(frozen=True)
class PredictionSimilarity(Objective):
    """Cross-entropy of a dense decoder, and matching of similarities, at every block.

    The last head also trains the model's classifier, where there is one, by cross-entropy on the
    detached features.

    Attributes:
        prediction: Weight of the cross-entropy.
        similarity: Weight of the similarity matching.
        statistic: What of the similarity layer's output is compared; the layer is a 3x3 convolution
            of maps, a dense one otherwise. "deviation": each map's standard deviation over space,
            as in the paper. "features": all numbers, as maps of one pixel or of three channels and
            fewer, and other features, are compared in any case.
        dim_in_decoder: Most numbers that the decoder reads; maps are averaged down to it.
        classifier: Weight of the cross-entropy that trains the model's classifier; the authors'
            code takes `prediction` here too.
        positions: Positions of every row that are drawn as examples where labels are those of
            positions, as in language models.
    """

    prediction: float = 0.01
    similarity: float = 0.99
    statistic: str = "deviation"
    dim_in_decoder: int = 4096
    classifier: float = 1.0
    positions: int = POSITIONS
    tokens: ClassVar[str] = "drawn"

    def __post_init__(self):
        require_number(prediction=self.prediction, similarity=self.similarity)
        require_number(positive=True, classifier=self.classifier)
        if not self.prediction and not self.similarity:
            raise ValueError("prediction and similarity are both 0: a weight above 0 is needed")
        require_one_of(("deviation", "features"), statistic=self.statistic)
        require_int(1, dim_in_decoder=self.dim_in_decoder, positions=self.positions)

    def head(self, info: BlockInfo, rngs: nnx.Rngs) -> nnx.Module:
        """Head for any block."""
        return PredictionSimilarityHead(self, info, rngs)
