"""Cross-entropy at every block: early exits under the synchronous route, greedy learning locally.

BranchyNet (Teerapittayanon et al., arXiv 1709.01686) trains the exits jointly; Belilovsky et al.
("Greedy layerwise learning can scale to ImageNet", arXiv 1812.11446) cut the blocks apart.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jdecouple._errors import require_int, require_number, require_one_of
from jdecouple.methods.objectives.base import BlockInfo, Objective
from jdecouple.methods.objectives.cross_entropy import CrossEntropy, CrossEntropyHead
from jdecouple.methods.objectives.maps import is_map, pool_maps, pooled_info
from jdecouple.models import layers
from jdecouple.models.tokens import TiedReadout

CHANNELS = 32
"""Of the convolutions of BranchyNet's branches, on any net for CIFAR-10."""


class Branch(nnx.Module):
    """BranchyNet's convolutions on a map: 3x3 to 32 channels with ReLU, then 2x2 maximum pooling.

    There are two convolutions at the first block and one at every other, as in the paper's AlexNet.
    A map of less than two pixels a side is not pooled.
    """

    def __init__(self, info: BlockInfo, rngs: nnx.Rngs):
        _, height, width, channels = info.features.shape
        stack: list[Callable[..., jax.Array]] = []
        for _ in range(1 if info.index else 2):
            convolution = layers.conv(channels, CHANNELS, use_bias=True, **info.options(rngs))
            stack += [convolution, nnx.relu]
            channels = CHANNELS
        if min(height, width) > 1:
            stack.append(layers.MaxPool())
        self.stack = nnx.Sequential(*stack)

    def __call__(self, features: jax.Array) -> jax.Array:
        """`[batch, height, width, channels] -> [batch, height // 2, width // 2, 32]`."""
        return self.stack(features)


class ExitHead(CrossEntropyHead):
    """A dense layer on pooled features, or on those of a branch, under weighted cross-entropy."""

    def __init__(self, objective: "Exits", weight: float, info: BlockInfo, rngs: nnx.Rngs):
        convolves = objective.branch == "conv" and is_map(info.features)
        self.branch = Branch(info, rngs) if convolves else nnx.Sequential()
        info = dataclasses.replace(info, features=jax.eval_shape(self.branch, info.features))
        info = pooled_info(info, objective.head_pool)
        if objective.branch == "tied":
            readout = tied_readout(info)
        else:
            readout = layers.perceptron(info.size, (info.num_classes,), **info.options(rngs))
        if objective.branch == "norm":
            readout = nnx.Sequential(*normed(info), readout)
        super().__init__(readout, weight)
        self.head_pool = objective.head_pool

    def logits(self, features: Any) -> jax.Array:
        """Logits `[batch, classes]` of this exit."""
        return super().logits(pool_maps(self.branch(features), self.head_pool))


def normed(info: BlockInfo) -> list[nnx.Module]:
    """Flattens, then LayerNorm."""
    return [layers.Flatten(), layers.LayerNorm(info.size, param_dtype=info.param_dtype)]


def tied_readout(info: BlockInfo) -> nnx.Sequential:
    """LayerNorm, and products with the table that the model's classifier shares with its embedding.

    Raises:
        ValueError: The classifier shares none, or the features are of another width.
    """
    nodes = [] if info.classifier is None else nnx.iter_graph(info.classifier)
    shared = next((node for _, node in nodes if isinstance(node, TiedReadout)), None)
    if shared is None:
        raise ValueError(
            "a head that is 'tied' needs a model whose classifier is the table of its embedding, "
            "as gpt and lstm_lm have by tied=True"
        )
    if (width := shared.table.shape[1]) != info.size:
        raise ValueError(
            f"the output of block {info.index} has width {info.size}: a head that is 'tied' needs "
            f"{width}, that of the embedding"
        )
    return nnx.Sequential(*normed(info), TiedReadout(shared))


@dataclasses.dataclass(frozen=True)
class Exits(Objective):
    """Weighted cross-entropy of an exit at every block.

    The exit of the last block is the model's classifier, or its output where there is none; every
    other block gets one dense layer, which a branch of convolutions may precede.

    Attributes:
        weights: Weight of each block's loss; a single number (or a tuple of one) is that of all.
        head_pool: The dense layers read feature maps averaged over this many bins a side; 0: whole.
        branch: What stands before the dense layer of an exit. "linear": nothing. "norm": LayerNorm,
            as before the classifier of a Transformer. "tied", of language models: "norm" before the
            table that the model's classifier shares with its embedding, in place of the dense
            layer. "conv", of feature maps: BranchyNet's 3x3
            convolutions to 32 channels with ReLU, two at the first block and one at every other,
            and 2x2 maximum pooling; the paper has head_pool=0 behind them.
    """

    weights: float | tuple[float, ...] = (1.0,)
    head_pool: int = 1
    branch: str = "linear"

    def __post_init__(self):
        weights = self.weights if isinstance(self.weights, list | tuple) else (self.weights,)
        object.__setattr__(self, "weights", tuple(weights))
        for weight in weights:
            require_number(weights=weight)
        if not any(weights):
            raise ValueError(f"weights is {self.weights}: a number above 0 is needed")
        require_int(0, head_pool=self.head_pool)
        require_one_of(("linear", "conv", "norm", "tied"), branch=self.branch)

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
