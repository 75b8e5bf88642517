"""Associated Learning's objective: each block ties its features to a code of the labels.

Kao and Chen, "Associated Learning" (arXiv 1906.05560).
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jdecouple._errors import require_int, require_number, require_one_of
from jdecouple.methods.objectives.base import BlockInfo, HeadOutput, Objective, at_least_float32
from jdecouple.methods.objectives.maps import pool_maps, pooled_info
from jdecouple.models import layers

ACTIVATIONS = ("sigmoid", "tanh", "linear")


def associated_learning(
    bridged: jax.Array, code: jax.Array, decoded: jax.Array, target: jax.Array
) -> dict[str, jax.Array]:
    """The two terms of a block's loss, unweighted.

    With s' the block's features, t the target from below and g, b, v the block's encoder, bridge
    and decoder: mean (b(s') - sg(g(t)))^2 and mean (v(g(t)) - t)^2, over examples and features.

    Args:
        bridged: b(s'), `[batch, features]`.
        code: g(t), `[batch, features]`; the bridge's term sends no gradient into it.
        decoded: v(g(t)), `[batch, below]`.
        target: t, `[batch, below]`.

    Returns:
        Scalars "bridge" and "autoencoder", float32 at least.

    Raises:
        ValueError: The shapes do not fit.
    """
    if bridged.shape != code.shape or decoded.shape != target.shape:
        raise ValueError(
            f"bridged and code are {bridged.shape} and {code.shape}, decoded and target "
            f"{decoded.shape} and {target.shape}: equal shapes are needed"
        )
    return {
        "bridge": _mean_squared_error(bridged, jax.lax.stop_gradient(code)),
        "autoencoder": _mean_squared_error(decoded, target),
    }


def _mean_squared_error(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((at_least_float32(x) - at_least_float32(y)) ** 2)


class AssociatedLearningHead(nnx.Module):
    """Encoder g, bridge b and decoder v of one block; its code is the next block's target."""

    def __init__(self, objective: "AssociatedLearning", info: BlockInfo, rngs: nnx.Rngs):
        self.num_classes = info.num_classes
        self.head_pool = objective.head_pool
        self.autoencoder_lr_scale = objective.autoencoder_lr_scale
        size = pooled_info(info, self.head_pool).size
        below = objective.features if info.index else info.num_classes

        dense = functools.partial(_dense, objective.activation, info, rngs)
        self.encoder = nnx.Sequential(*dense(below, objective.features))
        hidden = (objective.expansion * objective.features,) if objective.expansion else ()
        self.bridge = nnx.Sequential(layers.Flatten(), *dense(size, *hidden, objective.features))
        self.decoder = nnx.Sequential(*dense(objective.features, below))

    @property
    def lr_scales(self) -> dict[str, float]:
        """Factors on the updates of encoder and decoder, see `jdecouple.objectives.Scaling`."""
        scale = self.autoencoder_lr_scale
        return {} if scale == 1 else {"encoder": scale, "decoder": scale}

    def __call__(self, features: Any, carry: Mapping[str, Any]) -> HeadOutput:
        """Loss of `features` `[batch, ...]`, or a sequence, under `carry["target"]`.

        The first block's target is the one-hot labels. The head's "target" for the block above is
        its code, `[batch, objective.features]`.
        """
        bridged = self.turn(features)
        target = carry.get("target")
        if target is None:
            target = jax.nn.one_hot(carry["label"], self.num_classes, dtype=bridged.dtype)
        code = self.encoder(target)
        terms = associated_learning(bridged, code, self.decoder(code), target)
        loss = terms["bridge"] + terms["autoencoder"]
        return HeadOutput(loss, terms, None, {"target": code})

    def logits(self, features: Any) -> None:
        """None: the answer comes down from the last block, through the decoders of all."""

    def turn(self, features: Any) -> jax.Array:
        """What comes down from the last block: its bridged features."""
        return self.bridge(pool_maps(features, self.head_pool))

    def descend(self, target: jax.Array) -> jax.Array:
        """The target of the block below, decoded; below the first block, scores of the classes."""
        return self.decoder(target)


def _dense(
    activation: str, info: BlockInfo, rngs: nnx.Rngs, *sizes: int
) -> list[Callable[..., jax.Array]]:
    """Dense layers from size to size, each with the activation behind it."""
    behind = [] if activation == "linear" else [layers.ACTIVATIONS[activation]]
    stack: list[Callable[..., jax.Array]] = []
    for size, width in itertools.pairwise(sizes):
        stack += [layers.linear(size, width, **info.options(rngs)), *behind]
    return stack


@dataclasses.dataclass(frozen=True)
class AssociatedLearning(Objective):
    """Associated Learning: loss of the bridge plus loss of the autoencoder, at every block.

    The labels flow up beside the features, encoded anew at every block. A sample is classified by
    all blocks, the bridge of the last, and the decoders of all from the last to the first. The
    model's own classifier is ignored.

    Attributes:
        features: Width of the codes; in the code of DeInfoReg and SCPL 500 for images and 300 for
            text, in the paper's own 300.
        expansion: Width of the bridge's hidden layer, in multiples of `features`; 0 for a bridge of
            one dense layer (text).
        activation: Behind every dense layer: "sigmoid" (images), "tanh" (text) or "linear" (none).
        head_pool: The bridge reads feature maps averaged over this many bins a side; 0: whole.
        autoencoder_lr_scale: Factor on the learning rate of encoder and decoder; 2 in the paper's
            own code.
    """

    features: int = 500
    expansion: int = 5
    activation: str = "sigmoid"
    head_pool: int = 0
    autoencoder_lr_scale: float = 1.0
    trains_classifier: ClassVar[bool] = False
    tokens: ClassVar[str] = "none"

    def __post_init__(self):
        require_int(1, features=self.features)
        require_int(0, expansion=self.expansion, head_pool=self.head_pool)
        require_one_of(ACTIVATIONS, activation=self.activation)
        require_number(positive=True, autoencoder_lr_scale=self.autoencoder_lr_scale)

    def head(self, info: BlockInfo, rngs: nnx.Rngs) -> nnx.Module:
        """Head for any block."""
        return AssociatedLearningHead(self, info, rngs)
