"""DGL's objective: cross-entropy of an auxiliary net at every block (arXiv 1901.08164)."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from jdecouple._errors import require_int, require_one_of
from jdecouple.methods.objectives.base import BlockInfo, Objective
from jdecouple.methods.objectives.cross_entropy import CrossEntropy, CrossEntropyHead
from jdecouple.methods.objectives.exits import normed, tied_readout
from jdecouple.methods.objectives.front import FrontedHead
from jdecouple.methods.objectives.maps import is_map, pool_maps, pooled_info
from jdecouple.methods.objectives.tokens import TokenHead, by_positions
from jdecouple.models import layers
from jdecouple.models.gpt import DecoderBlock
from jdecouple.models.resampling import adaptive_average_pool
from jdecouple.models.tokens import states


class Layout(NamedTuple):
    """What an auxiliary net is made of, from its maps to its classes.

    Attributes:
        quarter: Whether maps are averaged over a quarter of each side first.
        convolutions: Number of convolutions, with BatchNorm and ReLU behind each.
        size: Side of their kernels.
        hidden: Number of hidden dense layers, with BatchNorm and ReLU behind each; without any,
            BatchNorm precedes the last dense layer.
    """

    quarter: bool
    convolutions: int
    size: int
    hidden: int


LAYOUTS = {
    "mlp_sr": Layout(quarter=True, convolutions=3, size=1, hidden=3),
    "mlp": Layout(quarter=True, convolutions=0, size=1, hidden=3),
    "cnn": Layout(quarter=False, convolutions=2, size=3, hidden=0),
}


class SpatialReduction(nnx.Module):
    """Maps to 2 x 2 bins, by means and the convolutions of a layout.

    A quarter of n pixels a side is ceil(n / 4). Whatever is left, two bins a side are the end: a
    single pixel is repeated.
    """

    def __init__(self, layout: Layout, info: BlockInfo, rngs: nnx.Rngs):
        _, height, width, channels = info.features.shape
        self.sides = (-(-height // 4), -(-width // 4)) if layout.quarter else (height, width)
        stack: list[Callable[..., jax.Array]] = []
        for _ in range(layout.convolutions):
            convolution = layers.conv_norm(channels, channels, layout.size, **info.options(rngs))
            stack += [*convolution, nnx.relu]
        self.convolutions = nnx.Sequential(*stack)
        options = {"param_dtype": info.param_dtype, "rngs": rngs}
        self.norm = nnx.Sequential() if layout.hidden else layers.BatchNorm(channels, **options)
        self.size = 4 * channels

    def __call__(self, features: jax.Array) -> jax.Array:
        """`[batch, height, width, channels] -> [batch, 2, 2, channels]`."""
        reduced = self.convolutions(adaptive_average_pool(features, *self.sides))
        return self.norm(adaptive_average_pool(reduced, 2, 2))


class AuxiliaryNetHead(CrossEntropyHead):
    """An auxiliary net under cross-entropy: an exit."""

    def __init__(self, objective: "AuxiliaryNet", info: BlockInfo, rngs: nnx.Rngs):
        self.head_pool = objective.head_pool
        info = pooled_info(info, self.head_pool)
        reduction, size = None, info.size
        layout = LAYOUTS.get(objective.aux)
        if layout and is_map(info.features):
            reduction = SpatialReduction(layout, info, rngs)
            size = reduction.size
        self.reduction = reduction or nnx.Sequential()
        if objective.aux == "tied":
            self.readout = tied_readout(info)
            return
        hidden = layout.hidden * (objective.hidden or size,) if layout else ()
        widths = (*hidden, info.num_classes)
        readout = layers.perceptron(size, widths, batch_norm=True, **info.options(rngs))
        norm = normed(info) if objective.aux == "norm" else []
        self.readout = nnx.Sequential(*norm, readout) if norm else readout

    def logits(self, features: Any) -> jax.Array:
        """Logits `[batch, classes]` of this exit."""
        return self.readout(self.reduction(pool_maps(features, self.head_pool)))


def _causal_layer(hidden: int, info: BlockInfo, rngs: nnx.Rngs) -> DecoderBlock:
    """A layer of up to four heads; rotary positions need numbers in pairs."""
    if not isinstance(info.features, Mapping) or "begins" not in info.features:
        raise ValueError(
            f"the output of block {info.index} does not say where documents begin: aux is "
            "'transformer', which needs a dict with 'h' and 'begins', as the blocks of gpt give"
        )
    width = states(info.features).shape[-1]
    rotary = width % 2 == 0
    heads = math.gcd(4, width // 2) if rotary else 1
    return DecoderBlock(width, heads, hidden or width, rotary=rotary, **info.options(rngs))


@dataclasses.dataclass(frozen=True)
class AuxiliaryNet(Objective):
    """Cross-entropy of an auxiliary net at every block but the last, which has the model's end.

    As in the paper, the last block trains with the model's own classifier (or with its output as
    logits where there is none).

    Attributes:
        aux: "mlp_sr", the paper's net: means over a quarter of each side, three 1x1 convolutions
            with BatchNorm and ReLU, means over 2 x 2 bins, three hidden dense layers with BatchNorm
            and ReLU, dense. Or "mlp": the same without convolutions. "cnn": two 3x3 convolutions
            with BatchNorm and ReLU, means over 2 x 2 bins, BatchNorm, dense. "linear": flatten,
            dense. "norm": flatten, LayerNorm, dense. Features that are no maps go to the dense
            layers at once. Of language models: "tied", which is "norm" with the table that
            the model's classifier shares with its embedding as the dense layer; "transformer", a
            causal layer of up to four heads, and "norm" at every position.
        hidden: Width of the hidden dense layers, or inside the causal layer; 0: that of their
            input, as in the paper.
        head_pool: Average maps over this many bins a side before the net; 0: do not.
    """

    aux: str = "mlp_sr"
    hidden: int = 0
    head_pool: int = 0

    def __post_init__(self):
        require_one_of((*LAYOUTS, "linear", "norm", "tied", "transformer"), aux=self.aux)
        require_int(0, hidden=self.hidden, head_pool=self.head_pool)

    def head(self, info: BlockInfo, rngs: nnx.Rngs) -> nnx.Module | None:
        """Head for any block.

        Raises:
            ValueError: There is no classifier and the last block's output is no logits, "aux" is
                "transformer" and the labels are not those of positions, or "tied" and the
                classifier is no embedding's table.
        """
        if info.is_last:
            return CrossEntropy().head(info, rngs)
        if self.aux == "transformer":
            raise ValueError(
                "aux is 'transformer', which is for labels of positions, as language models have: "
                "the batch has labels of whole examples"
            )
        return AuxiliaryNetHead(self, info, rngs)

    def whole_head(self, info: BlockInfo, rngs: nnx.Rngs) -> nnx.Module | None:
        """The "transformer" of any block but the last.

        Raises:
            ValueError: The block does not say where documents begin.
        """
        if self.aux != "transformer" or info.is_last:
            return None
        layer = _causal_layer(self.hidden, info, rngs)
        readout = AuxiliaryNetHead(AuxiliaryNet("norm"), by_positions(info), rngs)
        return FrontedHead(layer, TokenHead(readout, 0, 0, rngs))
