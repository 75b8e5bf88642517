"""The nets of `peers.py` in plain PyTorch, and how they take over weights of ours.

Written as one would write them in PyTorch: NCHW, `nn.LSTM`, `F.scaled_dot_product_attention`. A
builder takes the options of ours and returns blocks and a classifier. Modules are called as in
ours: a name of `jdecouple.Trainer.to_arrays` without its "layers" is the path of a module here.

Between blocks goes a tensor; a block whose summary is no mean over positions returns it beside. The
texts of the benchmarks have no padding, so there are no masks here.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Net = tuple[list[nn.Module], nn.Module]
VGG8 = ((128, 128, 128, 256, "M"), (256, 512, "M"), (512, 512, "M"), (512, "M"))


def states(x: Any) -> Tensor:
    """What the next block reads of a block's output."""
    return x[0] if isinstance(x, tuple) else x


def summary(x: Any) -> Tensor:
    """What a head reads of a block's output: of a sequence its summary."""
    if isinstance(x, tuple):
        return x[1]
    return x.mean(1) if x.ndim == 3 else x


def dense(size: int, width: int, channels: int | None = None, bias: bool = True) -> nn.Linear:
    """Dense layer; behind a flatten of maps with so many channels, whose order is not ours."""
    layer = nn.Linear(size, width, bias=bias)
    layer.channels = channels or size
    return layer


def perceptron(shape: Sequence[int], widths: Sequence[int]) -> nn.Sequential:
    """Flatten of features of a shape, dense layers, BatchNorm and ReLU between them."""
    stack: list[nn.Module] = [nn.Flatten()]
    channels: int | None = shape[0]
    for before, after in itertools.pairwise((int(np.prod(shape)), *widths)):
        if len(stack) > 1:
            stack += [nn.BatchNorm1d(before), nn.ReLU()]
        stack.append(dense(before, after, channels))
        channels = None
    return nn.Sequential(*stack)


def conv(before: int, after: int, size: int = 3, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(before, after, size, stride, size // 2, bias=bias)


def conv_norm(before: int, after: int, size: int = 3, stride: int = 1) -> list[nn.Module]:
    return [conv(before, after, size, stride), nn.BatchNorm2d(after)]


def scaled(features: int, width: float) -> int:
    return max(1, round(features * width))


def vgg(
    num_classes: int,
    blocks: Sequence[Sequence[int | str]],
    *,
    image_size: int = 32,
    channels: int = 3,
) -> Net:
    """3x3 convolutions with BatchNorm and ReLU, and 2x2 pooling for "M"."""
    modules: list[nn.Module] = []
    for layout in blocks:
        stack: list[nn.Module] = []
        for item in layout:
            if isinstance(item, str):
                stack.append(nn.MaxPool2d(2))
                image_size //= 2
            else:
                stack += [*conv_norm(channels, item), nn.ReLU()]
                channels = item
        modules.append(nn.Sequential(*stack))
    return modules, perceptron((channels, image_size, image_size), (num_classes,))


def vgg8(num_classes: int, *, width: float) -> Net:
    layouts = [[x if x == "M" else scaled(int(x), width) for x in layout] for layout in VGG8]
    return vgg(num_classes, layouts)


class Pad(nn.Module):
    """Every second pixel, zeros as further channels on both sides."""

    def __init__(self, extra: int):
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        """Maps of half as many pixels a side."""
        before = self.extra // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, self.extra - before))


class Residual(nn.Module):
    """The sum of a branch and of a shortcut."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module):
        super().__init__()
        self.branch, self.shortcut = branch, shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Both applied to the same maps, and added."""
        return self.branch(x) + self.shortcut(x)


class GlobalAveragePool(nn.Module):
    """Mean over the pixels."""

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, channels, height, width] -> [batch, channels]`."""
        return x.mean((2, 3))


def resnet_of_groups(num_classes: int, groups: Sequence[tuple[int, int]], *, pad: bool) -> Net:
    """A stem, then units of two convolutions; groups of (channels, units), halved between them."""
    channels = groups[0][0]
    blocks: list[nn.Module] = [nn.Sequential(*conv_norm(3, channels), nn.ReLU())]
    for group, (features, count) in enumerate(groups):
        for index in range(count):
            stride = 2 if group > 0 and index == 0 else 1
            first, second = conv_norm(channels, features, 3, stride), conv_norm(features, features)
            shortcut: nn.Module = nn.Identity()
            if stride > 1 or channels != features:
                projection = nn.Sequential(*conv_norm(channels, features, 1, stride))
                shortcut = Pad(features - channels) if pad else projection
            branch = nn.Sequential(*first, nn.ReLU(), *second)
            blocks.append(nn.Sequential(Residual(branch, shortcut), nn.ReLU()))
            channels = features
    return blocks, nn.Sequential(GlobalAveragePool(), dense(channels, num_classes))


def resnet(num_classes: int, *, depth: int, width: float) -> Net:
    groups = [(scaled(features, width), (depth - 2) // 6) for features in (16, 32, 64)]
    return resnet_of_groups(num_classes, groups, pad=True)


def resnet18(num_classes: int, *, width: float) -> Net:
    groups = [(scaled(features, width), 2) for features in (64, 128, 256, 512)]
    return resnet_of_groups(num_classes, groups, pad=False)


def wide_resnet(num_classes: int, *, depth: int, widen: int) -> Net:
    """Pre-activated units, whose second convolution has the stride, as in ours."""
    channels, blocks = 16, [conv(3, 16, bias=True)]
    for group in range(3):
        features = 16 * 2**group * widen
        for index in range((depth - 4) // 6):
            stride = 2 if group > 0 and index == 0 else 1
            branch = nn.Sequential(
                *(nn.BatchNorm2d(channels), nn.ReLU(), conv(channels, features, bias=True)),
                *(nn.BatchNorm2d(features), nn.ReLU()),
                conv(features, features, stride=stride, bias=True),
            )
            same = stride == 1 and channels == features
            shortcut = nn.Identity() if same else conv(channels, features, 1, stride, bias=True)
            blocks.append(Residual(branch, shortcut))
            channels = features
    classifier = nn.Sequential(
        nn.BatchNorm2d(channels), nn.ReLU(), GlobalAveragePool(), dense(channels, num_classes)
    )
    return blocks, classifier


class Embedding(nn.Module):
    """Vectors of words, and of positions if wanted."""

    is_embedding = True

    def __init__(self, vocabulary_size: int, features: int, length: int | None = None):
        super().__init__()
        self.table = nn.Parameter(torch.empty(vocabulary_size, features))
        self.positions = nn.Parameter(torch.empty(length, features)) if length else None

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, length] -> [batch, length, features]`."""
        h = F.embedding(x, self.table)
        return h if self.positions is None else h + self.positions[: x.shape[1]]


class PatchEmbedding(nn.Module):
    """Vectors of patches and of their positions."""

    is_embedding = True

    def __init__(self, patch: int, hidden: int, count: int):
        super().__init__()
        self.project = nn.Conv2d(3, hidden, patch, patch)
        self.positions = nn.Parameter(torch.empty(count, hidden))

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, 3, height, width] -> [batch, patches, hidden]`."""
        return self.project(x).flatten(2).transpose(1, 2) + self.positions


class Rotary(nn.Module):
    """Rotary positions of queries and keys, numbers i and i + size / 2 as a pair.

    A causal layer reads them off a table, as one writes it in PyTorch.
    """

    def __init__(self, size: int, length: int):
        super().__init__()
        speed = 10_000.0 ** (-torch.arange(0, size, 2) / size)
        angle = torch.outer(torch.arange(length), speed)
        self.register_buffer("sine", angle.sin(), persistent=False)
        self.register_buffer("cosine", angle.cos(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, heads, length, size]`, turned."""
        first, second = x.chunk(2, -1)
        sine, cosine = self.sine[: x.shape[2]], self.cosine[: x.shape[2]]
        turned = (first * cosine - second * sine, second * cosine + first * sine)
        return torch.cat(turned, -1).to(x.dtype)


class EncoderBlock(nn.Module):
    """Self-attention and a feed-forward layer, each behind LayerNorm and past a shortcut.

    A `context` makes it causal, with rotary positions in rows of so many tokens at most.
    """

    def __init__(self, hidden: int, heads: int, context: int | None = None):
        super().__init__()
        self.heads, self.causal = heads, context is not None
        self.turn = Rotary(hidden // heads, context) if context else nn.Identity()
        self.attention_norm, self.feed_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.projections, self.out = dense(hidden, 3 * hidden), dense(hidden, hidden)
        self.up, self.down = dense(hidden, 4 * hidden), dense(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """States `[batch, length, hidden]`."""
        parts = self.projections(self.attention_norm(x)).unflatten(2, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind()
        query, key = self.turn(query), self.turn(key)
        h = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.out(h.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.feed_norm(x)), approximate="tanh"))


class BidirectionalLSTM(nn.LSTM):
    """The mean of both directions' states, and as the summary that of their last ones.

    The second of PyTorch's two biases, which are only ever added, stays 0.
    """

    def __init__(self, size: int, hidden: int):
        super().__init__(size, hidden, batch_first=True, bidirectional=True)
        for name, parameter in self.named_parameters():
            if name.startswith("bias_hh"):
                nn.init.zeros_(parameter).requires_grad_(False)

    def forward(self, x: Any) -> tuple[Tensor, Tensor]:
        """States `[batch, length, hidden]` and summary `[batch, hidden]`."""
        both, (last, _) = super().forward(states(x))
        return both.unflatten(2, (2, -1)).mean(2), last.mean(0)


def lstm(
    num_classes: int, *, vocabulary_size: int, max_length: int, hidden: int, depth: int
) -> Net:
    del max_length
    layers = [BidirectionalLSTM(hidden, hidden) for _ in range(depth)]
    classifier = nn.Sequential(nn.Identity(), dense(hidden, num_classes))
    return [Embedding(vocabulary_size, hidden), *layers], classifier


def encoder(num_classes: int, embedding: nn.Module, hidden: int, depth: int, heads: int) -> Net:
    blocks = [EncoderBlock(hidden, heads) for _ in range(depth)]
    readout = nn.Sequential(nn.Identity(), nn.LayerNorm(hidden), dense(hidden, num_classes))
    return [embedding, *blocks], readout


def transformer(
    num_classes: int, *, vocabulary_size: int, max_length: int, hidden: int, depth: int, heads: int
) -> Net:
    embedding = Embedding(vocabulary_size, hidden, max_length)
    return encoder(num_classes, embedding, hidden, depth, heads)


def gpt(num_classes: int, *, context: int, hidden: int, depth: int, heads: int = 4) -> Net:
    """Rows of one document each; the embedding is a part of the first block."""
    blocks: list[nn.Module] = [EncoderBlock(hidden, heads, context) for _ in range(depth)]
    blocks[0] = nn.Sequential(Embedding(num_classes, hidden), blocks[0])
    readout = dense(hidden, num_classes, bias=False)
    return blocks, nn.Sequential(nn.Identity(), nn.LayerNorm(hidden), readout)


def vit(num_classes: int, *, hidden: int, depth: int, heads: int, patch: int) -> Net:
    embedding = PatchEmbedding(patch, hidden, (32 // patch) ** 2)
    return encoder(num_classes, embedding, hidden, depth, heads)


def mlp(num_classes: int, *, input_size: int, hidden: int, depth: int) -> Net:
    first = nn.Sequential(nn.Flatten(), dense(input_size, hidden), nn.ReLU())
    others = [nn.Sequential(dense(hidden, hidden), nn.ReLU()) for _ in range(depth - 1)]
    return [first, *others], dense(hidden, num_classes)


BUILDERS: dict[str, Callable[..., Net]] = {
    builder.__name__: builder
    for builder in (vgg, vgg8, resnet, resnet18, wide_resnet, lstm, transformer, vit, mlp)
}


@torch.no_grad()
def load(modules: Mapping[str, nn.Module], arrays: Mapping[str, np.ndarray]) -> None:
    """Takes over weights by the names and in the layouts of `jdecouple.Trainer.to_arrays`.

    `modules` are blocks and what holds heads, such as "block_0/block" and "block_0/head"; weights
    of others are left out.
    """
    for name, value in arrays.items():
        owner, kind, part, *path, what = name.split("/")
        if kind != "params" or f"{owner}/{part}" not in modules:
            continue
        path = [step for step in path if step != "layers"]
        module = modules[f"{owner}/{part}"].get_submodule(".".join(path))
        for target, weights in _tensors(module, what, np.asarray(value)).items():
            getattr(module, target).copy_(torch.tensor(np.ascontiguousarray(weights)))


def _tensors(module: nn.Module, what: str, value: np.ndarray) -> dict[str, np.ndarray]:
    """An array of ours as tensors of a module, by name."""
    if isinstance(module, nn.Conv2d) and what == "kernel":
        value = value.reshape(*module.kernel_size, module.in_channels, module.out_channels)
        return {"weight": value.transpose(3, 2, 0, 1)}
    if isinstance(module, nn.Linear) and what == "kernel":  # of HWC, not of CHW
        value = value.reshape(-1, module.channels, module.out_features)
        return {"weight": value.transpose(2, 1, 0).reshape(module.out_features, -1)}
    if isinstance(module, nn.LSTM):
        name = {"kernel": "weight_ih", "recurrent": "weight_hh", "bias": "bias_ih"}[what]
        directions = zip(("_l0", "_l0_reverse"), value, strict=True)
        return {name + suffix: direction.T for suffix, direction in directions}
    return {"weight" if what == "scale" else what: value}
