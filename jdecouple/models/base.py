"""The model that every method trains: a sequence of blocks and a classifier."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral

from flax import nnx


@dataclasses.dataclass(frozen=True)
class Model:
    """A network cut into blocks.

    Attributes:
        blocks: Modules applied one after another, each from one activation to the next, with their
            initial weights. Any sequence is accepted; it is kept as a tuple.
        classifier: Module from the last block's output to logits `[batch, classes]`. None when the
            last block outputs the logits itself.
        splits: Named cuts into stages: name -> number of stages K -> indices of the K - 1 blocks at
            which stages 1 to K - 1 begin.

    Raises:
        TypeError: A block or the classifier is no `flax.nnx.Module`.
        ValueError: There is no block, two of the modules share a variable, or a split does not cut
            the blocks into its number of stages.
    """

    blocks: Sequence[nnx.Module]
    classifier: nnx.Module | None = None
    splits: Mapping[str, Mapping[int, tuple[int, ...]]] = dataclasses.field(
        default_factory=dict, compare=False
    )

    def __post_init__(self):
        if not isinstance(self.blocks, Sequence):
            raise TypeError(f"blocks must be a sequence of modules, got {_kind(self.blocks)}")
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if not self.blocks:
            raise ValueError("blocks is empty: a model needs at least one block")
        owners: dict[int, str] = {}
        for name, module in self._named():
            if not isinstance(module, nnx.Module):
                raise TypeError(f"{name} must be a flax.nnx.Module, got {_kind(module)}")
            for variable in _variables(module):
                owner = owners.setdefault(id(variable), name)
                if owner != name:
                    raise ValueError(f"{owner} and {name} share a variable: each must own its own")
        splits = {
            name: {k: _starts(name, k, cuts[k], len(self.blocks)) for k in cuts}
            for name, cuts in self.splits.items()
        }
        object.__setattr__(self, "splits", splits)

    def boundaries(self, name: str, num_stages: int) -> tuple[int, ...]:
        """Blocks at which stages 1 to `num_stages` - 1 begin in the split called `name`.

        Raises:
            ValueError: The model has no such split, or it has none into that many stages.
        """
        if name not in self.splits:
            allowed = f"expected one of {', '.join(self.splits)}" if self.splits else "it has none"
            raise ValueError(f"the model has no split {name!r}: {allowed}")
        cuts = self.splits[name]
        if num_stages not in cuts:
            raise ValueError(
                f"split {name!r} has no cut into {num_stages!r} stages: expected one of "
                f"{', '.join(map(str, cuts))}"
            )
        return cuts[num_stages]

    def _named(self) -> Iterator[tuple[str, nnx.Module]]:
        yield from ((f"blocks[{i}]", block) for i, block in enumerate(self.blocks))
        if self.classifier is not None:
            yield "classifier", self.classifier


def _starts(name: str, num_stages: int, starts: Sequence[int], num_blocks: int) -> tuple[int, ...]:
    whole = all(isinstance(each, Integral) for each in (num_stages, *starts))
    increasing = all(a < b for a, b in itertools.pairwise((0, *starts, num_blocks)))
    if not whole or not increasing or len(starts) != num_stages - 1:
        raise ValueError(
            f"split {name!r} begins {num_stages!r} stages at blocks {tuple(starts)}: "
            f"K stages begin at K - 1 increasing block indices from 1 to {num_blocks - 1}"
        )
    return tuple(starts)


def _variables(module: nnx.Module) -> list[nnx.Variable]:
    return [node for _, node in nnx.iter_graph(module) if isinstance(node, nnx.Variable)]


def _kind(value: object) -> str:
    return value.__name__ if isinstance(value, type) else type(value).__name__
