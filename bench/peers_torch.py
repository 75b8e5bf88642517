"""The peer of `peers.py`: VGG-8 under DeInfoReg or BP, in plain PyTorch.

Written from docs/methods.md as one would write it in PyTorch: NCHW, the formulas as they stand,
autograd, and for the compiled peer `torch.compile` of each block with its loss (of the whole net
under BP, whose error crosses all blocks).
"""

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

ALPHA = 0.001  # weight of the cross-entropy in DeInfoReg's loss


def vgg_block(layout: Sequence[int | str], channels: int) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU for a number of channels; 2x2 pooling for "M"."""
    stack: list[nn.Module] = []
    for item in layout:
        if isinstance(item, str):
            stack.append(nn.MaxPool2d(2))
            continue
        stack += [nn.Conv2d(channels, item, 3, padding=1, bias=False), nn.BatchNorm2d(item)]
        stack.append(nn.ReLU())
        channels = item
    return nn.Sequential(*stack)


def projector(size: int, widths: Sequence[int]) -> nn.Sequential:
    """Flatten, then dense layers with BatchNorm and ReLU between them."""
    stack: list[nn.Module] = [nn.Flatten()]
    for before, after in itertools.pairwise((size, *widths)):
        if len(stack) > 1:
            stack += [nn.BatchNorm1d(before), nn.ReLU()]
        stack.append(nn.Linear(before, after))
    return nn.Sequential(*stack)


def similarity(x: Tensor) -> Tensor:
    """Cosine similarities of the rows of `x` `[batch, dim]`, centred first."""
    rows = F.normalize(x - x.mean(1, keepdim=True), dim=1)
    return rows @ rows.T


def information_regularization(z: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Sum of DeInfoReg's three terms for the projector's output `z` `[batch, dim]`."""
    batch, dim = z.shape
    z = F.normalize(z, dim=1)
    centred = z - z.mean(0)
    variance = F.relu(1 - torch.sqrt(centred.var(0) + 1e-7)).mean() / batch
    wanted = similarity(F.one_hot(labels, num_classes).to(z.dtype))
    invariance = (wanted - similarity(z)).square().mean()
    squares = (centred.T @ centred / batch).square()
    covariance = (squares.sum() - squares.diagonal().sum()) / dim
    return variance + invariance + covariance


class LocalUnit(nn.Module):
    """A block with DeInfoReg's head: output and loss."""

    def __init__(self, block: nn.Module, size: int, widths: Sequence[int], num_classes: int):
        super().__init__()
        self.block = block
        self.projector = projector(size, widths)
        self.classifier = nn.Sequential(
            nn.BatchNorm1d(widths[-1]), nn.ReLU(), nn.Linear(widths[-1], num_classes)
        )
        self.num_classes = num_classes

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output, and DeInfoReg's loss."""
        x = self.block(x)
        z = self.projector(x)
        loss = information_regularization(z, labels, self.num_classes)
        return x, loss + ALPHA * F.cross_entropy(self.classifier(z), labels)


class WholeUnit(nn.Module):
    """All blocks and the classifier under cross-entropy."""

    def __init__(self, blocks: Iterable[nn.Module], size: int, num_classes: int):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(size, num_classes))

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The last block's output, and the cross-entropy."""
        for block in self.blocks:
            x = block(x)
        return x, F.cross_entropy(self.classifier(x), labels)


class Lars(torch.optim.Optimizer):
    """LARS as `jdecouple.optim.lars` states it, over all parameters at once."""

    def __init__(self, params: Iterable[Tensor], lr: float):
        super().__init__(params, {"lr": lr, "momentum": 0.9, "weight_decay": 1e-4, "trust": 0.001})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Moves all parameters by their gradients."""
        for group in self.param_groups:
            params = group["params"]
            matrices = [p for p in params if p.ndim > 1]
            moved = torch._foreach_add(
                [p.grad for p in matrices], matrices, alpha=group["weight_decay"]
            )
            norms = torch.stack(torch._foreach_norm(matrices))
            others = torch.stack(torch._foreach_norm(moved))
            ratios = torch.where(norms * others > 0, group["trust"] * norms / others, 1.0)
            torch._foreach_mul_(moved, list(ratios.unbind()))
            updates = [*moved, *(p.grad for p in params if p.ndim <= 1)]
            ordered = [*matrices, *(p for p in params if p.ndim <= 1)]
            momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in ordered]
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, updates)
            torch._foreach_add_(ordered, momenta, alpha=-group["lr"])


class Peer:
    """A net with its optimiser, and a batch ("x" NHWC and "label", NumPy) that is on the device.

    `blocks` are layouts, channels and "M" for pooling, `widths` those of the projector.
    """

    def __init__(
        self,
        method: str,
        blocks: Sequence[Sequence[int | str]],
        widths: Sequence[int],
        batch: Mapping[str, np.ndarray],
        *,
        num_classes: int,
        learning_rate: float,
        device: str,
        compiled: bool,
    ):
        self._x = torch.tensor(batch["x"]).permute(0, 3, 1, 2).contiguous().to(device)
        self._labels = torch.tensor(batch["label"]).long().to(device)
        self._cuda = device == "cuda"
        _, channels, pixels, _ = self._x.shape
        self._blocks, self._maps = [], []
        for layout in blocks:
            self._blocks.append(vgg_block(layout, channels))
            channels = [item for item in layout if isinstance(item, int)][-1]
            pixels >>= list(layout).count("M")
            self._maps.append((pixels, pixels, channels))
        sizes = [int(np.prod(shape)) for shape in self._maps]
        local = method == "deinforeg"
        self._units: list[nn.Module] = (
            [LocalUnit(*x, widths, num_classes) for x in zip(self._blocks, sizes, strict=True)]
            if local
            else [WholeUnit(self._blocks, sizes[-1], num_classes)]
        )
        params = [p for unit in self._units for p in unit.to(device).parameters()]
        sgd = functools.partial(torch.optim.SGD, momentum=0.9)
        self._optimizer: torch.optim.Optimizer = (Lars if local else sgd)(params, learning_rate)
        self._calls = [torch.compile(unit) if compiled else unit for unit in self._units]

    @torch.no_grad()
    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Takes over weights by the names and in the layouts of `jdecouple.Trainer.to_arrays`."""
        for name, value in arrays.items():
            owner, kind, *path = name.split("/")
            if kind != "params":
                continue
            part, index, what = (name for name in path if name not in ("head", "layers"))
            number = int(owner.removeprefix("block_"))
            unit = self._units[min(number, len(self._units) - 1)]
            stack = self._blocks[number] if part == "block" else unit.get_submodule(part)
            layer, follows = stack[int(index)], stack[int(index) - 1]
            target = layer.bias if what == "bias" else layer.weight
            if isinstance(layer, nn.Conv2d):
                value = value.transpose(3, 2, 0, 1)
            elif what == "kernel" and isinstance(follows, nn.Flatten):  # of CHW, not of HWC
                maps = value.reshape(*self._maps[number], -1)
                value = maps.transpose(3, 2, 0, 1).reshape(target.shape)
            elif what == "kernel":
                value = value.T
            target.copy_(torch.tensor(value))

    def run(self, steps: int) -> float:
        """Trains on the batch; waits for the device and returns the last step's loss."""
        for _ in range(steps):
            self._optimizer.zero_grad()
            x, losses = self._x, []
            for call in self._calls:
                x, loss = call(x.detach(), self._labels)
                loss.backward()
                losses.append(loss.detach())
            self._optimizer.step()
        if self._cuda:
            torch.cuda.synchronize()
        return float(sum(losses))


def configure(device: str, threads: int) -> None:
    """Settings that make PyTorch compute as JAX does by default."""
    torch.set_num_threads(threads)
    if device == "cuda":  # XLA multiplies in TF32 and tries convolution algorithms out
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
