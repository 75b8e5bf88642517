"""Models cut into blocks: builders that return a `Model` of plain nnx modules.

Every builder has arguments of its own with defaults, so that a configuration can call any of them
by name, and these, which their docstrings leave out:

- `num_classes`: number of logits;
- of images: `image_size`, height and width in pixels, and `channels`;
- of texts (`lstm`, `transformer`): `vocabulary_size`, number of token ids, of which 0 is padding;
  `max_length`, most tokens in a text; `embeddings`, initial word vectors `[vocabulary_size, width]`
  that are trained further, or None to draw them;
- `init`: "flax", "torch" or "he", see `jdecouple.models.layers`;
- `param_dtype`: dtype of the parameters;
- `rngs`: source of initial weights, and of dropout's keys.

Each raises ValueError where a size is not positive, a name unknown or an image too small.
"""

from collections.abc import Callable

from jdecouple.models import layers
from jdecouple.models.base import Model
from jdecouple.models.lstm import lstm
from jdecouple.models.mlp import mlp
from jdecouple.models.resnet import (
    resnet,
    resnet18,
    resnet20,
    resnet34,
    resnet50,
    resnet56,
    resnet101,
    resnet110,
)
from jdecouple.models.transformer import transformer
from jdecouple.models.vgg import vgg, vgg8
from jdecouple.models.vit import vit
from jdecouple.models.wide_resnet import wide_resnet, wrn28_10

_BUILDERS: dict[str, Callable[..., Model]] = {
    "lstm": lstm,
    "mlp": mlp,
    "resnet": resnet,
    "resnet18": resnet18,
    "resnet20": resnet20,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet56": resnet56,
    "resnet101": resnet101,
    "resnet110": resnet110,
    "transformer": transformer,
    "vgg": vgg,
    "vgg8": vgg8,
    "vit": vit,
    "wide_resnet": wide_resnet,
    "wrn28_10": wrn28_10,
}


def names() -> tuple[str, ...]:
    """Names that `get` knows, sorted."""
    return tuple(sorted(_BUILDERS))


def get(name: str) -> Callable[..., Model]:
    """Model builder called `name`.

    Raises:
        ValueError: No builder has that name.
    """
    if name not in _BUILDERS:
        raise ValueError(f"unknown model {name!r}: allowed are {', '.join(names())}")
    return _BUILDERS[name]


__all__ = [
    "Model",
    "get",
    "layers",
    "lstm",
    "mlp",
    "names",
    "resnet",
    "resnet18",
    "resnet20",
    "resnet34",
    "resnet50",
    "resnet56",
    "resnet101",
    "resnet110",
    "transformer",
    "vgg",
    "vgg8",
    "vit",
    "wide_resnet",
    "wrn28_10",
]
