"""DGL's objective: cross-entropy of an auxiliary net at every block (arXiv 1901.08164)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jdecouple._errors import require_int, require_one_of
from jdecouple.methods.objectives.base import BlockInfo, Objective
from jdecouple.methods.objectives.cross_entropy import CrossEntropy, CrossEntropyHead
from jdecouple.methods.objectives.maps import is_map, pool_maps, pooled_info
from jdecouple.models import layers
from jdecouple.models.resampling import adaptive_average_pool


class SpatialReduction(nnx.Module):
    """Maps to 2 x 2: means over a quarter of each side, three 1x1 convolutions, means again.

    BatchNorm and ReLU follow every convolution. A side of n pixels is left at ceil(n / 4), then at
    2, or at 1 where no more are left.
    """

    def __init__(self, info: BlockInfo, rngs: nnx.Rngs):
        _, height, width, channels = info.features.shape
        self.quarter = (-(-height // 4), -(-width // 4))
        self.end = (min(2, self.quarter[0]), min(2, self.quarter[1]))
        stack: list[Callable[..., jax.Array]] = []
        for _ in range(3):
            stack += [*layers.conv_norm(channels, channels, 1, **info.options(rngs)), nnx.relu]
        self.convolutions = nnx.Sequential(*stack)
        self.size = self.end[0] * self.end[1] * channels

    def __call__(self, features: jax.Array) -> jax.Array:
        """`[batch, height, width, channels] -> [batch, 2, 2, channels]`."""
        reduced = self.convolutions(adaptive_average_pool(features, *self.quarter))
        return adaptive_average_pool(reduced, *self.end)


class AuxiliaryNetHead(CrossEntropyHead):
    """An auxiliary net under cross-entropy: an exit."""

    def __init__(self, objective: "AuxiliaryNet", info: BlockInfo, rngs: nnx.Rngs):
        self.head_pool = objective.head_pool
        info = pooled_info(info, self.head_pool)
        reduction, size = None, info.size
        if objective.aux == "mlp_sr" and is_map(info.features):
            reduction = SpatialReduction(info, rngs)
            size = reduction.size
        self.reduction = reduction or nnx.Sequential()
        hidden = () if objective.aux == "linear" else 3 * (objective.hidden or size,)
        widths = (*hidden, info.num_classes)
        self.readout = layers.perceptron(size, widths, batch_norm=True, **info.options(rngs))

    def logits(self, features: Any) -> jax.Array:
        """Logits `[batch, classes]` of this exit."""
        return self.readout(self.reduction(pool_maps(features, self.head_pool)))


@dataclasses.dataclass(frozen=True)
class AuxiliaryNet(Objective):
    """Cross-entropy of an auxiliary net at every block but the last, which has the model's end.

    As in the paper, the last block trains with the model's own classifier (or with its output as
    logits where there is none).

    Attributes:
        aux: "mlp_sr", the paper's net: means over a quarter of each side, three 1x1 convolutions
            with BatchNorm and ReLU, means over 2 x 2 bins, three hidden dense layers with BatchNorm
            and ReLU, dense. Features that are no maps go to the dense layers at once. Or "linear":
            flatten, dense.
        hidden: Width of the hidden dense layers; 0: that of their input, as in the paper.
        head_pool: Average maps over this many bins a side before the net; 0: do not.
    """

    aux: str = "mlp_sr"
    hidden: int = 0
    head_pool: int = 0

    def __post_init__(self):
        require_one_of(("mlp_sr", "linear"), aux=self.aux)
        require_int(0, hidden=self.hidden, head_pool=self.head_pool)

    def head(self, info: BlockInfo, rngs: nnx.Rngs) -> nnx.Module | None:
        """Head for any block.

        Raises:
            ValueError: There is no classifier and the last block's output is no logits.
        """
        if info.is_last:
            return CrossEntropy().head(info, rngs)
        return AuxiliaryNetHead(self, info, rngs)
