"""InfoPro's objective: every block keeps the image and the task (arXiv 2101.10832)."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jdecouple._errors import require_bool, require_int, require_number, require_one_of
from jdecouple.methods.objectives.base import (
    BlockInfo,
    HeadOutput,
    Objective,
    at_least_float32,
    unfit_target,
)
from jdecouple.methods.objectives.cross_entropy import CrossEntropy, cross_entropy
from jdecouple.methods.objectives.maps import is_map, pooled_info
from jdecouple.methods.objectives.supervised_contrastive import supervised_contrastive
from jdecouple.models import layers
from jdecouple.models.resampling import bilinear
from jdecouple.models.sequence import pooled

DECODER_CHANNELS = 12


def unit_range(x: jax.Array, mean: Sequence[float] = (), std: Sequence[float] = ()) -> jax.Array:
    """A model's input on the scale 0..1, the target of a reconstruction.

    Args:
        x: `[batch, ..., channels]`. Bytes are divided by 255.
        mean: Means by channel that were subtracted from `x`; empty if they are not known.
        std: Deviations by channel that `x` was divided by afterwards.

    Returns:
        `x` with its normalisation undone and cut to 0..1. Where `mean` is empty, every example is
        scaled to reach from 0 to 1; one without contrast becomes 0.5 throughout. Float32 at least.
    """
    if x.dtype == jnp.uint8:
        return x.astype(jnp.float32) / 255
    x = at_least_float32(x)
    if mean:
        return jnp.clip(x * jnp.asarray(std, x.dtype) + jnp.asarray(mean, x.dtype), 0, 1)
    axes = tuple(range(1, x.ndim))
    least, most = x.min(axes, keepdims=True), x.max(axes, keepdims=True)
    contrast = most > least
    return jnp.where(contrast, (x - least) / jnp.where(contrast, most - least, 1), 0.5)


class Decoder(nnx.Module):
    """From a block's output to logits of the model's input.

    Maps: bilinear interpolation to the image's size, 3x3 convolution to 12 channels, BatchNorm,
    ReLU, 3x3 convolution to the image's channels. What is no map, or no map's image: dense, ReLU,
    dense.
    """

    def __init__(self, hidden: int, info: BlockInfo, rngs: nnx.Rngs):
        options = info.options(rngs)
        self.shape = tuple(info.input.shape[1:])
        self.spatial = len(self.shape) == 3 and is_map(info.features)
        if self.spatial:
            middle = DECODER_CHANNELS
            self.net = nnx.Sequential(
                *layers.conv_norm(info.features.shape[-1], middle, use_bias=True, **options),
                nnx.relu,
                layers.conv(middle, self.shape[-1], use_bias=True, **options),
            )
        else:
            self.net = layers.perceptron(info.size, (hidden, math.prod(self.shape)), **options)

    def __call__(self, features: jax.Array) -> jax.Array:
        """Logits of the shape of the input."""
        if self.spatial:
            features = bilinear(features, *self.shape[:2])
        return self.net(features).reshape(-1, *self.shape)


def _task_net(objective: "InformationPropagation", info: BlockInfo, rngs: nnx.Rngs) -> nnx.Module:
    """Convolution to twice the channels, at stride 2, global average of maps, two dense layers."""
    options = info.options(rngs)
    contrastive = objective.task_loss == "contrastive"
    widths = (objective.hidden, objective.features if contrastive else info.num_classes)
    if not is_map(info.features):
        return layers.perceptron(info.size, widths, **options)
    channels = info.features.shape[-1]
    doubles = not objective.max_channels or channels < objective.max_channels
    middle, strides = (2 * channels, 2) if doubles else (channels, 1)
    return nnx.Sequential(
        *layers.conv_norm(channels, middle, strides=strides, **options),
        nnx.relu,
        layers.GlobalAveragePool(),
        layers.perceptron(middle, widths, **options),
    )


class InformationPropagationHead(nnx.Module):
    """A decoder of the image and a net of the task; each only where its weight is not 0."""

    def __init__(self, objective: "InformationPropagation", info: BlockInfo, rngs: nnx.Rngs):
        self.objective = objective
        info = pooled_info(info, 0)
        self.is_first = info.index == 0
        self.weights = objective.weights(info.index, info.num_blocks)
        reconstruction, task = self.weights
        self.decoder = Decoder(objective.hidden, info, rngs) if reconstruction else None
        self.task_net = _task_net(objective, info, rngs) if task else None
        above = range(1, info.num_blocks - 1)
        self.sends = self.is_first and any(
            objective.reconstruction
            if info.grown  # of blocks whose number and weights are not known here
            else [objective.weights(index, info.num_blocks)[0] for index in above]
        )

    def __call__(self, features: Any, carry: Mapping[str, Any]) -> HeadOutput:
        """Loss of `features` under `carry["label"]` and the image.

        The image is made from the first block's input, `carry["x"]`, and travels to the blocks
        above as `carry["image"]`.
        """
        features = pooled(features)
        image = carry.get("image")
        if self.is_first:
            image = unit_range(carry["x"], self.objective.image_mean, self.objective.image_std)
        metrics = {}
        loss: Any = 0.0
        if self.decoder is not None:
            pixels = at_least_float32(self.decoder(features))
            metrics["reconstruction"] = optax.sigmoid_binary_cross_entropy(pixels, image).mean()
            loss += self.weights[0] * metrics["reconstruction"]
        logits = None
        if self.task_net is not None:
            output = self.task_net(features)
            if self.objective.task_loss == "contrastive":
                task = supervised_contrastive(
                    output,
                    carry["label"],
                    self.objective.temperature,
                    count_self=self.objective.count_self,
                )
            else:
                logits = output
                task = cross_entropy(logits, carry["label"])
            metrics[self.objective.task_loss] = task
            loss += self.weights[1] * task
        return HeadOutput(loss, metrics, logits, {"image": image} if self.sends else {})

    def logits(self, features: Any) -> jax.Array | None:
        """Logits `[batch, classes]` under `task_loss="cross_entropy"`, else None."""
        if self.task_net is None or self.objective.task_loss == "contrastive":
            return None
        return self.task_net(pooled(features))


@dataclasses.dataclass(frozen=True)
class InformationPropagation(Objective):
    """Reconstruction of the image and a loss of the task at every block but the last.

    The last block trains with the model's own classifier (or with its output as logits where there
    is none) by cross-entropy.

    Attributes:
        reconstruction: Weights of the binary cross-entropy of the decoded image at the first block
            and at the last but one; linear in the block's index between them, and the first where
            there are two blocks. The default is the authors' for four.
        task: Weights of the task's loss, likewise. A term of weight 0 is not computed.
        task_loss: "contrastive", or "cross_entropy", which makes the block an exit.
        hidden: Width of the hidden dense layer (of the decoder too, where it is dense).
        features: Width of what the contrastive loss reads.
        temperature: Divisor of the cosines.
        count_self: Whether the contrastive loss divides by the count of a class that includes the
            example, as SCPL's code does, or by the one that does not, as the authors' does.
        max_channels: Maps of as many channels keep them, and their pixels, in the convolution of
            the task's net; the authors' 64 are those of their nets' last group. 0: none do.
        image_mean: Means by channel that the input was normalised with, on the scale 0..1; empty if
            they are not known, see `unit_range`. `train.py` gives those of the data set.
        image_std: The same for the standard deviations.
    """

    reconstruction: tuple[float, float] = (1.0, 0.0)
    task: tuple[float, float] = (0.0, 1.0)
    task_loss: str = "contrastive"
    hidden: int = 128
    features: int = 128
    temperature: float = 0.07
    image_mean: tuple[float, ...] = ()
    image_std: tuple[float, ...] = ()
    count_self: bool = True
    max_channels: int = 0
    tokens: ClassVar[str] = "none"

    def __post_init__(self):
        for name in ("reconstruction", "task", "image_mean", "image_std"):
            numbers = getattr(self, name)
            if not isinstance(numbers, tuple | list):
                raise ValueError(f"{name} is {numbers!r}: a sequence of numbers is needed")
            for number in numbers:
                require_number(**{name: number})
            if name in ("reconstruction", "task") and len(numbers) != 2:
                raise ValueError(f"{name} is {numbers!r}: two weights, first and last, are needed")
            object.__setattr__(self, name, tuple(map(float, numbers)))  # modules have to hash it
        require_one_of(("contrastive", "cross_entropy"), task_loss=self.task_loss)
        require_int(1, hidden=self.hidden, features=self.features)
        require_int(0, max_channels=self.max_channels)
        require_bool(count_self=self.count_self)
        require_number(positive=True, temperature=self.temperature)
        if len(self.image_mean) != len(self.image_std) or not all(self.image_std):
            raise ValueError(
                f"image_mean is {self.image_mean} and image_std {self.image_std}: as many "
                "numbers of each, and image_std above 0, are needed"
            )

    def weights(self, index: int, num_blocks: int) -> tuple[float, float]:
        """Weights of reconstruction and task at a block below the last."""
        share = index / (num_blocks - 2) if num_blocks > 2 else 0.0
        reconstruction, task = (
            (1 - share) * first + share * last for first, last in (self.reconstruction, self.task)
        )
        return reconstruction, task

    def head(self, info: BlockInfo, rngs: nnx.Rngs) -> nnx.Module | None:
        """Head for any block.

        Raises:
            ValueError: The model's input is no array of real numbers or has not as many channels as
                `image_mean`, both weights of the block are 0, or the last output is no logits.
        """
        if info.is_last:
            return CrossEntropy().head(info, rngs)
        _check_input(info.input, len(self.image_mean))
        if not any(self.weights(info.index, info.num_blocks)):
            raise ValueError(
                f"reconstruction is {self.reconstruction} and task {self.task}: a weight above 0 "
                f"is needed at block {info.index}"
            )
        return InformationPropagationHead(self, info, rngs)


def _check_input(image: Any, channels: int) -> None:
    if kind := unfit_target(image):
        raise ValueError(
            f"the model's input is {kind}: infopro needs images of floats or uint8 to reconstruct"
        )
    if channels and image.shape[-1] != channels:
        raise ValueError(
            f"image_mean has {channels} numbers: the images have {image.shape[-1]} channels"
        )
