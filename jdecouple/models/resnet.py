"""Residual nets for small images; the stem is block 0, every residual unit one more block."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jdecouple._errors import require_int, require_one_of
from jdecouple.models import layers
from jdecouple.models.base import Model, bind
from jdecouple.models.cuts import Splits, cuttable

Starts = dict[int, tuple[int, ...]]  # by K: blocks at which parts 1 to K - 1 begin

# In the code of FDG (arXiv 1906.09108): by depth for the nets of 6n+2 layers, by name for the
# others.
_FDG: dict[int | str, Starts] = {
    20: {2: (5,), 3: (4, 7)},
    56: {2: (14,), 3: (10, 19), 4: (7, 14, 21)},
    110: {2: (28,), 3: (19, 37), 4: (14, 28, 42), 5: (11, 22, 33, 44)},
    "resnet18": {2: (5,), 3: (3, 6)},
    "resnet50": {2: (8,), 3: (6, 11), 4: (5, 9, 13)},
    "resnet101": {2: (17,), 3: (12, 23), 4: (9, 17, 25), 5: (7, 14, 21, 28)},
}
# By depth, of equal memory on CIFAR-10, the InfoPro* of the paper's tables (arXiv 2101.10832).
_INFOPRO_BALANCED: dict[int | str, Starts] = {110: {2: (16,), 3: (11, 22), 4: (8, 16, 28)}}


# Activation, kernel size of projections, and whether the last block ends in the global pooling.
_VARIANTS: dict[str, tuple[Callable[..., jax.Array], int, bool]] = {
    "deinforeg": (nnx.relu, 1, False),
    "scpl": (nnx.leaky_relu, 3, True),
}


class Pad(nnx.Module):
    """Shortcut without parameters: every `strides`-th pixel, zeros as further channels.

    The zeros stand half before and half after the channels (option A of arXiv 1512.03385).
    """

    def __init__(self, extra: int, strides: int):
        self.extra = extra
        self.strides = strides

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[batch, n, n, c] -> [batch, ceil(n / strides), ceil(n / strides), c + extra]`."""
        x = x[:, :: self.strides, :: self.strides]
        before = self.extra // 2
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (before, self.extra - before)))


class UnitKind(NamedTuple):
    """What the units of a net have alike.

    Attributes:
        bottleneck: Whether they are of 1x1, 3x3 and 1x1 convolutions, or of two 3x3 ones.
        shortcut: Past one that changes the shape, see `resnet`.
        projection: Kernel size of shortcuts that are projections.
        activation: Between convolutions, and at the end.
    """

    bottleneck: bool
    shortcut: str
    projection: int
    activation: Callable[..., jax.Array]


class ResidualUnit(nnx.Sequential):
    """Convolutions with BatchNorm past a shortcut, and the activation.

    Args:
        channels: Of what it gets.
        features: Channels of what it gives.
        strides: 1, or 2 to halve the sides.
        kind: What else it is.
        ends: Whether it ends in the global average pooling.
        **options: `init`, `param_dtype` and `rngs`.
    """

    def __init__(
        self,
        channels: int,
        features: int,
        strides: int,
        kind: UnitKind,
        *,
        ends: bool = False,
        **options: Any,
    ):
        inner = features // 4 if kind.bottleneck else features
        # Kernel size, stride and channels of every convolution.
        plan = [(3, strides, inner), (3, 1, inner)]
        if kind.bottleneck:
            plan = [(1, 1, inner), (3, strides, inner), (1, 1, features)]
        branch = _branch(channels, plan, kind.activation, **options)
        bypass = _shortcut(channels, features, strides, kind.shortcut, kind.projection, **options)
        pool = [layers.GlobalAveragePool()] if ends else []
        super().__init__(layers.Residual(branch, bypass), kind.activation, *pool)
        self.kind, self.ends = kind, ends

    def anew(self, received: Any, output: Any, **options: Any) -> "ResidualUnit":
        """A fresh unit, which halves the sides that are larger than those of `output`."""
        strides = halving(received, output)
        channels, features = received.shape[-1], output.shape[-1]
        return ResidualUnit(channels, features, strides, self.kind, ends=self.ends, **options)


def halving(received: Any, output: Any) -> int:
    """Stride of a unit to what is as `output`: 2 if it gets more pixels, else 1.

    Where the output is no map, fewer channels than it has stand for more pixels.
    """
    if len(output.shape) == 4:
        return 2 if received.shape[1] > output.shape[1] else 1
    return 2 if received.shape[-1] < output.shape[-1] else 1


@cuttable
def resnet(
    num_classes: int,
    *,
    depth: int = 20,
    width: float = 1.0,
    shortcut: str = "pad",
    image_size: int = 32,
    channels: int = 3,
    init: str = "flax",
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
) -> Model:
    """ResNet of 6n+2 layers for CIFAR (arXiv 1512.03385, section 4.2).

    A 3x3 convolution with BatchNorm and ReLU, then n units of two 3x3 convolutions in each of three
    groups of 16, 32 and 64 channels, with stride 2 at the start of the last two.

    Args:
        depth: 6n+2 layers with weights, 8 at least.
        width: Factor on all channel counts; each is rounded and at least 1.
        shortcut: Past a unit that changes the shape: "pad" (subsampled, with zeros as further
            channels; the papers' choice) or "projection" (1x1 convolution and BatchNorm).
        init: As of all builders, see `jdecouple.models`; the code of FDG uses "torch", that of
            Features Replay "he".

    Returns:
        A model of 1 + 3n blocks between NHWC activations, with a classifier of global average
        pooling and a dense layer. Its splits, of which a number K means the first that has it:

        - "infopro" into 2, 3, 4, 8 and 16: InfoPro's local modules (arXiv 2101.10832), see
          `equal_parts`; at depth 110 "infopro_balanced" (its InfoPro*) into 2 to 4;
        - "dgl" into 2 to 4: DGL's in its comparison with DDG (1901.08164), whose code it cuts;
        - "fr" into 2 to 4: the stages of Features Replay (1807.04511) and DDG (1804.10574), which
          are the same parts;
        - "fdg" at depths 20, 56 and 110: the stages of FDG (1906.09108).
    """
    count = units_per_group(depth, 2)
    replay = _features_replay(3 * count, 3)
    by_depth = {"infopro_balanced": _INFOPRO_BALANCED, "fdg": _FDG}
    named = {name: table[depth] for name, table in by_depth.items() if depth in table}
    return resnet_of_groups(
        num_classes,
        groups=[(16, count), (32, count), (64, count)],
        bottleneck=False,
        shortcut=shortcut,
        splits={"infopro": equal_parts(3 * count), "dgl": replay, "fr": replay, **named},
        width=width,
        image_size=image_size,
        channels=channels,
        init=init,
        param_dtype=param_dtype,
        rngs=rngs,
    )


@cuttable
def resnet_of_groups(
    num_classes: int,
    *,
    groups: Sequence[tuple[int, int]],
    bottleneck: bool,
    shortcut: str,
    splits: Splits,
    variant: str = "deinforeg",
    width: float = 1.0,
    image_size: int = 32,
    channels: int = 3,
    init: str = "flax",
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
) -> Model:
    """ResNet of any groups of units (arXiv 1512.03385, table 1, with a stem for small images).

    The stem is a 3x3 convolution with BatchNorm and ReLU, no pooling. Units are of two 3x3
    convolutions or, as bottlenecks, of 1x1, 3x3 and 1x1 ones with fourfold channels at the end. All
    groups but the first begin with stride 2, in a 3x3 convolution.

    Args:
        groups: Channels and number of units of each group.
        bottleneck: Whether units are bottlenecks.
        shortcut: Past a unit that changes the shape: "pad" or "projection", see `resnet`.
        splits: Named splits, see `Model`.
        variant: "deinforeg": ReLU, and `shortcut` as it is, as in the code of DeInfoReg and FDG.
            "scpl": as in SCPL's code, LeakyReLU (slope 0.01), 3x3 convolutions for projections, and
            a last block that ends in the global average pooling, so that its head reads vectors.
        width: Factor on all channel counts; each is rounded and at least 1.
        init: As of all builders, see `jdecouple.models`; the code of FDG uses "torch".

    Returns:
        A model between NHWC activations, with a classifier of global average pooling and a dense
        layer. Nets of four groups have the splits "paper" into 4, the groups, the first with the
        stem, as the local modules of DeInfoReg (arXiv 2506.18193) and SCPL (2602.00062); "fr" of
        Features Replay (1807.04511; nets of bottlenecks) and "fdg" of FDG (1906.09108; depths 18,
        50 and 101). A number K means the first that has it.
    """
    require_int(1, num_classes=num_classes, image_size=image_size, channels=channels)
    require_one_of(("pad", "projection"), shortcut=shortcut)
    require_one_of(_VARIANTS, variant=variant)
    activation, projection, pooled = _VARIANTS[variant]
    kind = UnitKind(bottleneck, shortcut, projection, activation)
    layers.require_pixels(image_size, len(groups) - 1, "halvings")
    options = {"init": init, "param_dtype": param_dtype, "rngs": rngs}
    stem = layers.scaled(groups[0][0], width)
    blocks = [nnx.Sequential(*layers.conv_norm(channels, stem, **options), activation)]
    channels = stem
    for group, (features, count) in enumerate(groups):
        inner = layers.scaled(features, width)
        outer = 4 * inner if bottleneck else inner
        for index in range(count):
            strides = 2 if group > 0 and index == 0 else 1
            ends = pooled and (group, index) == (len(groups) - 1, count - 1)
            unit = ResidualUnit(channels, outer, strides, kind, ends=ends, **options)
            blocks.append(unit)
            channels = outer
    pool = layers.Flatten() if pooled else layers.GlobalAveragePool()
    classifier = nnx.Sequential(pool, layers.linear(channels, num_classes, **options))
    return Model(blocks, classifier, splits)


def _branch(
    channels: int,
    plan: Sequence[tuple[int, int, int]],
    activation: Callable[..., jax.Array],
    **options: Any,
) -> nnx.Sequential:
    """Convolutions with BatchNorm, the activation between them."""
    stack: list[Callable[..., jax.Array]] = []
    for size, strides, features in plan:
        stack += [activation] if stack else []
        stack += layers.conv_norm(channels, features, size, strides=strides, **options)
        channels = features
    return nnx.Sequential(*stack)


def _shortcut(
    channels: int, features: int, strides: int, kind: str, size: int, **options: Any
) -> nnx.Module | None:
    if strides == 1 and channels == features:
        return None
    if kind == "pad":
        return Pad(features - channels, strides)
    return nnx.Sequential(*layers.conv_norm(channels, features, size, strides=strides, **options))


def _features_replay(units: int, stem: int) -> Starts:
    """Parts of the code of Features Replay and of DDG, by K.

    The layers are `stem` (convolution, BatchNorm and ReLU are 3, or 1 where they are joined), units
    and pooling, cut into parts of ceil(len / K). A K whose parts begin inside the stem or after the
    last unit, where no block does, is left out.
    """
    splits = {}
    for k in (2, 3, 4):
        part = math.ceil((stem + units + 1) / k)
        starts = tuple(i * part - stem + 1 for i in range(1, k))  # layer `stem` is unit 1
        if starts[0] >= 1 and starts[-1] <= units:
            splits[k] = starts
    return splits


def equal_parts(units: int) -> Starts:
    """InfoPro's local modules of a stem and `units` residual units, by K.

    Its code lists them for depths 32 and 110. This rule gives all that it lists: where K divides
    the units, equal numbers of units, the first part with the stem; else equal numbers of blocks,
    the stem one of them, and where these do not divide, one more in each of the last parts.
    """
    splits = {}
    for k in (2, 3, 4, 8, 16):
        small, more = divmod(units if units % k == 0 else units + 1, k)
        sizes = [small + (i >= k - more) for i in range(k)]
        sizes[0] += units % k == 0
        if small:
            splits[k] = tuple(itertools.accumulate(sizes[:-1]))
    return splits


def units_per_group(depth: int, extra: int) -> int:
    """Returns the n of a `depth` of 6n + `extra`; ValueError if there is none from 1 on."""
    require_int(1, depth=depth)
    if depth < 6 + extra or (depth - extra) % 6:
        raise ValueError(f"depth is {depth}: 6n+{extra} for a whole n of at least 1 is needed")
    return (depth - extra) // 6


def _named(
    name: str, counts: Sequence[int], *, bottleneck: bool, **fixed: Any
) -> Callable[..., Model]:
    groups = {"paper": {4: tuple(1 + units for units in itertools.accumulate(counts[:-1]))}}
    replay = {"fr": _features_replay(sum(counts), 1)} if bottleneck else {}
    fdg = {"fdg": _FDG[name]} if name in _FDG else {}
    return bind(
        resnet_of_groups,
        name,
        f"ResNet-{name.removeprefix('resnet')} for small images",
        groups=tuple(zip((64, 128, 256, 512), counts, strict=True)),
        bottleneck=bottleneck,
        shortcut="projection",
        splits={**groups, **replay, **fdg},
        **fixed,
    )


resnet20 = bind(resnet, "resnet20", "ResNet of 20 layers for CIFAR", depth=20)
resnet32 = bind(resnet, "resnet32", "ResNet of 32 layers for CIFAR", depth=32)
resnet56 = bind(resnet, "resnet56", "ResNet of 56 layers for CIFAR", depth=56)
resnet110 = bind(resnet, "resnet110", "ResNet of 110 layers for CIFAR", depth=110)
resnet18 = _named("resnet18", (2, 2, 2, 2), bottleneck=False)
resnet34 = _named("resnet34", (3, 4, 6, 3), bottleneck=False, variant="deinforeg")
resnet50 = _named("resnet50", (3, 4, 6, 3), bottleneck=True, variant="deinforeg")
resnet101 = _named("resnet101", (3, 4, 23, 3), bottleneck=True, variant="deinforeg")
