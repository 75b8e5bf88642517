"""Models cut into blocks: builders that return a `Model` of plain nnx modules.

Every builder has arguments of its own with defaults, so that a configuration can call any of them
by name, and these, which their docstrings leave out:

- `num_classes`: number of logits;
- of images: `image_size`, height and width in pixels, and `channels`;
- of texts (`lstm`, `transformer`): `vocabulary_size`, number of token ids, of which 0 is padding;
  `max_length`, most tokens in a text; `embeddings`, initial word vectors `[vocabulary_size, width]`
  that are trained further, or None to draw them;
- of tokens to go on with (`gpt`, `lstm_lm`): `num_classes` tokens, of which 0 begins a document,
  and `context`, most tokens of a row;
- `cut`: local modules, consecutive units with one head, which become the blocks: "units", each by
  itself; a published number of modules; a published split such as "infopro:4"; or the indices of
  units at which they begin, see `jdecouple.models.cuts`;
- `init`: "flax", "torch", "he" or "he_out", see `jdecouple.models.layers`;
- `param_dtype`: dtype of the parameters;
- `rngs`: source of initial weights, and of dropout's keys.

Each raises ValueError where a size is not positive, a name unknown or an image too small.
"""

import inspect
from collections.abc import Callable

from jdecouple._errors import choices
from jdecouple.models import layers
from jdecouple.models.base import Model
from jdecouple.models.cuts import cuttable
from jdecouple.models.gpt import gpt
from jdecouple.models.lstm import lstm
from jdecouple.models.lstm_lm import lstm_lm
from jdecouple.models.mlp import mlp
from jdecouple.models.resnet import (
    resnet,
    resnet18,
    resnet20,
    resnet32,
    resnet34,
    resnet50,
    resnet56,
    resnet101,
    resnet110,
)
from jdecouple.models.revnet import revnet, revnet18
from jdecouple.models.transformer import transformer
from jdecouple.models.vgg import vgg, vgg8
from jdecouple.models.vgg8b import vgg8b
from jdecouple.models.vit import vit
from jdecouple.models.wide_resnet import wide_resnet, wrn28_10

_CIFAR_RESNETS = resnet, resnet20, resnet32, resnet56, resnet110
_RESNETS = *_CIFAR_RESNETS, resnet18, resnet34, resnet50, resnet101
_BUILDERS: dict[str, Callable[..., Model]] = {
    builder.__name__: builder
    for builder in (
        *(gpt, lstm, lstm_lm, mlp, *_RESNETS, revnet, revnet18, transformer, vgg, vgg8, vgg8b),
        *(vit, wide_resnet, wrn28_10),
    )
}
_BUILT_IN = frozenset(_BUILDERS)


def register(name: str, builder: Callable[..., Model]) -> None:
    """Adds a builder; `get`, configurations and the command line then know its name.

    A name that was registered before is replaced, so that a notebook's cell may run twice.

    >>> from flax import nnx
    >>> def one_layer(num_classes, *, image_size, channels, rngs):
    ...     layers = [nnx.Linear(image_size**2 * channels, num_classes, rngs=rngs)]
    ...     return Model([nnx.Sequential(lambda x: x.reshape(x.shape[0], -1), *layers)])
    >>> register("one_layer", one_layer)
    >>> len(get("one_layer")(10, image_size=8, channels=1, rngs=nnx.Rngs(0)).blocks)
    1

    Args:
        name: what the model is called.
        builder: takes what the builders of this package take; its own arguments are options of
            the model in a configuration. It gets `cut` unless it has an argument of that name.

    Raises:
        ValueError: the name is a built-in model's, or an argument is called "name".
        TypeError: the builder cannot be called.
    """
    if name in _BUILT_IN:
        raise ValueError(f"model {name!r} is built in: register yours under another name")
    if not callable(builder):
        raise TypeError(f"the builder of model {name!r} is {builder!r}: a function is needed")
    if "name" in inspect.signature(builder).parameters:
        raise ValueError(f"model {name!r} has two arguments called 'name'")
    _BUILDERS[name] = cuttable(builder)


def names() -> tuple[str, ...]:
    """Names that `get` knows, sorted."""
    return tuple(sorted(_BUILDERS))


def get(name: str) -> Callable[..., Model]:
    """Model builder called `name`.

    >>> from flax import nnx
    >>> len(get("mlp")(10, image_size=8, channels=1, depth=3, rngs=nnx.Rngs(0)).blocks)
    3

    Raises:
        ValueError: No builder has that name.
    """
    if name not in _BUILDERS:
        raise ValueError(f"unknown model {name!r}: {choices(name, names())}")
    return _BUILDERS[name]


__all__ = [
    "Model",
    "get",
    "gpt",
    "layers",
    "lstm",
    "lstm_lm",
    "mlp",
    "names",
    "register",
    "resnet",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet50",
    "resnet56",
    "resnet101",
    "resnet110",
    "revnet",
    "revnet18",
    "transformer",
    "vgg",
    "vgg8",
    "vgg8b",
    "vit",
    "wide_resnet",
    "wrn28_10",
]
