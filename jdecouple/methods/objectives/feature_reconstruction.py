"""LoPT's objective: the lower blocks reconstruct what they have read, the last learns the task.

Shi et al., "Rethinking Local Learning" (arXiv 2605.04913), as the authors' code has it.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jdecouple._errors import require_int, require_number
from jdecouple.methods.objectives.base import (
    BlockInfo,
    HeadOutput,
    Objective,
    at_least_float32,
    unfit_target,
)
from jdecouple.methods.objectives.cross_entropy import CrossEntropy
from jdecouple.models import layers
from jdecouple.models.tokens import states

GAIN = 0.1
"""Of the decoder's initial weights."""


class FeatureReconstructionHead(nnx.Module):
    """From a block's output through a bottleneck to what the block has read.

    The decoder reads position by position (or pixel by pixel), or, where the block changes their
    number, all numbers of an example.
    """

    def __init__(self, objective: "FeatureReconstruction", info: BlockInfo, rngs: nnx.Rngs):
        self.weight = objective.weight / (info.num_blocks - 1)
        self.embedding = info.embedding
        here, target = states(info.features), states(info.received)
        _check_target(target, info.index)
        self.keeps_places = here.shape[:-1] == target.shape[:-1]
        first = -1 if self.keeps_places else 1
        width, wanted = (math.prod(x.shape[first:]) for x in (here, target))
        middle = objective.bottleneck or max(1, here.shape[-1] // 4)
        self.decoder = nnx.Sequential(
            layers.LayerNorm(width, param_dtype=info.param_dtype),
            _narrow(width, middle, info, rngs),
            nnx.gelu,
            _narrow(middle, wanted, info, rngs),
        )

    def __call__(self, features: Any, carry: Mapping[str, Any]) -> HeadOutput:
        """Loss of `features` under the block's input, `carry["x"]`.

        Of positions only those count that `carry["label"]` has a label for.
        """
        received = carry["x"] if self.embedding is None else self.embedding(carry["x"])
        target = _numbers(jax.lax.stop_gradient(states(received)))
        h = states(features)
        if not self.keeps_places:
            h, target = (x.reshape(x.shape[0], -1) for x in (h, target))
        errors = jnp.mean((at_least_float32(self.decoder(h)) - target) ** 2, axis=-1)
        labels = carry["label"]
        counts = labels >= 0 if labels.shape == errors.shape else jnp.ones(errors.shape, bool)
        error = jnp.sum(jnp.where(counts, errors, 0)) / jnp.maximum(jnp.sum(counts), 1)
        return HeadOutput(self.weight * error, {"reconstruction": error}, None)

    def logits(self, features: Any) -> None:
        """None: the block is no exit."""


def _narrow(size: int, width: int, info: BlockInfo, rngs: nnx.Rngs) -> layers.Linear:
    """A dense layer of small weights, uniform as Glorot and Bengio's times `GAIN`."""
    layer = layers.linear(size, width, **info.options(rngs))
    draw = nnx.initializers.glorot_uniform()
    layer.kernel.set_value(GAIN * draw(rngs.params(), (size, width), info.param_dtype))
    layer.bias = nnx.Param(jnp.zeros(width, info.param_dtype))
    return layer


def _numbers(x: jax.Array) -> jax.Array:
    """A target, float32 at least; bytes are divided by 255."""
    return x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else at_least_float32(x)


def _check_target(target: Any, index: int) -> None:
    if kind := unfit_target(target):
        raise ValueError(
            f"block {index} reads {kind}: lopt needs floats or uint8 to reconstruct, or a block "
            "that begins with one that says is_embedding"
        )


@dataclasses.dataclass(frozen=True)
class FeatureReconstruction(Objective):
    """Every block but the last reconstructs its input, the last has the model's cross-entropy.

    The target is the block's input behind the embedding, without gradient. In the paper a
    pretrained net is cut once in the middle, so that no error of a new task gets into its lower
    half.

    Attributes:
        weight: Weight of the mean of all blocks' squared errors.
        bottleneck: Width in the middle of the decoder; 0: a quarter of the output's last axis.
    """

    weight: float = 10.0
    bottleneck: int = 0

    def __post_init__(self):
        require_number(positive=True, weight=self.weight)
        require_int(0, bottleneck=self.bottleneck)

    def head(self, info: BlockInfo, rngs: nnx.Rngs) -> nnx.Module | None:
        """Head for any block.

        Raises:
            ValueError: There is no classifier and the last block's output is no logits, or a block
                reads nothing that can be reconstructed.
        """
        if info.is_last:
            return CrossEntropy().head(info, rngs)
        return FeatureReconstructionHead(self, info, rngs)

    def whole_head(self, info: BlockInfo, rngs: nnx.Rngs) -> nnx.Module | None:
        """That of any block but the last: it needs no labels."""
        return None if info.is_last else self.head(info, rngs)
