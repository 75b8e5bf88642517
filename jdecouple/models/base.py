"""The model that every method trains: a sequence of blocks and a classifier."""

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

from flax import nnx

from jdecouple._errors import choices
from jdecouple.models.cuts import Chain, Cut, Splits, module_starts, regrouped


@dataclasses.dataclass(frozen=True)
class Model:
    """A network cut into blocks.

    Blocks are plain modules, so a model of one's own needs no class of this package:

    >>> from flax import nnx
    >>> rngs = nnx.Rngs(0)
    >>> first = nnx.Sequential(nnx.Linear(64, 32, rngs=rngs), nnx.relu)
    >>> second = nnx.Sequential(nnx.Linear(32, 32, rngs=rngs), nnx.relu)
    >>> model = Model([first, second], classifier=nnx.Linear(32, 10, rngs=rngs))
    >>> len(model.blocks)
    2

    Attributes:
        blocks: Modules with their initial weights, each from one activation to the next. Any
            sequence is accepted; it is kept as a tuple.
        classifier: Module from the last block's output to logits `[batch, classes]`. None when the
            last block outputs the logits itself.
        splits: Named splits into K consecutive parts, which stages or local modules may be: name ->
            K -> indices of the K - 1 blocks at which parts 1 to K - 1 begin.
        before: The model that this one was grown from, see `jdecouple.growth`. Its blocks are the
            first ones of this model and keep the heads that they have in it.

    Raises:
        TypeError: A block or the classifier is no `flax.nnx.Module`, or `before` no `Model`.
        ValueError: There is no block, two of the modules share a variable that is no parameter, a
            split does not cut the blocks into its number of stages, or the model does not begin
            with the blocks of `before`, or adds none.
    """

    blocks: Sequence[nnx.Module]
    classifier: nnx.Module | None = None
    splits: Splits = dataclasses.field(default_factory=dict, compare=False)
    before: "Model | None" = None

    def __post_init__(self):
        if not isinstance(self.blocks, Sequence):
            raise TypeError(f"blocks is {_kind(self.blocks)}: a sequence of modules is needed")
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if not self.blocks:
            raise ValueError("blocks is empty: a model needs at least one block")
        modules = {f"blocks[{i}]": block for i, block in enumerate(self.blocks)}
        if self.classifier is not None:
            modules["classifier"] = self.classifier
        owners: dict[int, str] = {}
        for name, module in modules.items():
            if not isinstance(module, nnx.Module):
                raise TypeError(f"{name} is {_kind(module)}: a flax.nnx.Module is needed")
            for _, node in nnx.iter_graph(module):
                owned = isinstance(node, nnx.Variable) and not isinstance(node, nnx.Param)
                owner = owners.setdefault(id(node), name) if owned else name
                if owner != name:
                    raise ValueError(
                        f"{owner} and {name} share a {type(node).__name__}: of variables only "
                        "parameters may be shared"
                    )
        splits = {
            name: {k: _starts(name, k, cuts[k], len(self.blocks)) for k in cuts}
            for name, cuts in self.splits.items()
        }
        object.__setattr__(self, "splits", splits)
        if self.before is None:
            return
        if not isinstance(self.before, Model):
            raise TypeError(f"before is {_kind(self.before)}: a Model is needed")
        old = self.before.blocks
        begun = all(one is other for one, other in zip(self.blocks, old, strict=False))
        if not begun or len(self.blocks) <= len(old):
            raise ValueError(
                f"the model has {len(self.blocks)} blocks: the {len(old)} that it is grown from, "
                "and others behind them, are needed"
            )

    def at_block(self, index: int) -> "Model":
        """The model of which a block was a part first: this one, or one that it was grown from."""
        if self.before is None or index >= len(self.before.blocks):
            return self
        return self.before.at_block(index)

    def cut(self, cut: Cut) -> "Model":
        """The same net with local modules as its blocks, each of consecutive blocks of this one.

        A module of one block is that block, any other a `flax.nnx.Sequential` of its own. Named
        splits that divide a module are left out.

        >>> units = [nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(5)]
        >>> net = Model(units, splits={"mine": {2: (3,), 3: (2, 3)}})
        >>> modules = net.cut("mine:3")
        >>> len(modules.blocks), modules.splits
        (3, {'mine': {2: (2,), 3: (1, 2)}})

        Args:
            cut: "units", for this model as it is; a number of modules; a split by name; or indices
                of blocks at which modules begin. See `jdecouple.models.cuts`.

        Raises:
            ValueError: There is no such cut, or the model has grown from another.
        """
        starts = module_starts(cut, self.splits, len(self.blocks))
        if len(starts) == len(self.blocks):
            return self
        if self.before is not None:
            raise ValueError("a model that has grown cannot be cut: cut the one that it grew from")
        ends = (*starts[1:], len(self.blocks))
        parts = [self.blocks[start:end] for start, end in zip(starts, ends, strict=True)]
        blocks = [part[0] if len(part) == 1 else Chain(*part) for part in parts]
        return Model(blocks, self.classifier, regrouped(self.splits, starts))

    def boundaries(self, name: str, num_stages: int) -> tuple[int, ...]:
        """Returns the blocks at which stages 1 to `num_stages` - 1 begin in the split `name`.

        Raises:
            ValueError: The model has no such split, or it has none into that many stages.
        """
        if name not in self.splits:
            allowed = choices(name, self.splits) if self.splits else "it has none"
            raise ValueError(f"the model has no split {name!r}: {allowed}")
        cuts = self.splits[name]
        if num_stages not in cuts:
            raise ValueError(
                f"split {name!r} has no cut into {num_stages!r} stages: "
                f"allowed are {', '.join(map(str, cuts))}"
            )
        return cuts[num_stages]


def _starts(name: str, num_stages: int, starts: Sequence[int], num_blocks: int) -> tuple[int, ...]:
    integers = all(isinstance(number, Integral) for number in (num_stages, *starts))
    increasing = all(a < b for a, b in itertools.pairwise((0, *starts, num_blocks)))
    if not integers or not increasing or len(starts) != num_stages - 1:
        raise ValueError(
            f"split {name!r} begins {num_stages!r} stages at blocks {tuple(starts)}: "
            f"K stages begin at K - 1 increasing block indices from 1 to {num_blocks - 1}"
        )
    return tuple(starts)


def _kind(value: object) -> str:
    return f"of type {type(value).__name__}" if not isinstance(value, type) else value.__name__


def bind(builder: Callable[..., Model], name: str, text: str, **fixed: Any) -> Callable[..., Model]:
    """Fixes keyword arguments of a builder, which its signature then lists no more."""

    @functools.wraps(builder)
    def bound(*args: Any, **kwargs: Any) -> Model:
        return builder(*args, **kwargs, **fixed)

    signature = inspect.signature(builder)
    free = [parameter for key, parameter in signature.parameters.items() if key not in fixed]
    bound.__signature__ = signature.replace(parameters=free)  # type: ignore[attr-defined]
    bound.__name__ = bound.__qualname__ = name
    bound.__doc__ = f"{text}; its arguments are the others of `{builder.__name__}`."
    return bound
