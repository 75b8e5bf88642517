"""The peer of `peers.py`: any net of `torch_nets.py` under DeInfoReg or BP, in plain PyTorch.

Written from docs/methods.md as one would write it in PyTorch: the formulas as they stand, autograd,
and for the compiled peer `torch.compile` of each block with its loss (of the whole net under BP,
whose error crosses all blocks).
"""

import contextlib
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch_nets
from torch import Tensor, nn
from torch.nn import functional as F
from torch_nets import perceptron, states, summary

ALPHA = 0.001  # weight of the cross-entropy in DeInfoReg's loss
COMPILED_VARIANTS = 64  # of one function: blocks of other shapes count as such, by default 8 may


def similarity(x: Tensor) -> Tensor:
    """Cosine similarities of the rows of `x` `[batch, dim]`, centred first."""
    rows = F.normalize(x - x.mean(1, keepdim=True), dim=1)
    return rows @ rows.T


def information_regularization(z: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Sum of DeInfoReg's three terms for the projector's output `z` `[batch, dim]`."""
    batch, dim = z.shape
    z = F.normalize(z.float(), dim=1)
    centred = z - z.mean(0)
    variance = F.relu(1 - torch.sqrt(centred.var(0) + 1e-7)).mean() / batch
    wanted = similarity(F.one_hot(labels, num_classes).to(z.dtype))
    invariance = (wanted - similarity(z)).square().mean()
    squares = (centred.T @ centred / batch).square()
    covariance = (squares.sum() - squares.diagonal().sum()) / dim
    return variance + invariance + covariance


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over all labels, `[batch]` or `[batch, length]`, of `logits` `[..., classes]`."""
    return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten())


class LocalUnit(nn.Module):
    """A block with DeInfoReg's head: what the next block reads, and the loss.

    A block that only embeds has no cross-entropy.
    """

    def __init__(
        self, block: nn.Module, shape: Sequence[int], widths: Sequence[int], num_classes: int
    ):
        super().__init__()
        self.block = block
        self.projector = perceptron(shape, widths)
        self.classifier = None
        if not getattr(block, "is_embedding", False):
            norm, readout = nn.BatchNorm1d(widths[-1]), torch_nets.dense(widths[-1], num_classes)
            self.classifier = nn.Sequential(norm, nn.ReLU(), readout)
        self.num_classes = num_classes

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output, and DeInfoReg's loss."""
        output = self.block(x)
        z = self.projector(summary(output))
        with torch.autocast(x.device.type, enabled=False):
            loss = information_regularization(z, labels, self.num_classes)
        if self.classifier is not None:
            loss = loss + ALPHA * F.cross_entropy(self.classifier(z).float(), labels)
        return states(output), loss


class WholeUnit(nn.Module):
    """All blocks and the classifier under cross-entropy."""

    def __init__(self, blocks: Iterable[nn.Module], classifier: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.classifier = classifier

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What the last block hands on, and the cross-entropy."""
        output: Any = x
        for block in self.blocks:
            output = block(states(output))
        read = states if labels.ndim > 1 else summary
        return states(output), cross_entropy(self.classifier(read(output)), labels)


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
    """A net with its optimiser, and a batch ("x" and "label", NumPy) that is on the device.

    `net` is a name of `torch_nets.BUILDERS` with its options, `widths` are those of the projector.
    """

    def __init__(
        self,
        method: str,
        net: tuple[str, Mapping[str, Any]],
        widths: Sequence[int],
        batch: Mapping[str, np.ndarray],
        *,
        num_classes: int,
        learning_rate: float,
        device: str,
        compiled: bool,
        precision: str = "float32",
    ):
        self._x, self._labels = (values.to(device) for values in tensors(batch))
        self._device, self._half = device, precision == "bfloat16"
        name, options = net
        blocks, classifier = torch_nets.BUILDERS[name](num_classes, **options)
        local = method == "deinforeg"
        units: list[nn.Module] = [WholeUnit(blocks, classifier)]
        if local:
            shapes, output = [], self._x[:2].cpu()
            with torch.no_grad():
                for block in blocks:
                    output = block(states(output))
                    shapes.append(summary(output).shape[1:])
            units = [LocalUnit(*x, widths, num_classes) for x in zip(blocks, shapes, strict=True)]
        # Under BP the head belongs to the last block.
        first = len(blocks) - len(units)
        self._modules = {f"block_{i}/block": block for i, block in enumerate(blocks)}
        self._modules |= {f"block_{first + i}/head": unit for i, unit in enumerate(units)}
        params = [p for x in units for p in x.to(device).parameters() if p.requires_grad]
        sgd = functools.partial(torch.optim.SGD, momentum=0.9)
        self._optimizer: torch.optim.Optimizer = (Lars if local else sgd)(params, learning_rate)
        self._calls = [torch.compile(unit) if compiled else unit for unit in units]

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Takes over weights of ours, see `torch_nets.load`."""
        torch_nets.load(self._modules, arrays)

    def run(self, steps: int) -> float:
        """Trains on the batch; waits for the device and returns the last step's loss."""
        for _ in range(steps):
            self._optimizer.zero_grad()
            x, losses = self._x, []
            for call in self._calls:
                with self._autocast():
                    x, loss = call(x.detach(), self._labels)
                loss.backward()
                losses.append(loss.detach())
            self._optimizer.step()
        if self._device == "cuda":
            torch.cuda.synchronize()
        return float(sum(losses))

    def _autocast(self) -> contextlib.AbstractContextManager:
        if not self._half:
            return contextlib.nullcontext()
        return torch.autocast(self._device, torch.bfloat16)


def tensors(batch: Mapping[str, np.ndarray]) -> tuple[Tensor, Tensor]:
    """Inputs and labels of a batch of ours; images become NCHW."""
    x, labels = torch.tensor(batch["x"]), torch.tensor(batch["label"]).long()
    if x.ndim == 4:
        x = x.permute(0, 3, 1, 2).contiguous()
    return (x if x.is_floating_point() else x.long()), labels


def configure(device: str, threads: int, precision: str) -> None:
    """Settings that make PyTorch compute as JAX does."""
    torch.set_num_threads(threads)
    torch._dynamo.config.cache_size_limit = COMPILED_VARIANTS
    if device == "cuda":  # XLA tries convolution algorithms out
        torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")
        torch.backends.cudnn.allow_tf32 = precision != "float32"
        torch.backends.cudnn.benchmark = True
