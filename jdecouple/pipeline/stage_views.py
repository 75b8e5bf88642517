"""States of all stages as an engine holds them, and as a sequence that is cut on demand."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import jax

USED_UP = (
    "this state is used up, training has put another in its place: go on with the one that was "
    "returned (state, metrics = trainer.step(state, batch)), or begin with trainer.init()"
)


class Layout(Protocol):
    """How the states of the stages lie in the arrays of an engine."""

    engine: ClassVar[str]
    """Name of the engine."""

    @property
    def stages(self) -> tuple[Any, ...]:
        """All stages."""

    def view(self, arrays: Any, stage: int) -> Any:
        """The state of one stage; None of one of another process."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class StageViews(Sequence):
    """States of all stages in the arrays of an engine; as a sequence, stage by stage, on demand.

    Attributes:
        layout: how they lie there.
        arrays: what the engine's calls take, and give anew.
    """

    layout: Layout = dataclasses.field(metadata={"static": True})
    arrays: Any

    def __len__(self) -> int:
        return len(self.layout.stages)

    def __reduce__(self) -> tuple:
        """Copies and pickles are the states alone: a layout belongs to its trainer."""
        return tuple, (tuple(self),)

    def __getitem__(self, stage: Any) -> Any:
        """State of a stage: the next step donates it with all others, but for copies."""
        if isinstance(stage, slice):
            return [self[k] for k in range(len(self))[stage]]
        return self.layout.view(self.arrays, range(len(self))[stage])


def is_deleted(leaf: Any) -> bool:
    """Whether a leaf of a state is an array that a call has consumed."""
    found = getattr(leaf, "is_deleted", None)
    return found is not None and found()
