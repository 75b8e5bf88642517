"""VGG nets: blocks of 3x3 convolution, BatchNorm, ReLU, and 2x2 maximum pooling."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jdecouple._errors import require_int, require_one_of
from jdecouple.models import layers
from jdecouple.models.base import Model
from jdecouple.models.cuts import cuttable

# Four blocks each, as printed in DeInfoReg (arXiv 2506.18193) and SCPL (arXiv 2602.00062).
LAYOUTS = {
    "deinforeg": "128,128,128,256,M|256,512,M|512,512,M|512,M",
    "scpl": "128,256,M|256,512,M|512,M|512,M",
}

# Hidden layers of the classifier and their activation, as in those papers' code.
CLASSIFIERS: dict[str, tuple[tuple[int, ...], str]] = {
    "linear": ((), "relu"),
    "deinforeg": ((2048,), "relu"),
    "scpl": ((2500,), "sigmoid"),
}

Blocks = Sequence[Sequence[int | str]]


class VggBlock(nnx.Sequential):
    """Convolutions with BatchNorm and ReLU, and poolings.

    Args:
        channels: Of what it gets.
        plan: Channels of every convolution, and "M" for 2x2 maximum pooling, in order.
        **options: `init`, `param_dtype` and `rngs`.
    """

    def __init__(self, channels: int, plan: tuple[int | str, ...], **options: Any):
        stack: list[Callable[..., jax.Array]] = []
        for item in plan:
            if isinstance(item, str):
                stack.append(layers.MaxPool())
            else:
                stack += [*layers.conv_norm(channels, item, **options), nnx.relu]
                channels = item
        super().__init__(*stack)
        self.plan = plan

    def anew(self, received: Any, output: Any, **options: Any) -> "VggBlock":
        """A fresh block for maps of any number of channels."""
        return VggBlock(received.shape[-1], self.plan, **options)


@cuttable
def vgg(
    num_classes: int,
    *,
    blocks: str | Blocks = LAYOUTS["deinforeg"],
    classifier: str = "linear",
    width: float = 1.0,
    image_size: int = 32,
    channels: int = 3,
    init: str = "flax",
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
) -> Model:
    """VGG of any layout, on square NHWC images.

    >>> model = vgg(10, blocks="8,M|16,16,M", rngs=nnx.Rngs(0))
    >>> model.blocks[1](model.blocks[0](jnp.ones((5, 32, 32, 3)))).shape
    (5, 8, 8, 16)

    Arguments not listed are those of all builders, see `jdecouple.models`.

    Args:
        blocks: What each block holds, in order: channel counts (convolution without bias,
            BatchNorm, ReLU) and "M" (2x2 maximum pooling). As text, "32,32,M|64,M"; or as nested
            sequences, `((32, 32, "M"), (64, "M"))`.
        classifier: What follows the flattened last block: "linear" (one dense layer), or the
            classifier of a paper's code, "deinforeg" (dense 2048, ReLU, dense) or "scpl" (dense
            2500, sigmoid, dense).
        width: Factor on all channel counts and on the classifier's hidden layer; each is rounded
            and at least 1.

    Returns:
        A model whose blocks map `[batch, height, width, channels]` to the same with fewer pixels.

    Raises:
        ValueError: The layout is malformed or the image too small for its poolings.
    """
    require_int(1, num_classes=num_classes, image_size=image_size, channels=channels)
    require_one_of(CLASSIFIERS, classifier=classifier)
    layout = _parse(blocks)
    pools = sum(item == "M" for block in layout for item in block)
    layers.require_pixels(image_size, pools, "poolings")
    options: dict[str, Any] = {"init": init, "param_dtype": param_dtype, "rngs": rngs}
    modules = []
    for block in layout:
        plan = tuple(x if isinstance(x, str) else layers.scaled(x, width) for x in block)
        modules.append(VggBlock(channels, plan, **options))
        channels = next((x for x in reversed(plan) if not isinstance(x, str)), channels)
    features = channels * (image_size >> pools) ** 2
    hidden, activation = CLASSIFIERS[classifier]
    widths = [*(layers.scaled(size, width) for size in hidden), num_classes]
    return Model(modules, layers.perceptron(features, widths, activation=activation, **options))


@cuttable
def vgg8(
    num_classes: int,
    *,
    layout: str = "deinforeg",
    classifier: str = "linear",
    width: float = 1.0,
    image_size: int = 32,
    channels: int = 3,
    init: str = "flax",
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
) -> Model:
    """VGG in four blocks, in the layout of one of the papers.

    >>> model = vgg8(10, width=1 / 16, rngs=nnx.Rngs(0))
    >>> len(model.blocks), model.blocks[0](jnp.ones((5, 32, 32, 3))).shape
    (4, (5, 16, 16, 16))

    Args:
        layout: "deinforeg", which is `128,128,128,256,M|256,512,M|512,512,M|512,M` as `vgg` writes
            it, or "scpl", which is `128,256,M|256,512,M|512,M|512,M`.
        classifier: "linear", "deinforeg" or "scpl", see `vgg`.
        width: Factor on all channel counts and on the classifier's hidden layer; each is rounded
            and at least 1.
    """
    require_one_of(LAYOUTS, layout=layout)
    sizes: dict[str, Any] = {"width": width, "image_size": image_size, "channels": channels}
    options: dict[str, Any] = {"init": init, "param_dtype": param_dtype, "rngs": rngs}
    return vgg(num_classes, blocks=LAYOUTS[layout], classifier=classifier, **sizes, **options)


def _parse(blocks: str | Blocks) -> list[list[int | str]]:
    if isinstance(blocks, str):
        blocks = [[text.strip() for text in block.split(",")] for block in blocks.split("|")]
    layout = [[_item(item) for item in block] for block in blocks]
    if not layout or not all(layout):
        raise ValueError(f"blocks is {blocks!r}: no block may be empty")
    if not any(isinstance(item, int) for block in layout for item in block):
        raise ValueError(f"blocks is {blocks!r}: at least one convolution is needed")
    return layout


def _item(value: int | str) -> int | str:
    text = str(value)
    if text == "M":
        return text
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise ValueError(f"blocks holds {value!r}: positive channel counts and 'M' are needed")
    return int(text)
