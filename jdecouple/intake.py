"""What the Trainer takes in: batches like its example, cut into microbatches."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from jdecouple._checks import check_batch, check_like
from jdecouple.routes import Message


@dataclasses.dataclass(frozen=True)
class Intake:
    """Checks and cuts global batches.

    Attributes:
        example: `jax.ShapeDtypeStruct`s of a batch.
        microbatches: M.
        replicas: into which every microbatch must divide.
    """

    example: Message
    microbatches: int
    replicas: int

    def checked(self, batch: Mapping[str, Any], num_classes: int) -> list[Message]:
        """The microbatches of a batch.

        Raises:
            TypeError: not a mapping of arrays.
            ValueError: it is not like the example, or holds what no batch may.
        """
        check_batch(batch, num_classes)
        check_like(batch, self.example, any_size=False)
        return self.split(batch)

    def split(self, batch: Mapping[str, Any]) -> list[Message]:
        """Cuts a batch (of arrays or of shapes) into microbatches.

        Raises:
            ValueError: it does not divide.
        """
        count, parts = batch["label"].shape[0], self.microbatches
        if count % (parts * self.replicas):
            raise ValueError(
                f"a batch of {count} does not divide into {parts} microbatch(es) on "
                f"{self.replicas} replica(s)"
            )
        size = count // parts

        def cut(leaf: Any, part: int) -> Any:
            if isinstance(leaf, jax.ShapeDtypeStruct):
                return jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype)
            return leaf if parts == 1 else leaf[part * size : (part + 1) * size]

        return [
            jax.tree.map(lambda leaf, part=part: cut(leaf, part), dict(batch))
            for part in range(parts)
        ]
