"""The model that every method trains: a sequence of blocks and a classifier."""

import dataclasses
from collections.abc import Iterator, Sequence

from flax import nnx


@dataclasses.dataclass(frozen=True)
class Model:
    """A network cut into blocks.

    Attributes:
        blocks: Modules applied one after another, each from one activation to the next, with their
            initial weights. Any sequence is accepted; it is kept as a tuple.
        classifier: Module from the last block's output to logits `[batch, classes]`. None when the
            last block outputs the logits itself.

    Raises:
        TypeError: A block or the classifier is no `flax.nnx.Module`.
        ValueError: There is no block, or two of the modules share a variable.
    """

    blocks: Sequence[nnx.Module]
    classifier: nnx.Module | None = None

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

    def _named(self) -> Iterator[tuple[str, nnx.Module]]:
        yield from ((f"blocks[{i}]", block) for i, block in enumerate(self.blocks))
        if self.classifier is not None:
            yield "classifier", self.classifier


def _variables(module: nnx.Module) -> list[nnx.Variable]:
    return [node for _, node in nnx.iter_graph(module) if isinstance(node, nnx.Variable)]


def _kind(value: object) -> str:
    return value.__name__ if isinstance(value, type) else type(value).__name__
