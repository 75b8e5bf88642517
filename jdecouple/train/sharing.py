"""Whether all processes see the workdir, and what they then do together with its checkpoints."""

import contextlib
import secrets
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jdecouple._files import absolute
from jdecouple.checkpoint import Checkpointer, CheckpointError, Together
from jdecouple.train import hosts

SECONDS = 3.0  # in which all must have written their parts where one of them has gone


def share(
    processes: hosts.MultiProcess, folder: Path, checkpoints: Checkpointer | None
) -> Together | None:
    """This process's side of checkpoints that all write; None where not all see one folder.

    All call it, the first with its open `checkpoints`. It leaves a file there, in which name there
    is a number that nobody can have guessed, and every other one that sees it leaves one beside it.
    """
    if processes.count == 1:
        return None
    token = processes.broadcast(secrets.token_hex(8))
    marks = [folder / f".seen-{token}-{index}" for index in range(processes.count)]
    if processes.first:
        marks[0].touch()
    processes.broadcast(None)
    with contextlib.suppress(OSError):
        if not processes.first and marks[0].exists():
            marks[processes.index].touch()
    processes.collect(None)
    seen = processes.broadcast(processes.first and all(mark.exists() for mark in marks))
    if processes.first:
        for mark in marks:
            mark.unlink(missing_ok=True)
    if not seen:
        return None
    together = Together(absolute(folder), processes.index, processes.count, token)
    if checkpoints is not None:
        checkpoints.share(together)
    return together


def finish(checkpoints: Checkpointer, together: Together | None) -> None:
    """Finishes a save, on the first process, for which the one that has gone is not needed."""
    if together is None or together.is_written(SECONDS):
        checkpoints.wait()


def agreement(processes: hosts.MultiProcess) -> Callable[[int], str | None]:
    """What the first process asks of a checkpoint that it can read: why others refuse it."""

    def agree(step: int) -> str | None:
        processes.broadcast(step)
        refused = [message.value for message in processes.collect(None)]
        return next((reason for reason in refused if reason is not None), None)

    return agree


def read_what_is_asked(
    processes: hosts.MultiProcess, folder: Path, names: Callable[[int], Collection[str]]
) -> dict[str, np.ndarray]:
    """The arrays that this process has read last, by `names` of a step; it is not the first.

    It answers what the first asks by `agreement`, until that says None.
    """
    arrays: Mapping[str, Any] = {}
    checkpoints = Checkpointer(folder, read_only=True)
    while (step := processes.broadcast(None)) is not None:
        reason, own = None, frozenset(names(step))
        try:
            arrays = checkpoints.read(step, own.__contains__).arrays
        except CheckpointError as error:
            reason = str(error)
        processes.collect(reason)
    return dict(arrays)


def stage_of(trainer: Any) -> Callable[[str], int]:
    """The stage of an array, by the name that it has in a checkpoint."""
    owners = {f"stage_{stage.index}": stage.index for stage in trainer.stages}
    for stage in trainer.stages:
        owners |= {f"block_{unit.index}": stage.index for unit in stage.units}
    return lambda name: owners[name.partition("/")[0]]
