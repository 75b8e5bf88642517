"""What a trainer takes in to train on: checked, cut, uploaded once, and known again."""

from collections.abc import Mapping, Sequence
from typing import Any

from jdecouple.pipeline.batch import BatchSpec, LabelCheck, PlacedBatch
from jdecouple.pipeline.engine import Engine


class Intake:
    """Checks batches and uploads them to the first stage of an engine.

    Attributes:
        check_labels: looks for labels that are no class.
    """

    def __init__(self, spec: BatchSpec, num_classes: int, engine: Engine):
        self.check_labels = LabelCheck(num_classes)
        self._spec, self._engine = spec, engine
        self._made_for = (spec, num_classes, engine.name, engine.placements[0].devices)

    def single(self, batch: Mapping[str, Any] | PlacedBatch) -> PlacedBatch:
        """One batch, uploaded unless it is already."""
        if not isinstance(batch, PlacedBatch):
            return self._put([self._spec.checked(batch, self.check_labels)])
        if batch.count is not None:
            raise ValueError(f"batch holds a list of {batch.count}: a single batch is needed")
        return self.own(batch)

    def several(self, batches: Sequence[Mapping[str, Any] | PlacedBatch]) -> PlacedBatch:
        """Batches that become one upload; those on the host are stacked there."""
        parts = [
            self.single(item)
            if isinstance(item, PlacedBatch)
            else self._spec.checked(item, self.check_labels)
            for item in batches
        ]
        return self._put(parts, len(batches))

    def own(self, batch: PlacedBatch) -> PlacedBatch:
        """An uploaded batch that this trainer can take; ValueError for another's."""
        if batch.made_for != self._made_for:
            raise ValueError("the batch was put by another trainer, which this one differs from")
        self.check_labels.look()
        return batch

    def _put(self, *batches: Any) -> PlacedBatch:
        placed = self._engine.put(*batches)
        return PlacedBatch(placed.parts, placed.count, self._made_for)
