"""One state in a directory, where there is no run: what `Trainer.save` writes."""

import os
from collections.abc import Mapping
from typing import Any

from jdecouple.checkpoint.checkpointer import Checkpointer, Restored
from jdecouple.checkpoint.document import CheckpointError

_EXTRA = {"saved_by": "Trainer.save"}


def save_alone(
    directory: str | os.PathLike[str], step: int, arrays: Mapping[str, Any] | None
) -> None:
    """Writes the arrays of a step; what an earlier call wrote is deleted once they are whole.

    Raises:
        CheckpointError: there are no arrays of all stages, the directory holds a later step or the
            checkpoints of a run, or it cannot be written.
    """
    if arrays is None:
        raise CheckpointError("some stages are in other processes: one process can save its own")
    with Checkpointer(directory, keep=1) as checkpoints:
        if any(extra != _EXTRA for extra in checkpoints.extras().values()):
            raise CheckpointError(
                f"{checkpoints.directory} holds the checkpoints of a run: another directory is "
                "needed"
            )
        checkpoints.save(step, arrays, _EXTRA)


def restore_alone(directory: str | os.PathLike[str], template: Mapping[str, Any]) -> Restored:
    """Reads the last step in a directory, a run's too.

    Raises:
        CheckpointError: it holds none, or arrays that differ from the template.
    """
    with Checkpointer(directory, read_only=True) as checkpoints:
        restored = checkpoints.restore(template)
        if restored is None:
            raise CheckpointError(f"no checkpoint in {checkpoints.directory}")
        return restored
